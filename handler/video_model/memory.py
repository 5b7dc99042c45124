"""Plans where each part of a model is kept, from the free GPU memory and the host memory. Pure arithmetic.

A part is RESIDENT on the GPU, or STREAMED: kept in host memory and copied when it computes. Transformers and encoders
are copied block by block or layer by layer, the next one while this one computes. The VAE's decoder is copied whole,
because it is used once. At real size a transformer pass takes seconds, but the copy of its 17 GB takes less than a
second over PCIe 4 x16, so the copy costs no time.

Each `_bytes` function counts the tensors that are alive at the peak of one part of a render, in uncompiled code; a
compiled block needs less. `tests/integration/handler/test_counted_memory.py` compares them with the real code at real
dimensions, where every tensor is counted on the meta device: the plan is at least the count, and at most 1.15 times it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from handler.video_model.dimensions import HALF, SINGLE, TRANSFORMER, UPSAMPLERS, VAE
from handler.video_model.workload import IMAGE_TOKENS, LONGEST_TEXT, Stage, Workload

_GB: Final = 1e9
#: GPU memory that no tensor of ours takes: CUDA's context (0.5 GB on an H100), workspaces of cuBLAS, cuDNN and
#: attention kernels, and what PyTorch's allocator loses to fragmentation. Assumed.
OVERHEAD: Final = 1_200_000_000
#: Host memory of a worker before any weights are pinned: Python, PyTorch, CUDA's libraries, ffmpeg. Assumed.
HOST_OVERHEAD: Final = 4_000_000_000
#: The fraction of a tile that is blended with each neighbour.
_SEAM: Final = 0.25
#: The tile that is the whole picture: it has no seams, and no pixel is decoded twice.
WHOLE: Final = 0
#: Sides of the VAE's tiles in pixels, fastest first.
TILES: Final = (WHOLE, 512, 256, 128)
#: Tokens that a transformer's block computes at once: enough to fill a GPU; a temporary takes 64 MB.
CHUNK: Final = 16_384
#: Input numbers that `causal_decoder.py` computes at once: enough to fill a GPU, 32 MB in float16. The norm's
#: temporaries in float32 take 250 MB.
BAND: Final = 2**24


class Placement(StrEnum):
    """Where a part's weights are kept."""

    RESIDENT = "resident"
    STREAMED = "streamed"


class DoesNotFitError(Exception):
    """A video does not fit, even with all parts streamed and the smallest tiles, or host memory is too small."""


@dataclass(frozen=True)
class Part:
    """Bytes of a part of a model. `passing` are on the GPU at once while the part is streamed; host memory holds all.

    `rounded` is what pinning takes if PyTorch rounds each block up to a power of two, as it does by default.
    """

    bytes: int = 0
    passing: int = 0
    rounded: int = 0


@dataclass(frozen=True)
class Weights:
    """The parts of a model. Of the `transformers`, `passing` is that of the largest one, because one runs at a time.

    `small` parts, the upsamplers, are always resident.
    """

    text_encoders: Part
    transformers: Part
    vae_decoder: Part
    vae_encoder: Part = Part()
    vision: Part = Part()
    small: int = 0


@dataclass(frozen=True)
class PlacementPlan:
    """Where each part is kept, and the side of the VAE's tiles in pixels, WHOLE for one tile.

    The vision tower is kept where the text encoders are.
    """

    text_encoders: Placement
    transformers: Placement
    vae: Placement
    tile: int

    def __str__(self) -> str:
        tiles = f"tiles of {self.tile}" if self.tile else "the whole picture at once"
        return f"text encoders {self.text_encoders}, transformers {self.transformers}, VAE {self.vae} with {tiles}"


#: Fastest first. To copy the text encoders once per prompt costs less time than tiles, whose overlap is decoded twice;
#: tiles cost less than blocks that cannot be compiled.
PLANS: Final = tuple(
    PlacementPlan(text, transformers, vae, tile)
    for text, transformers, vae, sides in (
        (Placement.RESIDENT, Placement.RESIDENT, Placement.RESIDENT, (WHOLE,)),
        (Placement.STREAMED, Placement.RESIDENT, Placement.RESIDENT, TILES),
        (Placement.STREAMED, Placement.STREAMED, Placement.RESIDENT, TILES),
        (Placement.STREAMED, Placement.STREAMED, Placement.STREAMED, TILES),
    )
    for tile in sides
)
#: The plan that takes the least GPU memory for every video.
SMALLEST: Final = PLANS[-1]


def denoising_bytes(stage: Stage, *, from_image: bool) -> int:
    """Tensors of a transformer pass over the stage's largest window, and of the sampling loop around it."""
    d, window = TRANSFORMER.width * HALF, max(stage.windows)
    text = sum(LONGEST_TEXT) + (IMAGE_TOKENS if from_image else 0)
    # 1. While attention runs: its input, query, key, value and output of all tokens.
    attending = 5 * (window + text) * d
    # 2. Before it, a chunk at a time: all but the output, and twelve temporaries of a chunk, some in float32.
    chunk = (4 * (window + text) + 12.2 * min(window, CHUNK)) * d
    # 3. Throughout: cosines and sines of all positions in float32, the prompt, and the loop's latents and conditions.
    rotation = 2 * TRANSFORMER.head_size * SINGLE * window
    return int(max(attending, chunk)) + rotation + _loop_bytes(stage)


def _loop_bytes(stage: Stage) -> int:
    """Of the sampling loop: latents, condition, low resolution, the transformer's input and its velocity."""
    return stage.tokens * stage.channels * (3 * SINGLE + HALF) + 200_000_000


def upsampling_bytes(stage: Stage) -> int:
    """Tensors of the upsampler before a stage, in float32: five of its width."""
    published = UPSAMPLERS.get(stage.checkpoint, UPSAMPLERS["1080p_sr_distilled"])
    return stage.tokens * (5 * published.width + 3 * TRANSFORMER.latent_channels) * SINGLE


def image_bytes(stage: Stage) -> int:
    """Tensors of the VAE's encoder for one frame of a stage's size, which it encodes untiled."""
    _, height, width = stage.latents
    return int(height * width * VAE.spatial**2 * VAE.channels[-1] * HALF * 7.2)


def decoding_bytes(video: Workload, tile: int) -> int:
    """Tensors of a streaming decode: the larger of its two parts, for one tile. Only the first grows with time."""
    pixels = tile_latents(video, tile)
    widest = VAE.channels[0]
    # 1. The stem, for the whole duration in the resolution of the latents: input, norm, query, key, value and one copy.
    stem = 6 * widest * video.latent_frames * pixels * HALF
    # 2. A step: what every convolution remembers, five tensors of a frame in the last level, and bands of a convolution
    # and of a norm in float32.
    finest = VAE.channels[-1] * pixels * VAE.spatial**2 * HALF
    step = history_bytes(pixels) + 5.1 * finest + 5 * BAND * HALF
    # 3. Throughout: the latents in both precisions.
    latents = video.stages[-1].tokens * VAE.latent_channels * (SINGLE + HALF)
    return int(max(stem + 2 * BAND * HALF, step)) + latents


def history_bytes(pixels: int) -> int:
    """What the decoder's convolutions remember: two input frames each, for so many latent pixels."""
    first, last = VAE.channels[0], VAE.channels[-1]
    channels: int = 2 * first + last * 4 ** (len(VAE.channels) - 1)
    for level, width in enumerate(VAE.channels):
        convolutions = 2 * VAE.resnets + (1 if level < len(VAE.channels) - 1 else 0)
        channels += convolutions * width * 4**level
    return 2 * channels * pixels * HALF


def tile_latents(video: Workload, tile: int) -> int:
    """Latent pixels of the largest tile."""
    _, height, width = video.stages[-1].latents
    side = tile // VAE.spatial or max(height, width)
    return min(height, side) * min(width, side)


def tiles(video: Workload, tile: int) -> int:
    """Tiles of the picture. Those at the right and at the lower edge may be smaller."""
    _, height, width = video.stages[-1].latents
    side = tile // VAE.spatial
    if tile == WHOLE or (height <= side and width <= side):
        return 1
    step = int(tile * (1 - _SEAM)) // VAE.spatial
    return math.ceil(height / step) * math.ceil(width / step)


@dataclass(frozen=True)
class Peak:
    """Bytes on the GPU at the peak of a part of a render: `weights`, and `activations` beside them."""

    name: str
    weights: int
    activations: int

    @property
    def tensors(self) -> int:
        """All of them."""
        return self.weights + self.activations


#: Of both text encoders' states, for a prompt padded to 1108 tokens: the states of all layers, and one feed-forward.
_TEXT_ACTIVATIONS: Final = 420_000_000


def peaks(plan: PlacementPlan, weights: Weights, video: Workload) -> Iterator[Peak]:
    """Each part of a render with what is on the GPU meanwhile."""
    placed = (
        (weights.text_encoders, plan.text_encoders),
        (weights.vision, plan.text_encoders),
        (weights.transformers, plan.transformers),
        (weights.vae_encoder, plan.vae),
        (weights.vae_decoder, plan.vae),
    )
    kept = weights.small + sum(part.bytes for part, where in placed if where is Placement.RESIDENT)

    def held(computing: Part, where: Placement) -> int:
        return kept + (computing.passing if where is Placement.STREAMED else 0)

    yield Peak("prompt", held(weights.text_encoders, plan.text_encoders), _TEXT_ACTIVATIONS)
    for stage in video.stages:
        name, loop = stage.checkpoint, _loop_bytes(stage)
        if video.from_image:
            yield Peak(f"image for {name}", held(weights.vae_encoder, plan.vae), image_bytes(stage) + loop)
        if stage.super_resolution:
            yield Peak(f"upsampler of {name}", kept, upsampling_bytes(stage) + loop)
        activations = denoising_bytes(stage, from_image=video.from_image)
        yield Peak(name, held(weights.transformers, plan.transformers), activations)
    yield Peak("decoding", held(weights.vae_decoder, plan.vae), decoding_bytes(video, plan.tile))


def peak(plan: PlacementPlan, weights: Weights, video: Workload) -> int:
    """Bytes of GPU memory that a render takes, with OVERHEAD."""
    return OVERHEAD + max(each.tensors for each in peaks(plan, weights, video))


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory. `pinned` of them hold streamed weights, and `rounded` in powers of two, PyTorch's default.

    `parked` is what tiles of the VAE remember between their turns.
    """

    pinned: int
    rounded: int
    parked: int

    @property
    def total(self) -> int:
        """With pinned blocks of the exact size, which `handler.allocator` sets up."""
        return HOST_OVERHEAD + self.pinned + self.parked


def host_memory(plan: PlacementPlan, weights: Weights, video: Workload) -> HostMemory:
    """What a worker with this plan takes of the host's memory while it renders."""
    placed = (
        (weights.text_encoders, plan.text_encoders),
        (weights.vision, plan.text_encoders),
        (weights.transformers, plan.transformers),
        (weights.vae_encoder, plan.vae),
    )
    pinned = [part for part, where in placed if where is Placement.STREAMED]
    pixels, count = tile_latents(video, plan.tile), tiles(video, plan.tile)
    stems = VAE.channels[0] * video.latent_frames * pixels * HALF * count
    parked = stems + (history_bytes(pixels) * count if count > 1 else 0)
    decoder = weights.vae_decoder.bytes if plan.vae is Placement.STREAMED else 0
    return HostMemory(sum(part.bytes for part in pinned), sum(part.rounded for part in pinned), parked + decoder)


@dataclass(frozen=True)
class Budget:
    """A plan, and the numbers of bytes that it was made for."""

    free: int
    weights: Weights
    plan: PlacementPlan

    def check(self, video: Workload, adapters: int = 0) -> None:
        """Raises DoesNotFitError if a video does not fit with so many bytes of LoRA adapters."""
        needed = peak(self.plan, self.weights, video) + adapters
        if needed > self.free:
            raise DoesNotFitError(f"it takes {needed / _GB:.1f} GB of GPU memory, {self.free / _GB:.1f} GB are free")


def budget(
    free: int, weights: Weights, videos: Iterable[Workload], *, offload: bool = False, host: int | None = None
) -> Budget:
    """The fastest plan for all `videos` that fit into `free` bytes with some plan. With `offload` the smallest plan.

    `host` are the bytes of host memory that the worker may use; None does not limit it.

    Raises:
        DoesNotFitError: no video fits, or the plan needs more host memory.
    """
    smallest = Budget(free, weights, SMALLEST)
    in_order = sorted(videos, key=lambda video: peak(SMALLEST, weights, video))
    smallest.check(in_order[0])
    fitting = [video for video in in_order if peak(SMALLEST, weights, video) <= free]
    plans = (SMALLEST,) if offload else PLANS
    able = [plan for plan in plans if all(peak(plan, weights, video) <= free for video in fitting)]
    needed = {plan: max(host_memory(plan, weights, video).total for video in fitting) for plan in able}
    chosen = next((plan for plan in able if host is None or needed[plan] <= host), None)
    if chosen is None:
        least = min(needed.values())
        raise DoesNotFitError(
            f"it takes {least / _GB:.1f} GB of host memory for the weights that this GPU cannot hold, and the worker "
            f"may use {(host or 0) / _GB:.1f} GB; give the machine or the container more, or offer fewer checkpoints"
        )
    return Budget(free, weights, chosen)
