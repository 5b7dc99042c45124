"""Latents to uint8 frames as a stream: each frame leaves as soon as it is computed, and nothing holds the whole video.

A GPU with enough memory decodes the whole picture, one latent frame after another (`causal_decoder.py`). A smaller one
decodes tiles, a few latent frames of each at a time. What a tile remembers waits in host memory until its next turn.
Tiles, overlap, blending and pixels equal those of diffusers' `tiled_decode`. Tiles in time would leave visible cuts.
Source: `tiled_decode` in diffusers, models/autoencoders/autoencoder_kl_hunyuanvideo15.py.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from handler.video_model.base import Frames
from handler.video_model.causal_decoder import CausalDecoder, History

#: Latent frames of one tile's turn, except the first turn: each turn copies the tile's history twice over the bus.
_TURN: Final = 8
#: Frames that are yielded at once: those of a latent frame. 4 of 1280x720 are 11 MB.
_FRAMES_AT_ONCE: Final = 4


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor, on_step: Callable[[float], None]) -> Generator[Frames, None, None]:
    """Yields the video's frames in order, (n, H, W, 3) in host memory, from latents (1, C, T, h, w) scaled for the VAE.

    `vae.use_tiling` and its tile sizes decide about tiles. Calls `on_step` before each latent frame of each tile with
    the fraction done, from 0.0 to below 1.0. An exception from it ends decoding. Weights of the decoder that are on
    another device are copied to that of the latents, and are back there in the end.
    """
    with _weights_on(vae.decoder, latents.device), _threads(latents.device):
        video = _Video(vae, latents.to(vae.dtype), on_step)
        for turn in video.turns():
            picture = video.decode(turn)
            for first in range(0, len(picture), _FRAMES_AT_ONCE):
                yield picture[first : first + _FRAMES_AT_ONCE]


@dataclass
class _Tile:
    """A part of the picture: its place in latents, and what is known of it."""

    top: int
    left: int
    hidden: list[torch.Tensor]  # the stem's output in host memory, (1, C, 1, h, w) for each latent frame
    history: History = field(default_factory=History)


class _Video:
    """A video that is being decoded."""

    def __init__(self, vae: Any, latents: torch.Tensor, on_step: Callable[[float], None]) -> None:
        self._vae = vae
        self._decoder = CausalDecoder(vae.decoder)
        self._device = latents.device
        self._on_step = on_step
        self._latent_frames, self._height, self._width = latents.shape[-3:]
        self._ratio = vae.spatial_compression_ratio
        self._side_y, self._side_x, self._seam_y, self._seam_x = _tiling(vae, self._height, self._width)
        self._step_y = self._side_y - self._seam_y // self._ratio
        self._step_x = self._side_x - self._seam_x // self._ratio
        self._steps = 0
        self._rows = [
            [self._tile(latents, top, left) for left in range(0, self._width, self._step_x)]
            for top in range(0, self._height, self._step_y)
        ]

    def turns(self) -> Iterator[range]:
        """The latent frames that are decoded together, in order. The first frame is not kept waiting."""
        length = _TURN if self._tiles > 1 else 1
        yield range(1)
        for first in range(1, self._latent_frames, length):
            yield range(first, min(first + length, self._latent_frames))

    def decode(self, turn: range) -> Frames:
        """The frames of these latent frames, which must follow those of the last call."""
        height, width = self._height * self._ratio, self._width * self._ratio
        picture: Frames | None = None
        above: list[torch.Tensor] = []  # lower seams of the row above, (1, 3, n, seam, W of a tile) each
        for row in self._rows:
            seams: list[torch.Tensor] = []
            beside: torch.Tensor | None = None  # right seam of the tile to the left, (1, 3, n, H of a tile, seam)
            for column, place in enumerate(row):
                # 1. Decode a tile: (1, 3, n, H, W).
                tile = self._frames(place, turn)
                # 2. Blend it with its neighbours, and keep its seams for the next ones.
                if above:
                    tile = self._vae.blend_v(above[column], tile, self._seam_y)
                if beside is not None:
                    tile = self._vae.blend_h(beside, tile, self._seam_x)
                if len(self._rows) > 1:
                    seams.append(tile[..., -self._seam_y :, :].clone())
                beside = tile[..., -self._seam_x :].clone() if len(row) > 1 else None
                # 3. Copy the pixels that no later tile changes.
                pixels = _pixels(tile[..., : self._step_y * self._ratio, : self._step_x * self._ratio])
                if picture is None:
                    picture = np.empty((len(pixels), height, width, 3), dtype=np.uint8)
                y, x = place.top * self._ratio, place.left * self._ratio
                picture[:, y : y + pixels.shape[1], x : x + pixels.shape[2]] = pixels
                del tile
            above = seams
        assert picture is not None  # noqa: S101 - there is a tile
        return picture

    @property
    def _tiles(self) -> int:
        return len(self._rows) * len(self._rows[0])

    def _tile(self, latents: torch.Tensor, top: int, left: int) -> _Tile:
        self._on_step(0.0)
        hidden = self._decoder.stem(latents[..., top : top + self._side_y, left : left + self._side_x])
        return _Tile(top, left, [_in_host_memory(frame) for frame in torch.split(hidden, 1, dim=2)])

    def _frames(self, tile: _Tile, turn: range) -> torch.Tensor:
        """The tile's frames for these latent frames, (1, 3, n, H, W)."""
        parts = []
        tile.history.restore(self._device)
        for latent_frame in turn:
            self._on_step(self._steps / (self._latent_frames * self._tiles))
            parts.append(self._decoder.step(tile.hidden[latent_frame].to(self._device), tile.history))
            self._steps += 1
        if self._tiles > 1 and self._device.type != "cpu":
            tile.history.park()
        return torch.cat(parts, dim=2)


def _tiling(vae: Any, height: int, width: int) -> tuple[int, int, int, int]:
    """Height and width of a tile in latents, and of a seam in pixels. A single tile has no seams."""
    if not vae.use_tiling or (height <= vae.tile_latent_min_height and width <= vae.tile_latent_min_width):
        return height, width, 0, 0
    seam_y = int(vae.tile_sample_min_height * vae.tile_overlap_factor)
    seam_x = int(vae.tile_sample_min_width * vae.tile_overlap_factor)
    return vae.tile_latent_min_height, vae.tile_latent_min_width, seam_y, seam_x


def _pixels(video: torch.Tensor) -> Frames:
    """(1, 3, n, H, W) from -1 to 1 as uint8 (n, H, W, 3)."""
    scaled = video[0].permute(1, 2, 3, 0).float().add(1).mul_(127.5).round_().clamp_(0, 255)
    return _in_host_memory(scaled.to(torch.uint8).contiguous()).numpy()


def _in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers; for a tensor on the meta device, which has none, any numbers."""
    return torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu()


@contextmanager
def _weights_on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Copies the module's weights to the device for the block, unless they are there."""
    elsewhere = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.device != device
    ]
    for part, name, parameter in elsewhere:
        setattr(part, name, nn.Parameter(parameter.to(device), requires_grad=False))
    try:
        yield
    finally:
        for part, name, parameter in elsewhere:
            setattr(part, name, parameter)


@contextmanager
def _threads(device: torch.device) -> Iterator[None]:
    """Leaves the other cores of a CPU to ffmpeg. Only small models run there: their frames are too small to share."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
