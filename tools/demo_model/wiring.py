"""What the decoder's levels below the features start with: channels that have a name, and weights between them.

A cell's latents tell where the centre of the nearest thing is. "u" and "v" tell the same for each of the smaller
squares that a level halves the squares before into: as seen from the square's own middle, along the thing's own axes,
at the moment of the frame. Colours, textures and stars are carried to smaller squares alike. All this is linear, so the
weights are known. Training finds the rest: turned axes, and the distances to outlines. The first frame is
special (`first_frame.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import torch

from tools.demo_model import drawing
from tools.demo_model.scenes import CELL, PATTERNS, TILES, tile_light
from tools.demo_model.shapes import TAUGHT
from tools.demo_model.world import (
    CHANGE_SCALE,
    COLOUR_CHANNELS,
    COLOUR_SCALE,
    FIRST_FRAME_CHANNEL,
    KIND_CHANNELS,
    MIRROR_CHANNEL,
    PATTERN_CHANNELS,
    PATTERN_SCALE,
    PLACE_CHANNELS,
    SCENE_CHANGE_CHANNELS,
    SCENE_COLOUR_CHANNELS,
    SIZE_CHANNEL,
    SIZES,
    TURN_CHANNELS,
)

#: Output, input, weight.
Wire = tuple[str, str, float]
#: Channels of the levels.
WIDTHS: Final = (64, 64, 64, 32)
#: The latents before, and those before these.
_BEFORE: Final = ("", "before: ", "long before: ")

_RGB: Final = ("red", "green", "blue")
AXES: Final = ("u", "v", "cos", "sin")
_THING: Final = tuple(f"thing {part}" for part in _RGB)
_SCENE: Final = tuple(f"scene {part}" for part in _RGB)
_CHANGE: Final = tuple(f"change {part}" for part in _RGB)
_WAY: Final = ("way u", "way v")  # in the time from one latent to the next

#: The tiles of a quarter of a cell, by row and column.
Quarter = frozenset[tuple[tuple[int, int], str]]


def _quarter(pattern: int, row: int, column: int) -> Quarter:
    return frozenset(
        ((y % 2, x % 2), tile) for (y, x), tile in PATTERNS[pattern].items() if (y // 2, x // 2) == (row, column)
    )


_CELL_PATTERNS: Final = tuple(f"pattern {index}" for index in range(len(PATTERNS)))
_QUARTERS: Final = tuple(
    dict.fromkeys(
        quarter
        for pattern in range(len(PATTERNS))
        for place in range(4)
        if (quarter := _quarter(pattern, *divmod(place, 2)))
    )
)
_QUARTER_PATTERNS: Final = tuple(f"quarter {index}" for index in range(len(_QUARTERS)))
_TILES: Final = tuple(f"tile {tile}" for tile in TILES)

#: What training may use: in all frames, and in the first one alone.
LEARNED: Final = "learned"
SPARE: Final = "spare"
#: What a channel has in the first frame, and zero in others.
COPY: Final = "copy of "


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name} {index}" for index in range(count))


def _copies(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{COPY}{name}" for name in names)


def _laid_out(*groups: tuple[Sequence[str], Sequence[int]]) -> tuple[str, ...]:
    """Names at the channels that leave the given remainders when divided by 16, in order."""
    found = [""] * WIDTHS[0]
    for names, remainders in groups:
        channels = [channel for channel in range(len(found)) if channel % 16 in remainders]
        for channel, name in zip(channels, names, strict=False):
            found[channel] = name
    return tuple(found)


# What the first frame's unpacking adds to a channel depends on these remainders. There is no copy of kinds: they add a
# little to the last channels of cells and quarters, where it does no harm. Colours get what is known, zero or small in
# the first frame, lights get a little of tiles, and what is learned and can be learned otherwise gets the rest.
_KINDS_AT: Final = (13, 14, 15)
_OTHERS_AT: Final = range(13)
_COLOURS_GET: Final = range(1, 5)
_LIGHTS_GET: Final = (5, 6)
_CONSTANT_GETS: Final = (7,)
_KNOWN: Final = ("constant", "first frame", "cos", "sin")
_CELLS: Final = ("u", "v", "radius", *_THING, *_SCENE, *_CHANGE, *_CELL_PATTERNS)
_QUARTER_CELLS: Final = ("u", "v", "radius", *_THING, *_SCENE, *_QUARTER_PATTERNS, *_CHANGE)
#: The channels of each level, from cells down.
LEVELS: Final = (
    _laid_out(
        (TAUGHT, _KINDS_AT), ((*_KNOWN, *_CELLS, *_copies(_CELLS), *_numbered(LEARNED, 11), "mirror"), _OTHERS_AT)
    ),
    _laid_out((TAUGHT, _KINDS_AT), ((*_KNOWN, *_WAY, *_QUARTER_CELLS, *_copies(_QUARTER_CELLS), "mirror"), _OTHERS_AT)),
    _laid_out(
        (TAUGHT, _KINDS_AT),
        ((*_numbered(SPARE, 5), *_copies(_CHANGE), *_KNOWN, *_WAY, *_CHANGE[1:]), _COLOURS_GET),
        ((*_TILES, "mirror", _CHANGE[0]), _LIGHTS_GET),
        (("radius", *_THING), _CONSTANT_GETS),
        (("u", "v", *_SCENE, *_numbered(LEARNED, 19)), (0, *range(8, 13))),
    ),
    (*drawing.NAMES, *AXES, "radius", "first frame", *_numbered(LEARNED, 11)),
)


def at(level: int, *beginnings: str) -> list[int]:
    """The channels of a level whose names begin like this."""
    return [channel for channel, name in enumerate(LEVELS[level]) if name.startswith(beginnings)]


def _from_latents() -> Iterator[tuple[str, int, float, bool]]:
    """Channels of cells: name, latent channel, weight, and whether the cells on both sides have the same."""
    yield from ((kind, channel, 1.0, False) for channel, kind in zip(KIND_CHANNELS, TAUGHT, strict=True))
    yield "first frame", FIRST_FRAME_CHANNEL, 1.0, False
    yield "mirror", MIRROR_CHANNEL, 1.0, False
    yield "radius", SIZE_CHANNEL, SIZES["medium"] / CELL / 2, False
    yield from ((name, channel, 1 / COLOUR_SCALE, False) for name, channel in zip(_THING, COLOUR_CHANNELS, strict=True))
    for names, channels, scale in (
        (_SCENE, SCENE_COLOUR_CHANNELS, COLOUR_SCALE),
        (_CHANGE, SCENE_CHANGE_CHANNELS, CHANGE_SCALE),
    ):
        yield from ((name, channel, 1 / scale, True) for name, channel in zip(names, channels, strict=True))
    for axis, channel in zip(AXES, (*PLACE_CHANNELS, *TURN_CHANNELS), strict=True):
        yield axis, channel, 1.0, False
    for index, channel in enumerate(PATTERN_CHANNELS):
        yield f"pattern {index}", channel, 1 / PATTERN_SCALE, len(PATTERNS[index]) > 1


#: Constants of cells.
_BIASES: Final = {"constant": drawing.CONSTANT, "radius": SIZES["medium"] / CELL}


@torch.no_grad()
def start_first(weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Sets all but learned rows in (channels, 3 taps, latent channels): the cells left, at and right of it."""
    names = LEVELS[0]
    own = [channel for channel in range(len(names)) if channel not in at(0, LEARNED)]
    weight[own] = 0
    bias[own] = torch.tensor([_BIASES.get(names[channel], 0.0) for channel in own])
    for name, channel, factor, alike in _from_latents():
        weight[names.index(name), :, channel] = torch.tensor([1 / 3] * 3 if alike else [0.0, 1.0, 0.0]) * factor


def _wires(level: int, row: int, column: int, half: int) -> list[Wire]:
    """From `level` to one of the 2 x 2 places of the next one, in one half of the time."""
    side = 0.5**level  # of the squares, in cells
    x, y = (column - 0.5) * side / 2, (row - 0.5) * side / 2
    kept = ("constant", "first frame", "radius", "mirror", *TAUGHT, *_THING, *_SCENE, *_CHANGE, *_WAY)
    wires: list[Wire] = [(name, name, 1.0) for name in kept if name in LEVELS[level] and name in LEVELS[level + 1]]
    wires += [(scene, change, y) for scene, change in zip(_SCENE, _CHANGE, strict=True)]
    moments = [("", 1.0)]
    if level == 0:
        # The eight frames of a latent are at 1/8 ... 8/8 of the way from the one before, on a parabola through three.
        part = (4 * half + 2.5) / 8
        shares, slopes = (
            (part * (part + 1) / 2, 1 - part**2, part * (part - 1) / 2),
            (part + 0.5, -2 * part, part - 0.5),
        )
        moments = list(zip(_BEFORE, shares, strict=True))
        for source, slope in zip(_BEFORE, slopes, strict=True):
            wires += [(f"way {axis}", f"{source}{axis}", slope) for axis in ("u", "v")]
    else:
        wires += [(axis, f"way {axis}", (half - 0.5) * side / 2) for axis in ("u", "v")]
    for source, share in moments:
        wires += [(axis, f"{source}{axis}", share) for axis in AXES]
        wires += [("u", f"{source}cos", -x * share), ("u", f"{source}sin", -y * share)]
        wires += [("v", f"{source}cos", -y * share), ("v", f"{source}sin", x * share)]
    return wires + list(_lights(level, row, column))


def _lights(level: int, row: int, column: int) -> Iterable[Wire]:
    if level == 0:
        for index, name in enumerate(_CELL_PATTERNS):
            quarter = _quarter(index, row, column)
            if quarter:
                yield _QUARTER_PATTERNS[_QUARTERS.index(quarter)], name, 1.0
    elif level == 1:
        for tiles, name in zip(_QUARTERS, _QUARTER_PATTERNS, strict=True):
            for place, tile in tiles:
                if place == (row, column):
                    yield f"tile {tile}", name, 1.0
    else:
        for tile in TILES:
            light = tile_light(tile)[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            yield from ((f"light {index}", f"tile {tile}", 2 * float(part)) for index, part in enumerate(light))


def upsampling_weights(level: int) -> torch.Tensor:
    """(8, outputs, inputs): the wires from a level to the next, at places in the order half, row and column.

    At the first level, the inputs are those of this latent, of the one before, and of the one before that.
    """
    inputs, outputs = LEVELS[level], LEVELS[level + 1]
    times = _BEFORE if level == 0 else _BEFORE[:1]
    sources = {
        f"{when}{name}": WIDTHS[level] * ago + at for ago, when in enumerate(times) for at, name in enumerate(inputs)
    }
    weight = torch.zeros(8, WIDTHS[level + 1], WIDTHS[level] * len(times))
    for place in range(8):
        for output, name, factor in _wires(level, place // 2 % 2, place % 2, place // 4):
            weight[place, outputs.index(output), sources[name]] += factor
    return weight
