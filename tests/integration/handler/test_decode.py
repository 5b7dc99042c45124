"""Decoding as a stream gives the stock decoder's pixels, early, with memory that does not depend on the duration."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    HunyuanVideo15AttnBlock,
    HunyuanVideo15CausalConv3d,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import random_model
from handler.video_model.base import Frames
from handler.video_model.causal_decoder import CausalDecoder, History, use_frame_causal_attention
from handler.video_model.decode import decode
from handler.video_model.memory import BAND
from tests.support.full import full

#: A band of a single row.
ROW = 1


def ignore(_: float) -> None:
    pass


def small_vae() -> AutoencoderKLHunyuanVideo15:
    """The published structure with a sixteenth of the channels."""
    torch.manual_seed(0)
    vae: AutoencoderKLHunyuanVideo15 = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 16, 32, 64, 64)
    )
    return vae.eval()


def narrow_vae() -> AutoencoderKLHunyuanVideo15:
    """The demo model's structure: a smaller ratio, and levels that change their number of channels in between."""
    torch.manual_seed(0)
    vae: AutoencoderKLHunyuanVideo15 = AutoencoderKLHunyuanVideo15(
        latent_channels=8,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    return vae.eval()


def demo_vae() -> AutoencoderKLHunyuanVideo15:
    vae: AutoencoderKLHunyuanVideo15 = random_model.build_pipeline().vae
    return vae


def published_vae() -> AutoencoderKLHunyuanVideo15:
    """The published dimensions, without numbers."""
    with torch.device("meta"):
        vae: AutoencoderKLHunyuanVideo15 = AutoencoderKLHunyuanVideo15()
    return vae.half()


def random_latents(vae: Any, frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(1, vae.config.latent_channels, frames, height, width, generator=generator)


def steps_of(decoder: CausalDecoder, latents: torch.Tensor) -> list[torch.Tensor]:
    """The frames of each latent frame."""
    history = History()
    return [decoder.step(frame, history) for frame in torch.split(decoder.stem(latents), 1, dim=2)]


@pytest.mark.parametrize("build", [small_vae, full(narrow_vae)])
@pytest.mark.parametrize("band", [BAND, ROW])
@pytest.mark.parametrize(("frames", "size"), [(1, (3, 4)), (2, (5, 7)), (3, (4, 4)), full(7, (3, 5)), full(7, (1, 1))])
@torch.no_grad()
def test_one_latent_frame_after_another_decodes_to_what_the_whole_does(
    build: Callable[[], Any], band: int, frames: int, size: tuple[int, int]
) -> None:
    vae = build()
    latents = random_latents(vae, frames, *size)
    steps = steps_of(CausalDecoder(vae.decoder, band), latents)
    assert [step.shape[2] for step in steps] == [1] + [4] * (frames - 1)
    expected = vae.decoder(latents)
    assert expected.std() > 0.05
    assert (torch.cat(steps, dim=2) - expected).abs().max() < 1e-5


def assert_less_work_decodes_to_the_same(vae: AutoencoderKLHunyuanVideo15) -> None:
    latents = random_latents(vae, 3, 4, 5)
    with FlopCounterMode(display=False) as whole:
        expected = vae.decoder(latents)
    with FlopCounterMode(display=False) as ours:
        steps = steps_of(CausalDecoder(vae.decoder), latents)
    assert (torch.cat(steps, dim=2) - expected).abs().max() < 1e-5
    assert ours.get_total_flops() < 0.6 * whole.get_total_flops()


@torch.no_grad()
def test_the_zeros_of_a_kernel_are_left_out() -> None:
    """The demo model's kernels are like that: the middle alone, the frame alone, and whole ones."""
    vae = small_vae()
    kernels = [part.conv.weight for part in vae.decoder.modules() if isinstance(part, HunyuanVideo15CausalConv3d)]
    for index, weight in enumerate(kernels):
        kept = torch.zeros(3, 3, 3)
        kept[((2, 1, 1), (2,), (slice(None), 1, 1), ())[index % 4]] = 1
        weight *= kept
    assert_less_work_decodes_to_the_same(vae)


@torch.no_grad()
def test_blocks_that_add_nothing_are_left_out() -> None:
    """The demo model has such ones at its largest resolutions."""
    vae = small_vae()
    for conv in (resnet.conv2.conv for block in vae.decoder.up_blocks[2:] for resnet in block.resnets[1:]):
        conv.weight.zero_()
        conv.bias.zero_()
    assert_less_work_decodes_to_the_same(vae)


@torch.no_grad()
def test_attention_without_a_mask_is_that_with_the_stock_mask() -> None:
    vae, stock = small_vae(), small_vae()
    use_frame_causal_attention(vae.encoder)
    blocks = [
        next(part for part in each.encoder.modules() if isinstance(part, HunyuanVideo15AttnBlock))
        for each in (vae, stock)
    ]
    hidden = torch.randn(1, 64, 5, 3, 4)
    ours, expected = (block(hidden) for block in blocks)
    assert (ours - expected).abs().max() < 1e-5
    image = torch.randn(1, 3, 1, 48, 64)
    assert torch.allclose(vae.encode(image).latent_dist.mean, stock.encode(image).latent_dist.mean, atol=1e-5)


@pytest.mark.parametrize("tile", [None, 32, full(64)])
@pytest.mark.parametrize(
    ("frames", "size"), [full(3, (9, 16)), (3, (4, 4)), (1, (4, 15)), full(3, (13, 6)), (2, (5, 7)), (11, (5, 6))]
)
def test_each_pixel_is_the_stock_decoders(frames: int, size: tuple[int, int], tile: int | None) -> None:
    """Untiled, and with the tiles of `tiled_decode`. 11 latent frames take three turns of each tile."""
    vae = demo_vae()
    if tile is not None:
        vae.enable_tiling(tile, tile, tile // 8, tile // 8)
    latents = random_latents(vae, frames, *size)
    told: list[float] = []
    video = np.concatenate(list(decode(vae, latents, told.append)))
    assert video.shape == (4 * frames - 3, 8 * size[0], 8 * size[1], 3)
    with torch.no_grad():
        stock = vae.decode(latents).sample[0].permute(1, 2, 3, 0).add(1).mul(127.5).round().clamp(0, 255).numpy()
    difference = np.abs(video - stock)
    assert difference.max() <= 1, "a number next to .5 may be rounded either way"
    assert difference.mean() < 1e-3
    assert video.std() > 10
    assert told[0] == 0.0
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1 - 1 / len(set(told)))


def test_frames_come_while_the_rest_is_decoded_and_progress_is_what_is_done() -> None:
    vae = demo_vae()
    told: list[float] = []
    chunks, done = [], []
    for chunk in decode(vae, random_latents(vae, 31, 4, 5), told.append):
        chunks.append(len(chunk))
        done.append(told[-1])
    assert chunks == [1] + [4] * 30
    assert done == pytest.approx([frame / 31 for frame in range(31)])


@pytest.mark.parametrize(
    ("frames", "size"), [(31, (45, 80)), full(61, (45, 80)), full(31, (67, 119)), full(61, (67, 119))]
)
@torch.no_grad()
def test_the_first_frame_takes_at_most_5_percent_of_the_work(frames: int, size: tuple[int, int]) -> None:
    """Counted in operations, with the published dimensions, at 720p and 1080p, for 5 and 10 s."""
    decoder, history = CausalDecoder(published_vae().decoder, band=2**40), History()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        hidden = decoder.stem(torch.empty(1, 32, frames, *size, dtype=torch.float16))
        counts = []
        for frame in torch.split(hidden, 1, dim=2)[:3]:
            decoder.step(frame, history)
            counts.append(counter.get_total_flops())
    first, each = counts[0], counts[2] - counts[1]
    assert counts[1] - first == each, "all later steps do the same work"
    assert first <= 0.05 * (first + (frames - 1) * each)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all live storages on the meta device that PyTorch makes inside it, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and not func.is_view:
                self._track(tensor.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak(frames: int, height: int, width: int, *, tile: int | None = None) -> int:
    """Peak bytes of activations of the published decoder for this size in latents."""
    vae = published_vae()
    if tile is not None:
        vae.enable_tiling(tile, tile, tile // 16, tile // 16)
    with torch.device("meta"):
        latents = torch.empty(1, 32, frames, height, width, dtype=torch.float16)
    with LiveBytes() as live:
        for _ in decode(vae, latents, ignore):
            pass
    most: int = live.peak
    return most


@pytest.mark.full
@pytest.mark.parametrize("latents", [(7, 13), (31, 61)])
def test_live_bytes_do_not_grow_with_the_number_of_frames(latents: tuple[int, int]) -> None:
    """Of 25 and 49 frames, and of 121 and 241, those of the shortest and the longest video."""
    short, long = (peak(frames, 8, 8) for frames in latents)
    assert long < 1.02 * short


@pytest.mark.full
def test_with_tiles_the_peak_does_not_grow_with_the_duration_either() -> None:
    """Of two tiles with two turns each, and with three."""
    short, long = (peak(frames, 8, 12, tile=128) for frames in (9, 17))
    assert long < 1.02 * short


@pytest.mark.full
def test_with_tiles_the_peak_does_not_grow_with_the_picture() -> None:
    """What the tiles remember waits in host memory."""
    small, large = (peak(3, height, 8, tile=128) for height in (14, 26))
    assert large < 1.05 * small
    assert peak(3, 26, 8) > 2 * large, "in one piece"


def test_an_error_in_the_middle_ends_decoding_and_the_next_one_works() -> None:
    vae = demo_vae()
    latents = random_latents(vae, 4, 5, 6)

    def fail(done: float) -> None:
        if done >= 0.5:
            raise RuntimeError("in the middle")

    taken: list[Frames] = []
    with pytest.raises(RuntimeError, match="in the middle"):
        taken.extend(decode(vae, latents, fail))
    assert [len(chunk) for chunk in taken] == [1, 4]
    again = list(decode(vae, latents, ignore))
    assert np.array_equal(np.concatenate(again[:2]), np.concatenate(taken))


def test_weights_in_host_memory_are_on_the_device_only_while_it_decodes() -> None:
    """The meta device stands for a GPU."""
    vae = small_vae()
    before = dict(vae.decoder.named_parameters())
    threads = torch.get_num_threads()

    def places() -> set[str]:
        return {parameter.device.type for parameter in vae.decoder.parameters()}

    frames = decode(vae, torch.empty(1, 4, 5, 2, 2, device="meta"), ignore)
    assert len(next(frames)) == 1
    assert places() == {"meta"}
    frames.close()
    assert places() == {"cpu"}
    after = dict(vae.decoder.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert torch.get_num_threads() == threads
