"""Trains the VAE's decoder to draw the world from its latents.

The upper levels are set up to draw from features (`drawing.py`), and the lower ones to carry what these depend on
(`wiring.py`). Residual blocks learn the rest, one thing after another, each from examples of its own: how places look
along the axes of a turned thing, how far outlines are, and how the first frame differs. A network of single points
learns in place of the decoder: all of the decoder's kernels have nothing but their middle.
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
from tools.demo_model.point_decoder import TAPS, PointDecoder, neighbourhoods, quarters
from tools.demo_model.scenes import CELL
from tools.demo_model.shapes import KINDS, TAUGHT
from tools.demo_model.training import Training, command
from tools.demo_model.world import (
    FARTHEST,
    FIRST_FRAME_CHANNEL,
    FPS,
    KIND_CHANNELS,
    PLACE_CHANNELS,
    SIZES,
    TEMPORAL,
    TURN_CHANNELS,
    Batch,
    outline,
)

log = logging.getLogger(__name__)

#: Of Muon and of Adam.
_RATES: Final = (0.02, 4e-3)
#: Examples of a step.
_CELLS, _SQUARES, _FIRST_CELLS = 1024, 768, 384
#: Seconds for collecting cells of first frames.
_COLLECTING: Final = 100.0
#: Cells that nothing moves by in the time of a latent.
_JUMP: Final = 2.2
#: Rows and columns of the clips.
_SIZES: Final = ((5, 9), (5, 9), (9, 5), (6, 6), (6, 8), (8, 6))
#: Standard deviations of the transformer's errors in single cells, of places among them, and of what cells share.
_OWN_NOISE: Final = 0.007
_PLACE_NOISE: Final = 0.012
_SHARED_NOISE: Final = 0.03
#: Up to which part of the time each of the three lessons lasts. In the rest, the last two are learned together.
_ENDS: Final = (0.1, 0.45, 0.75)


class Lesson(Protocol):
    """What some of the parameters have to learn."""

    parameters: list[nn.Parameter]

    def loss(self) -> torch.Tensor:
        """Of random examples."""
        ...


def train(out: Path, seconds: float, trained: Path | None = None) -> None:
    """Trains for this long in all, or goes on from `decoder.pt` in `out`.

    `trained` is not used: a decoder is trained in half an hour.
    """
    del trained
    torch.manual_seed(0)
    network = PointDecoder()
    matrices = [p for p in network.levels.parameters() if p.ndim == 2]
    others = [p for p in network.parameters() if not any(p is matrix for matrix in matrices)]
    training = Training(out / "decoder.pt", network, matrices, others, _RATES)
    state = training.state
    torch.manual_seed(int(state["step"]))
    turns, distances, firsts = Turns(network), Distances(network), FirstFrames(network)
    start, last, begun = time.monotonic() - state["elapsed"], time.monotonic(), 0.0
    plan: list[list[Lesson]] = [[turns], [distances], [firsts], [distances, firsts]]
    for end, lessons in zip((*_ENDS, 1.0), plan, strict=True):
        for parameter in network.parameters():
            parameter.requires_grad_(any(parameter is of for lesson in lessons for of in lesson.parameters))
        while (done := (time.monotonic() - start) / seconds) < end:
            loss = torch.stack([lesson.loss() for lesson in lessons]).sum()
            part = (done - begun) / (end - begun)
            training.step(loss, min(1.0, 50 * part + 0.01, (1 - part) / 0.7 + 0.003), keep=0.995)
            if time.monotonic() - last > 30:
                last = time.monotonic()
                training.save(last - start)
                names = [type(lesson).__name__ for lesson in lessons]
                log.info(json.dumps({**state, "lessons": names, "loss": round(loss.item(), 4)}))
        begun = end
    training.save(seconds)


def _error(found: torch.Tensor, wanted: torch.Tensor, matters: torch.Tensor | float = 1.0) -> torch.Tensor:
    error = found - wanted
    return (matters * (error.abs() + 4 * error.square())).mean()


class Turns:
    """How places look along the axes of things that have turned, and that axes have the length one."""

    def __init__(self, network: PointDecoder) -> None:
        self._network = network
        self._blocks = network.blocks(0)[:2]
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
        x: torch.Tensor = self._network.first(_noisy(cells[:, None, None].repeat(1, 1, TAPS, 1))[:, 0].flatten(1))
        for block in self._blocks:
            x = block(x)
        axes = [wiring.LEVELS[0].index(f"{whose}{axis}") for whose in ("", "own ") for axis in wiring.AXES]
        wanted = torch.stack([u, v, cos, sin], dim=1).repeat(1, 2)
        near = 1 + 2 * (place.abs().amax(dim=1, keepdim=True) < 2)
        return _error(x[:, axes], wanted, near)


class Distances:
    """How far the outline is from each place of a square of 8 x 8 pixels, for each kind of thing."""

    def __init__(self, network: PointDecoder) -> None:
        self._network = network
        blocks = network.blocks(2) + network.blocks(3)
        usual = [p for block in blocks if block.usual for p in (*block.usual.parameters(), block.gamma, block.bias)]
        self.parameters = [*network.mix.parameters(), *network.near.parameters(), *usual]
        self._wires = network.get_buffer("wires 2")[:4, :, : len(wiring.LEVELS[2])]

    def loss(self) -> torch.Tensor:
        """Of random squares, most of them near outlines. What jumps was another thing before: there is none."""
        named, kind, mirror = _random_squares(3 * _SQUARES)
        distance = self._distances(named, kind, mirror)
        ways = [wiring.LEVELS[2].index(name) for name in ("way u", "way v")]
        jumps = torch.rand(len(named), 1) < 0.15
        named[:, ways] = torch.where(jumps, _JUMP * F.normalize(torch.randn(len(named), 2)), named[:, ways])
        named[:, ways] *= torch.where(jumps, 1 + 2 * torch.rand(len(named), 1), 1.0)
        distance = torch.where(jumps[:, :, None], 2 * drawing.REACH, distance)
        order = (distance.abs().amin(dim=(1, 2)) > 1.6 * drawing.REACH).int().argsort(stable=True)
        used = torch.cat([order[: _SQUARES * 7 // 8], order[-_SQUARES // 8 :]])
        found = self._network.squares(named[used])[..., :4]
        return _error(found, (distance[used] / drawing.REACH).clamp(-1, 1))

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


def _random_squares(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Named channels (n, c) of squares of 8 x 8 pixels, the things' kinds and whether they are mirrored (-1)."""
    taught = torch.tensor([KINDS.index(name) for name in TAUGHT])
    which = torch.randint(len(taught), (count,))
    kind = taught[which]
    sides = torch.isin(kind, torch.tensor([KINDS.index("fish"), KINDS.index("boat")]))
    mirror = torch.where(sides & (torch.rand(count) < 0.5), -1.0, 1.0)
    least, most = (math.log(SIZES[size] * scale / CELL) for size, scale in (("small", 0.45), ("large", 2.0)))
    radius = torch.exp(least + (most - least) * torch.rand(count))
    angle = 2 * math.pi * torch.rand(count) * (torch.rand(count) < 0.5)
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
            given[name] = (0.4 if name.startswith("way") else 0.2) * torch.randn(count)
        elif name.startswith("tile"):
            given[name] = torch.rand(count) * (torch.rand(count) < 0.08)
    named = torch.stack([given.get(name, torch.zeros(count)) for name in wiring.LEVELS[2]], dim=1)
    return named, kind, mirror


class FirstFrames:
    """What the first frame's upsampling makes of all that is carried, and how to repair it."""

    def __init__(self, network: PointDecoder) -> None:
        self._network, self._random = network, Random(0)
        blocks = [block for level in range(4) for block in network.blocks(level)]
        self.parameters = [p for block in blocks if block.gated for p in block.gated.parameters()]
        self.parameters += [p for block in blocks if not block.usual for p in (block.gamma, block.bias)]
        parts: list[list[_Cells]] = [[] for _ in range(1 + TEMPORAL)]
        end = time.monotonic() + _COLLECTING
        while not parts[0] or time.monotonic() < end:
            parts[0] += [_cells(self._random, None) for _ in range(TEMPORAL)]
            for frame in range(TEMPORAL):
                parts[1 + frame].append(_cells(self._random, frame))
        self._examples = [[torch.cat(of) for of in zip(*part, strict=True)] for part in parts]

    def loss(self) -> torch.Tensor:
        """Of random cells of first frames, and of a few others, for which all has to stay as it is."""
        other = self._random.randrange(TEMPORAL)
        return self._error(None, _FIRST_CELLS) + self._error(other, _FIRST_CELLS // 4)

    def _error(self, frame: int | None, count: int) -> torch.Tensor:
        examples = self._examples[0 if frame is None else 1 + frame]
        chosen = torch.randint(len(examples[0]), (count,))
        seen, wanted, matters = (of[chosen].float() for of in examples)
        if frame is None:
            seen[..., FIRST_FRAME_CHANNEL] += 0.08 * torch.randn(count, 1, 1)
        else:
            seen[::2, ..., TURN_CHANNELS] *= 0.7 + 1.2 * torch.rand(len(seen[::2]), 1, 1, 1)
        return _error(self._network(_noisy(seen), frame)[..., : drawing.FEATURES], wanted, matters)


#: What a cell and its neighbours are in three latents, the features that are wanted, and where these matter.
_Cells = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _cells(random: Random, frame: int | None) -> _Cells:
    """The interesting cells of some clips, in 16 bits, at one of the frames of a latent, or at the first frame."""
    latent = 0 if frame is None else random.choice((1, 2, random.randrange(3, 31)))
    picture = 0 if frame is None else TEMPORAL * (latent - 1) + 1 + frame
    batch = Batch([random_clip(random) for _ in range(8)], latent + 1, *random.choice(_SIZES))
    used = _near_outlines(batch, picture) | (torch.rand(8, batch.rows, batch.columns) < 0.25)
    seen = neighbourhoods(batch.latents(max(latent - 2, 0)))[:, :, :, :, -1].permute(0, 4, 5, 1, 2, 3)
    wanted, matters = (quarters(of[:, :, 0]) for of in drawing.features(batch, picture, picture + 1))
    return seen[used].half(), wanted[used].half(), matters[used].half()


def _near_outlines(batch: Batch, picture: int) -> torch.Tensor:
    """(B, h, w): whether an outline is in the cell or close to it in this frame."""
    distances = batch.distances(torch.tensor([picture / FPS]), CELL // 4).amin(dim=1).abs()
    return -F.max_pool2d(-distances, 4)[:, 0] < 2.5 * drawing.REACH


def _noisy(seen: torch.Tensor) -> torch.Tensor:
    """(n, latents, taps, channels) with a transformer's errors: of each, of all, and kinds of another strength."""
    count, channels = len(seen), seen.shape[-1]
    noise = _OWN_NOISE * torch.randn(seen.shape)
    noise[..., PLACE_CHANNELS] *= _PLACE_NOISE / _OWN_NOISE
    seen = seen + noise + _SHARED_NOISE * torch.rand(count, 1, 1, 1) * torch.randn(count, 1, 1, channels)
    seen[..., KIND_CHANNELS] *= 0.85 + 0.35 * torch.rand(count, 1, 1, 1)
    return seen


if __name__ == "__main__":
    command(train, __doc__, minutes=30)
