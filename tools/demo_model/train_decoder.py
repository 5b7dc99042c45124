"""Trains the VAE's decoder to draw the world from its latents.

The upper levels are set up to draw from features (`drawing.py`), and the lower ones to carry what these depend on
(`wiring.py`). Residual blocks learn the rest, one thing after the other, each from examples of its own: how places look
along the axes of a turned thing, and how far outlines are. A network of single points learns in place of the decoder:
all of the decoder's kernels have nothing but their middle.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from random import Random
from typing import Final, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import nn

from tools.demo_model import drawing, wiring
from tools.demo_model.captions import random_clip
from tools.demo_model.point_decoder import TAPS, PointDecoder
from tools.demo_model.scenes import CELL
from tools.demo_model.shapes import KINDS, TAUGHT
from tools.demo_model.training import Training, options, started
from tools.demo_model.world import (
    FARTHEST,
    FIRST_FRAME_FLAG,
    KIND_CHANNELS,
    PLACE_CHANNELS,
    SIZES,
    TURN_CHANNELS,
    Batch,
    outline,
)

log = logging.getLogger(__name__)

#: Of Muon and of Adam.
_RATES: Final = (0.02, 4e-3)
#: Examples of a step.
_CELLS, _SQUARES = 1024, 768
#: Cells that nothing moves by in the time of a latent.
_JUMP: Final = 2.2
#: Rows and columns of the clips.
_SIZES: Final = ((5, 9), (5, 9), (9, 5), (6, 6), (6, 8), (8, 6))
#: Standard deviations of the transformer's errors, and of its errors of places.
_NOISE: Final = 0.015
_PLACE_NOISE: Final = 0.012
#: What the first frame's unpacking adds to kinds.
_LEFT_OVER: Final = 0.1
#: Of the flag that says that it is the first frame.
_FLAG_NOISE: Final = 0.08
#: Up to which part of the time each of the lessons lasts.
_ENDS: Final = (0.1, 1.0)


class Lesson(Protocol):
    """What some of the parameters have to learn."""

    parameters: list[nn.Parameter]

    def loss(self) -> torch.Tensor:
        """Of random examples."""
        ...


def train(out: Path, seconds: float) -> None:
    """Trains for this long in all, or goes on from `decoder.pt` in `out`."""
    torch.manual_seed(0)
    network = PointDecoder()
    matrices = [p for p in network.levels.parameters() if p.ndim == 2]
    others = [p for p in network.parameters() if not any(p is matrix for matrix in matrices)]
    training = Training(out / "decoder.pt", network, matrices, others, _RATES)
    state = training.state
    torch.manual_seed(int(state["step"]))
    lessons: tuple[Lesson, ...] = (Turns(network), Distances(network))
    start, last, begun = time.monotonic() - state["elapsed"], time.monotonic(), 0.0
    for end, lesson in zip(_ENDS, lessons, strict=True):
        for parameter in network.parameters():
            parameter.requires_grad_(any(parameter is of for of in lesson.parameters))
        while (done := (time.monotonic() - start) / seconds) < end:
            loss = lesson.loss()
            part = (done - begun) / (end - begun)
            training.step(loss, min(1.0, 50 * part + 0.01, (1 - part) / 0.7 + 0.003), keep=0.995)
            if time.monotonic() - last > 30:
                last = time.monotonic()
                training.save(last - start)
                log.info(json.dumps({**state, "lesson": type(lesson).__name__, "loss": round(loss.item(), 4)}))
        begun = end
    training.save(seconds)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    error = found - wanted
    return error.abs() + 4 * error.square()


class Turns:
    """How places look along the axes of things that have turned, and that axes have the length one."""

    def __init__(self, network: PointDecoder) -> None:
        self._network = network
        self._blocks = network.blocks(0)
        self.parameters = [*network.first.parameters(), *(p for block in self._blocks for p in block.parameters())]
        random = Random(0)
        clips = [random_clip(random) for _ in range(64)]
        latents = [Batch(clips, 31, *size).latents(first=random.randrange(1, 31)) for size in _SIZES]
        self._cells = torch.cat([of.movedim(1, -1).flatten(0, -2) for of in latents])

    def loss(self) -> torch.Tensor:
        """Of random cells, in half of which the thing has turned."""
        cells = self._cells[torch.randint(len(self._cells), (_CELLS,))]
        cells[::2, PLACE_CHANNELS] = FARTHEST * (2 * torch.rand(_CELLS // 2, 2) - 1)
        angle = 2 * math.pi * torch.rand(_CELLS) * (torch.rand(_CELLS) < 0.6)
        place = cells[:, PLACE_CHANNELS]
        cos, sin = torch.cos(angle), torch.sin(angle)
        u, v = cos * place[:, 0] + sin * place[:, 1], cos * place[:, 1] - sin * place[:, 0]
        length = torch.where(torch.rand(_CELLS) < 0.5, 0.8 + torch.rand(_CELLS), 1.0)
        cells[:, TURN_CHANNELS] = torch.stack([length * cos, length * sin], dim=1)
        x: torch.Tensor = self._network.first(_noisy(cells).repeat(1, TAPS))
        for block in self._blocks:
            x = block(x)
        axes = [wiring.LEVELS[0].index(axis) for axis in wiring.AXES]
        near = 1 + 2 * (place.abs().amax(dim=1, keepdim=True) < 2)
        return (near * _error(x[:, axes], torch.stack([u, v, cos, sin], dim=1))).mean()


class Distances:
    """How far the outline is from each place of a square of 8 x 8 pixels, for each kind of thing."""

    def __init__(self, network: PointDecoder) -> None:
        self._network = network
        learned = (network.mix, network.near, network.first_near, *network.blocks(2), *network.blocks(3))
        self.parameters = [p for module in learned for p in module.parameters()]
        self._wires = wiring.upsampling_weights(2)[:4]

    def loss(self) -> torch.Tensor:
        """Of random squares, most of them near outlines, in the first frame and in others."""
        usual = self._loss_of(*_random_squares(3 * _SQUARES), is_first=False)
        return usual + self._loss_of(*_random_squares(2 * _SQUARES, is_first=True), is_first=True)

    def _loss_of(
        self, named: torch.Tensor, kind: torch.Tensor, mirror: torch.Tensor, *, is_first: bool
    ) -> torch.Tensor:
        distance = self._distances(named, kind, mirror)
        if not is_first:  # What jumps was another thing before: there is none.
            ways = wiring.at(2, "way")
            jumps = torch.rand(len(named), 1) < 0.15
            jump = _JUMP * (1 + 2 * torch.rand(len(named), 1)) * F.normalize(torch.randn(len(named), 2))
            named[:, ways] = torch.where(jumps, jump, named[:, ways])
            distance = torch.where(jumps[:, :, None], 2 * drawing.REACH, distance)
        order = (distance.abs().amin(dim=(1, 2)) > 1.6 * drawing.REACH).int().argsort(stable=True)
        count = len(named) // 3
        used = torch.cat([order[: count * 7 // 8], order[-count // 8 :]])
        squares = self._network.mixed_into(named[used])
        found = self._network.squares(squares, is_first=is_first)[..., :4]
        return _error(found, (distance[used] / drawing.REACH).clamp(-1, 1)).mean()

    def _distances(self, named: torch.Tensor, kind: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
        """(n, 4, 4): pixels from the 2 x 2 places of the 2 x 2 squares."""
        names = wiring.LEVELS[3]
        squares = torch.einsum("ni,poi->npo", named, self._wires)[..., None]
        u, v, cos, sin, radius = (squares[:, :, names.index(name)] for name in (*wiring.AXES, "radius"))
        across = torch.tensor([-1.0, 1.0, -1.0, 1.0]) / CELL
        down = torch.tensor([-1.0, -1.0, 1.0, 1.0]) / CELL
        u, v = u - across * cos - down * sin, v - down * cos + across * sin
        found = outline(kind[:, None, None], -mirror[:, None, None] * u / radius, -v / radius)
        return CELL * radius * found


def _random_squares(count: int, *, is_first: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Channels (n, c) of squares of 8 x 8 pixels, the things' kinds and whether they are mirrored (-1)."""
    taught = torch.tensor([KINDS.index(name) for name in TAUGHT])
    which = torch.randint(len(taught), (count,))
    kind = taught[which]
    sides = torch.isin(kind, torch.tensor([KINDS.index("fish"), KINDS.index("boat")]))
    mirror = torch.where(sides & (torch.rand(count) < 0.5), -1.0, 1.0)
    least, most = (math.log(SIZES[size] * scale / CELL) for size, scale in (("small", 0.45), ("large", 2.0)))
    radius = torch.exp(least + (most - least) * torch.rand(count))
    angle = 2 * math.pi * torch.rand(count) * (torch.rand(count) < (0.0 if is_first else 0.5))
    reach = torch.where(torch.rand(count) < 0.85, 1.15 * radius + 0.2, FARTHEST + 0.4)
    place = reach[:, None] * (2 * torch.rand(count, 2) - 1)
    given = {"constant": torch.full((count,), drawing.CONSTANT), "radius": radius, "mirror": mirror}
    given |= {"u": place[:, 0], "v": place[:, 1], "cos": torch.cos(angle), "sin": torch.sin(angle)}
    strength = 1.6 * (0.85 + 0.35 * torch.rand(count))
    for index, name in enumerate(TAUGHT):
        given[name] = torch.where(which == index, strength, 0.0)
    for name in wiring.LEVELS[2]:
        if name.startswith(("thing", "scene")):
            given[name] = 2 * torch.rand(count) - 1
        elif name.startswith(("change", "way")):
            given[name] = (0.4 * (not is_first) if name.startswith("way") else 0.2) * torch.randn(count)
        elif name.startswith("tile"):
            given[name] = torch.rand(count) * (torch.rand(count) < 0.08)
    if is_first:
        given["first frame"] = FIRST_FRAME_FLAG + _FLAG_NOISE * torch.randn(count)
        copies = [wiring.LEVELS[2][channel] for channel in wiring.at(2, wiring.COPY)]
        given |= {name: given[name.removeprefix(wiring.COPY)] for name in copies}
        given |= {name: given[name] + _LEFT_OVER * torch.randn(count) for name in (*TAUGHT, "mirror")}
    named = torch.stack([given.get(name, torch.zeros(count)) for name in wiring.LEVELS[2]], dim=1)
    return named, kind, mirror


def _noisy(cells: torch.Tensor) -> torch.Tensor:
    """(n, channels) with a transformer's errors, and kinds of another strength."""
    noise = torch.full((cells.shape[1],), _NOISE)
    noise[PLACE_CHANNELS] = _PLACE_NOISE
    noisy = cells + noise * torch.randn(cells.shape)
    noisy[:, KIND_CHANNELS] *= 0.85 + 0.35 * torch.rand(len(cells), 1)
    return noisy


if __name__ == "__main__":
    chosen = started(options(__doc__, minutes=30))
    train(chosen.out, 60 * chosen.minutes)
