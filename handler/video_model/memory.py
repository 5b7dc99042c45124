"""Plans where each part of a model is kept, from the free GPU memory. Pure arithmetic.

A part is RESIDENT on the GPU, or STREAMED: kept in host memory and copied block by block, the next block while this one
computes. At real size a transformer pass takes seconds, but the copy of its 17 GB takes less than a second over PCIe 4
x16, so the copy costs no time. The text encoders run once per prompt.

The sizes of activations are calculated from shapes, not measured; `benchmarks/gpu.py --vram-limit` compares them with a
GPU.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

_GB: Final = 1e9
#: Bytes for CUDA, its libraries' workspaces and PyTorch's fragmentation.
_OVERHEAD: Final = 1.0 * _GB
#: Tensors of one activation's size that a block holds at its peak: hidden states, joint query, key and value, attention
#: output, chunks of temporaries (`blocks.CHUNK`) and the step cache.
_BLOCK_TENSORS: Final = 8
#: The same for the VAE decoder's widest level: input, its padded copy, output, residual.
_DECODER_TENSORS: Final = 4
#: The fraction of a tile that is blended with each neighbour.
_SEAM: Final = 0.25
#: Sides of the VAE's tiles in pixels, fastest first.
TILES: Final = (256, 192, 128)


class Placement(StrEnum):
    """Where a part's weights are kept."""

    RESIDENT = "resident"
    STREAMED = "streamed"


class DoesNotFitError(Exception):
    """A video does not fit, even with all parts streamed and the smallest tiles."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parts. `block` is the largest repeated block of a transformer."""

    text_encoders: int
    transformers: Sequence[int]
    vae: int
    block: int


@dataclass(frozen=True)
class Workload:
    """The size of a video: its frames, and (width, height) in pixels of its largest stage.

    `width` is the transformer's (heads x head size), `channels` the VAE decoder's at full resolution, `itemsize` the
    bytes of a number.
    """

    num_frames: int
    size: tuple[int, int]
    width: int = 2048
    channels: int = 128
    itemsize: int = 2

    @property
    def tokens(self) -> int:
        """Latent tokens of the largest stage: 16 x 16 pixels of four frames each, and of the first frame alone."""
        return ((self.num_frames - 1) // 4 + 1) * (self.size[0] // 16) * (self.size[1] // 16)

    @property
    def denoising(self) -> int:
        """Bytes of activations in a transformer pass."""
        return self.tokens * self.width * self.itemsize * _BLOCK_TENSORS

    def decoding(self, tile: int) -> int:
        """Bytes of activations in a tiled decode: a tile, its pixels before uint8, the seams of a row of tiles."""
        in_tile = tile * tile * self.num_frames * self.channels * self.itemsize * _DECODER_TENSORS
        pixels = tile * tile * self.num_frames * 3 * (self.itemsize + 2 * 4)  # and two copies in float32
        seams = int(_SEAM * tile * (self.size[0] + tile) * 2) * self.num_frames * 3 * self.itemsize  # of two rows
        return in_tile + pixels + seams


@dataclass(frozen=True)
class PlacementPlan:
    """Where each part is kept, and the side of the VAE's tiles in pixels."""

    text_encoders: Placement
    transformers: Placement
    vae: Placement
    tile: int

    def __str__(self) -> str:
        return (
            f"text encoders {self.text_encoders}, transformers {self.transformers}, VAE {self.vae} "
            f"with tiles of {self.tile}"
        )


#: Fastest first. The text encoders run once per prompt, and smaller tiles cost less time than a streamed transformer.
PLANS: Final = tuple(
    PlacementPlan(text, transformers, vae, tile)
    for text, transformers, vae in (
        (Placement.RESIDENT, Placement.RESIDENT, Placement.RESIDENT),
        (Placement.STREAMED, Placement.RESIDENT, Placement.RESIDENT),
        (Placement.STREAMED, Placement.STREAMED, Placement.RESIDENT),
        (Placement.STREAMED, Placement.STREAMED, Placement.STREAMED),
    )
    for tile in TILES
)
#: The plan that takes the least memory for every video.
SMALLEST: Final = PLANS[-1]


def peak(plan: PlacementPlan, weights: Weights, workload: Workload) -> int:
    """Bytes at the largest stage. A streamed part takes two of its blocks while it runs, and nothing otherwise."""
    held = sum(
        size
        for size, placement in (
            (weights.text_encoders, plan.text_encoders),
            (sum(weights.transformers), plan.transformers),
            (weights.vae, plan.vae),
        )
        if placement is Placement.RESIDENT
    )
    passing = 2 * weights.block
    denoising = workload.denoising + (passing if plan.transformers is Placement.STREAMED else 0)
    decoding = workload.decoding(plan.tile) + (passing if plan.vae is Placement.STREAMED else 0)
    return int(_OVERHEAD + held + max(denoising, decoding, passing))


@dataclass(frozen=True)
class Budget:
    """A plan, and the numbers of bytes that it was made for."""

    free: int
    weights: Weights
    plan: PlacementPlan

    def check(self, workload: Workload) -> None:
        """Raises DoesNotFitError if a video does not fit."""
        needed = peak(self.plan, self.weights, workload)
        if needed > self.free:
            raise DoesNotFitError(f"it takes {needed / _GB:.1f} GB of GPU memory, {self.free / _GB:.1f} GB are free")


def budget(free: int, weights: Weights, workloads: Iterable[Workload], *, offload: bool = False) -> Budget:
    """The fastest plan for all `workloads` that fit into `free` bytes with some plan. With `offload` the smallest plan.

    Raises:
        DoesNotFitError: no workload fits.
    """
    smallest = Budget(free, weights, SMALLEST)
    in_order = sorted(workloads, key=lambda workload: peak(SMALLEST, weights, workload))
    smallest.check(in_order[0])
    fitting = [workload for workload in in_order if peak(SMALLEST, weights, workload) <= free]
    if offload:
        return smallest
    fastest = next(plan for plan in PLANS if all(peak(plan, weights, workload) <= free for workload in fitting))
    return Budget(free, weights, fastest)
