"""Where each part of a model lives, from the GPU memory that is free: arithmetic, and nothing but.

Parts are RESIDENT on the GPU, or STREAMED: kept in host memory and brought over block by block, the next one while
this one computes. At real size a transformer pass takes seconds, its 17 GB less than one over PCIe 4 x16, so streaming
hides behind the arithmetic; the text encoders run once for each prompt.

The figures for activations are calculated from shapes, not measured; `benchmarks/gpu.py --vram-limit` holds them
against a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

_GB: Final = 1e9
#: What CUDA, its libraries' workspaces and PyTorch's fragmentation take.
_OVERHEAD: Final = 1.0 * _GB
#: Tensors of one activation's size that a block has alive at its peak: stream, joint query, key and value, attention's
#: output, and room for chunks of what lies between (`blocks.CHUNK`) and for what step caching keeps.
_BLOCK_TENSORS: Final = 8
#: The same in the VAE decoder's widest level: input, its padded copy, output, residual.
_DECODER_TENSORS: Final = 4
#: The part of a tile that is blended with each of its neighbours.
_SEAM: Final = 0.25
#: Sides in pixels of the VAE's tiles, from fast to small.
TILES: Final = (256, 192, 128)


class Placement(StrEnum):
    """Where a part's weights are."""

    RESIDENT = "resident"
    STREAMED = "streamed"


class DoesNotFitError(Exception):
    """Not even with everything streamed and the smallest tiles."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parts. `block` is the largest of a transformer's repeated blocks."""

    text_encoders: int
    transformers: Sequence[int]
    vae: int
    block: int


@dataclass(frozen=True)
class Workload:
    """What a video comes to: frames, and (width, height) in pixels of its largest stage.

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
        """Latent tokens of the largest stage: 16 x 16 pixels and four frames each, the first frame on its own."""
        return ((self.num_frames - 1) // 4 + 1) * (self.size[0] // 16) * (self.size[1] // 16)

    @property
    def denoising(self) -> int:
        """Bytes of activations in a transformer pass."""
        return self.tokens * self.width * self.itemsize * _BLOCK_TENSORS

    def decoding(self, tile: int) -> int:
        """Bytes of activations in a tiled decode: a tile, its pixels on their way to uint8, seams of a row of tiles."""
        in_tile = tile * tile * self.num_frames * self.channels * self.itemsize * _DECODER_TENSORS
        pixels = tile * tile * self.num_frames * 3 * (self.itemsize + 2 * 4)  # and two copies in float32
        seams = int(_SEAM * tile * (self.size[0] + tile) * 2) * self.num_frames * 3 * self.itemsize  # of two rows
        return in_tile + pixels + seams


@dataclass(frozen=True)
class Plan:
    """Where each part is, and the side of the VAE's tiles in pixels."""

    text_encoders: Placement
    transformers: Placement
    vae: Placement
    tile: int

    def __str__(self) -> str:
        return (
            f"text encoders {self.text_encoders}, transformers {self.transformers}, VAE {self.vae} "
            f"with tiles of {self.tile}"
        )


#: From fast to small. The text encoders run once a prompt; smaller tiles cost less than streaming a transformer.
PLANS: Final = tuple(
    Plan(text, transformers, vae, tile)
    for text, transformers, vae in (
        (Placement.RESIDENT, Placement.RESIDENT, Placement.RESIDENT),
        (Placement.STREAMED, Placement.RESIDENT, Placement.RESIDENT),
        (Placement.STREAMED, Placement.STREAMED, Placement.RESIDENT),
        (Placement.STREAMED, Placement.STREAMED, Placement.STREAMED),
    )
    for tile in TILES
)
#: No other takes less, whatever is rendered.
SMALLEST: Final = PLANS[-1]


def peak(plan: Plan, weights: Weights, workload: Workload) -> int:
    """Bytes at the stage that takes most. A streamed part takes two of its blocks while it runs, else none."""
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
    """A plan that was carried out, and the bytes that it was made for."""

    free: int
    weights: Weights
    plan: Plan

    def check(self, workload: Workload) -> None:
        """Whether a job fits.

        Raises:
            DoesNotFitError: it does not.
        """
        takes = peak(self.plan, self.weights, workload)
        if takes > self.free:
            raise DoesNotFitError(f"it takes {takes / _GB:.1f} GB of GPU memory, {self.free / _GB:.1f} GB are free")


def budget(free: int, weights: Weights, workloads: Iterable[Workload], *, offload: bool = False) -> Budget:
    """The fastest plan for every one of `workloads` that fits into `free` bytes at all; with `offload` the smallest.

    Raises:
        DoesNotFitError: none of them fits.
    """
    smallest = Budget(free, weights, SMALLEST)
    in_order = sorted(workloads, key=lambda workload: peak(SMALLEST, weights, workload))
    smallest.check(in_order[0])
    fitting = [workload for workload in in_order if peak(SMALLEST, weights, workload) <= free]
    if offload:
        return smallest
    fastest = next(plan for plan in PLANS if all(peak(plan, weights, workload) <= free for workload in fitting))
    return Budget(free, weights, fastest)
