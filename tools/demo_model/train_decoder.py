"""Trains the VAE's decoder to draw the world from its latents.

The upper levels are set up to draw from features (`drawing.py`). The lower ones learn to give these features: single
cells of many clips, and in them single frames, by a network that has only the middle of each kernel. It sees a hundred
times more cells in a second than the whole decoder would.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import nn

from tools.demo_model import drawing
from tools.demo_model.captions import random_clip
from tools.demo_model.training import Training, command
from tools.demo_model.world import (
    CELL,
    COVER_CHANNELS,
    FPS,
    KIND_CHANNELS,
    LATENT_CHANNELS,
    TEMPORAL,
    TURN_CHANNELS,
    Batch,
)

log = logging.getLogger(__name__)

#: Seconds for collecting cells.
_COLLECTING: Final = 300.0
#: Of Muon and of Adam.
_RATES: Final = (0.02, 4e-3)
#: Rows and columns of the clips.
_SIZES: Final = ((5, 9), (5, 9), (9, 5), (6, 6), (6, 8), (8, 6))
#: Cells of a batch, near an outline and elsewhere, from each of so many of the groups.
_NEAR: Final = 512
_FAR: Final = 128
_GROUPS: Final = 3
#: Pixels from an outline to which a cell is near it.
_REACH: Final = 10.0
#: The part of the cells elsewhere that is kept, because they are many and alike.
_KEPT: Final = 0.25
#: What the first convolution sees of its kernel, time first: a cell with its neighbours, and it in the frames before.
_TAPS: Final = (*((2, row, column) for row in range(3) for column in range(3)), (1, 1, 1), (0, 1, 1))
_MIDDLE: Final = (2, 1, 1)
#: Channels of the three levels up to the features, before each upsampling, and of the features.
_WIDTHS: Final = (64, 64, 32, drawing.FEATURES)
#: Residual blocks of these levels.
_BLOCKS: Final = (3, 1, 1, 1)


class _Block(nn.Module):
    """A residual block of the decoder, for single points."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gammas = nn.ParameterList([nn.Parameter(torch.ones(width)) for _ in range(2)])
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.first(F.silu(self._norm(x, 0)))
        found: torch.Tensor = x + self.second(F.silu(self._norm(inner, 1)))
        return found

    def _norm(self, x: torch.Tensor, index: int) -> torch.Tensor:
        normed: torch.Tensor = F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * self.gammas[index]
        return normed


class PointDecoder(nn.Module):
    """The decoder's levels up to the features, with the middle of each kernel alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(len(_TAPS) * LATENT_CHANNELS, _WIDTHS[0])
        self.levels = nn.ModuleList(
            nn.Sequential(*(_Block(width) for _ in range(count))) for width, count in zip(_WIDTHS, _BLOCKS, strict=True)
        )
        self.ups = nn.ModuleList(nn.Linear(wide, 8 * narrow) for wide, narrow in pairwise(_WIDTHS))
        with torch.no_grad():
            self.first.weight *= 0.5

    def forward(self, seen: torch.Tensor, frame: int | None, quarters: Sequence[int] = (0, 1, 2, 3)) -> torch.Tensor:
        """(n, taps, channels) to (n, 4, 4, 4, FEATURES): the quarters of quarters of the `quarters` of each cell.

        `frame` is one of the latent's eight, or None for the only one of the first latent.
        """
        seen = seen.clone()
        seen[..., COVER_CHANNELS] = 0
        x: torch.Tensor = self.levels[0](self.first(seen.flatten(1)))
        for index, (up, level) in enumerate(zip(self.ups, self.levels[1:], strict=True)):
            x = _upsampled(x, up, None if frame is None else frame >> (2 - index) & 1)
            x = level(x if index > 0 else x[:, list(quarters)])
        return x


def _upsampled(x: torch.Tensor, up: Any, half: int | None) -> torch.Tensor:
    """(..., channels) to (..., 4, fewer channels) as `HunyuanVideo15Upsample` does it, in one half of the time."""
    weight, bias = up.weight.view(8, -1, x.shape[-1]), up.bias.view(8, -1)
    used = slice(0, 8, 2) if half is None else slice(4 * half, 4 * half + 4)
    same = torch.unflatten(x, -1, (4, -1)) if half is None else torch.unflatten(x, -1, (8, -1))[..., used, :]
    found: torch.Tensor = torch.einsum("...i,poi->...po", x, weight[used]) + bias[used]
    return found + same.repeat_interleave(found.shape[-1] // same.shape[-1], dim=-1)


def train(out: Path, seconds: float, trained: Path | None = None) -> None:
    """Collects cells and trains for this long in all, or goes on from `decoder.pt` in `out`, with other cells.

    `trained` is not used: a decoder is trained in an hour.
    """
    del trained
    torch.manual_seed(0)
    network = PointDecoder()
    matrices = [p for p in network.levels.parameters() if p.ndim == 2]
    others = [p for p in network.parameters() if not any(p is matrix for matrix in matrices)]
    training = Training(out / "decoder.pt", network, matrices, others, _RATES)
    state = training.state
    random = Random(state["step"])
    groups = _collect(random, _COLLECTING)
    start, last = time.monotonic() - state["elapsed"], time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        chosen = [groups[0], *random.sample(groups[1:], _GROUPS - 1)]  # the first frame is the hardest
        loss = torch.stack([group.loss(network, random) for group in chosen]).mean()
        share = min(1.0, (state["step"] + 1) / 200, (1 - elapsed / seconds) / 0.7 + 0.003)
        training.step(loss, share, keep=0.995)
        if time.monotonic() - last > 60:
            last = time.monotonic()
            training.save(elapsed)
            log.info(json.dumps({**state, "minutes": round(elapsed / 60, 1), "loss": round(loss.item(), 4)}))
    training.save(seconds)


class _Cells:
    """Cells at one of the frames of their latent (None: the first latent's), and the features that are wanted there."""

    def __init__(self, frame: int | None) -> None:
        self._frame = frame
        self._parts: list[tuple[torch.Tensor, ...]] = []

    def add(self, random: Random) -> None:
        """Some cells of some clips, in 16 bits."""
        batch, latent = _clips(random, self._frame)
        seen = neighbourhoods(batch.latents(max(latent - 2, 0)))[:, :, :, -1]  # (B, taps, C, h, w)
        picture = TEMPORAL * (latent - 1) + 1 + self._frame if self._frame is not None else 0
        near = near_outlines(batch, torch.tensor([picture / FPS]))[:, 0]
        used = near | (torch.rand(near.shape) < _KEPT)
        wanted, matters = (quarters(of[:, :, 0])[used].half() for of in drawing.features(batch, picture, picture + 1))
        self._parts.append((seen.permute(0, 3, 4, 1, 2)[used].half(), wanted, matters, near[used]))

    def finish(self) -> None:
        """Before the first loss."""
        seen, wanted, matters, near = (torch.cat(part) for part in zip(*self._parts, strict=True))
        self._parts.clear()
        self._kinds = [((seen[of], wanted[of], matters[of]), size) for of, size in ((near, _NEAR), (~near, _FAR))]

    def loss(self, network: nn.Module, random: Random) -> torch.Tensor:
        """Of two quarters of random cells near outlines and elsewhere, with noise in the latents."""
        chosen = [(torch.randint(len(kept[0]), (size,)), kept) for kept, size in self._kinds]
        seen, wanted, matters = (torch.cat([kept[i][of] for of, kept in chosen]).float() for i in range(3))
        quarters = random.sample(range(4), 2)
        error = network(_noisy(seen), self._frame, quarters) - wanted[:, quarters]
        loss: torch.Tensor = (matters[:, quarters] * (error.abs() + 4 * error.square())).mean()
        return loss


def _collect(random: Random, seconds: float) -> list[_Cells]:
    """Cells of each frame, collected for this long."""
    groups = [_Cells(frame) for frame in (None, *range(TEMPORAL))]
    end = time.monotonic() + seconds
    while True:
        for group in groups:
            group.add(random)
        if time.monotonic() > end:
            break
    for group in groups:
        group.finish()
    return groups


def _clips(random: Random, frame: int | None) -> tuple[Batch, int]:
    """Clips, and which of their latents, the last, is looked at."""
    latent = 0 if frame is None else random.randrange(1, 31)
    return Batch([random_clip(random) for _ in range(8)], latent + 1, *random.choice(_SIZES)), latent


def neighbourhoods(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, T, h, w) to (B, taps, C, T, h, w), with the decoder's padding."""
    frames, rows, columns = latents.shape[2:]
    padded = F.pad(latents, (1, 1, 1, 1, 2, 0), mode="replicate")
    return torch.stack([padded[:, :, t : t + frames, y : y + rows, x : x + columns] for t, y, x in _TAPS], dim=1)


def near_outlines(batch: Batch, seconds: torch.Tensor) -> torch.Tensor:
    """(B, T, h, w): whether an outline is in the cell or close to it."""
    distances = batch.distances(seconds, CELL // 4).amin(dim=1).abs()
    return -F.max_pool2d(-distances, 4) < _REACH


def quarters(features: torch.Tensor) -> torch.Tensor:
    """(B, F, 8h, 8w) to (B, h, w, 4, 4, 4, F): sides are halved three times, as the decoder's levels double them."""
    batch, count, height, width = features.shape
    split = features.view(batch, count, height // 8, 2, 2, 2, width // 8, 2, 2, 2)
    return split.permute(0, 2, 6, 3, 7, 4, 8, 5, 9, 1).flatten(7, 8).flatten(5, 6).flatten(3, 4)


def _noisy(seen: torch.Tensor) -> torch.Tensor:
    """With the errors of a transformer: noise that neighbours share, noise of their own, lengths that are not right."""
    count, taps, channels = seen.shape
    level = 0.15 * torch.rand(count, 1, 1)
    seen = seen + 0.7 * level * (torch.randn(count, 1, channels) + torch.randn(count, taps, channels))
    for part, least, most in ((KIND_CHANNELS, 0.6, 1.1), (TURN_CHANNELS, 0.6, 2.0)):
        length = least + (most - least) * torch.rand(count, 1, 1)
        seen[..., part] *= torch.where(torch.rand(count, 1, 1) < 0.5, length, 1.0)
    return seen


@torch.no_grad()
def put(average: dict[str, torch.Tensor], decoder: Any) -> None:
    """Builds the decoder from a trained network and the levels that draw. Its attention does nothing."""
    network = PointDecoder()
    network.load_state_dict(average)
    torch.manual_seed(0)
    drawing.start(decoder)
    kernel, taps = decoder.conv_in.conv.weight, network.first.weight.view(_WIDTHS[0], len(_TAPS), LATENT_CHANNELS)
    kernel.zero_()
    for index, place in enumerate(_TAPS):
        kernel[:, :, *place] = taps[:, index]
    kernel[:, COVER_CHANNELS] = 0
    kernel[:, :, *_MIDDLE] -= torch.eye(LATENT_CHANNELS)  # the decoder adds the latents
    decoder.conv_in.conv.bias.copy_(network.first.bias)
    for parameter in decoder.mid_block.attentions[0].proj_out.parameters():
        parameter.zero_()
    resnets = [*decoder.mid_block.resnets, *(block.resnets[0] for block in decoder.up_blocks[:4])]
    blocks: list[Any] = [block for level in network.levels for block in level.children()]
    for resnet, block in zip(resnets, blocks, strict=True):
        for norm, gamma in zip((resnet.norm1, resnet.norm2), block.gammas, strict=True):
            norm.gamma.copy_(gamma.view_as(norm.gamma))
        _put_middle(block.first, resnet.conv1.conv)
        _put_middle(block.second, resnet.conv2.conv)
    for up, block in zip(network.ups, decoder.up_blocks, strict=False):
        _put_middle(up, block.upsamplers[0].conv.conv)


def _put_middle(linear: Any, convolution: Any) -> None:
    convolution.weight.zero_()
    convolution.weight[:, :, *_MIDDLE] = linear.weight
    convolution.bias.copy_(linear.bias)


if __name__ == "__main__":
    command(train, __doc__, minutes=60)
