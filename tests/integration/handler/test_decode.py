"""Decoding one tile at a time gives the stock decoder's pixels with a fraction of its memory."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from handler.video_model import demo
from handler.video_model.attention import use_fast_causal_mask
from handler.video_model.decode import decode


def stock(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        video: torch.Tensor = vae.decode(latents).sample
    return video


@pytest.mark.parametrize("tile", [None, 32, 64])
@pytest.mark.parametrize("size", [(9, 16), (4, 4), (4, 15), (13, 6), (5, 7)])
def test_each_pixel_is_the_stock_decoders(size: tuple[int, int], tile: int | None) -> None:
    vae = demo.build_pipeline().vae
    if tile is not None:
        vae.enable_tiling(tile, tile, tile // 8, tile // 8)
    latents = torch.randn(1, 8, 3, *size, generator=torch.Generator().manual_seed(1))
    told: list[float] = []
    frames = decode(vae, latents, told.append)
    assert frames.shape == (9, 8 * size[0], 8 * size[1], 3)
    expected = stock(vae, latents)[0].permute(1, 2, 3, 0).add(1).mul(127.5).round().clamp(0, 255)
    assert np.array_equal(frames, expected.to(torch.uint8).numpy())
    assert frames.std() > 10
    assert told[0] == 0.0
    assert told == sorted(set(told))
    assert told[-1] < 1.0


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all live storages that PyTorch allocates inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self._known.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size


def peak(height: int, *, whole: bool) -> int:
    """Peak bytes of decoding a video that is `height` latents high."""
    vae = demo.build_pipeline().vae
    vae.enable_tiling(32, 32, 4, 4)
    use_fast_causal_mask(vae)
    latents = torch.randn(1, 8, 5, height, 4)
    with LiveBytes() as live:
        if whole:
            stock(vae, latents)
        else:
            decode(vae, latents, lambda _: None)
    most: int = live.peak
    return most


def test_the_peak_does_not_grow_with_the_height_of_the_video() -> None:
    in_tiles = [peak(height, whole=False) for height in (12, 48)]
    assert in_tiles[1] < 1.05 * in_tiles[0]
    grown = peak(48, whole=True) - peak(12, whole=True)
    line = 3 * 17 * 8 * 4 * 4  # a line of pixels: channels, frames, width, bytes
    assert grown > (48 - 12) * 8 * line, "the stock decoder's is seen by the same means"
