"""What the decoder's levels below the features start with: channels that have a name, and weights between them.

A cell's latents tell where the centre of the nearest thing is. "u" and "v" tell the same for each of the smaller
squares that a level halves the squares before into: as seen from the square's own middle, along the thing's own axes,
at the moment of the frame. Colours, textures and stars are carried to smaller squares alike. All this is linear, so the
weights are known, and exact but in the video's first frame, which `HunyuanVideo15Upsample` unpacks in another way.
Training finds the rest: turned axes, the distances to outlines, and the first frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
#: Inputs of the latent before, and of the one before that.
BEFORE: Final = ("", "before: ", "long before: ")

_RGB: Final = ("red", "green", "blue")
AXES: Final = ("u", "v", "cos", "sin")
_SAME: Final = (
    *("constant", "first frame", "radius", "mirror"),
    *TAUGHT,
    *(f"thing {part}" for part in _RGB),
)
_SHADES: Final = tuple(f"{of} {part}" for of in ("scene", "change") for part in _RGB)
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
#: The named channels of each level, from cells down. Others are free.
LEVELS: Final = (
    (*_SAME, *_SHADES, *AXES, *(f"own {axis}" for axis in AXES), *_CELL_PATTERNS),
    (*_SAME, *_SHADES, *AXES, *_WAY, *_QUARTER_PATTERNS),
    (*_SAME, *_SHADES, *AXES, *_WAY, *_TILES),
    (*drawing.NAMES, *AXES, "radius", "first frame"),
)


def carried(level: int) -> list[str]:
    """Channels of a level that are exact. The axes of cells are not: things turn."""
    axes = (*AXES, *(f"own {axis}" for axis in AXES)) if level == 0 else ()
    return [name for name in LEVELS[level] if name not in axes and not name.startswith("distance")]


def from_latents() -> Iterator[tuple[str, int, float, bool]]:
    """Channels of cells: name, latent channel, weight, and whether the cells on both sides have the same."""
    yield from ((kind, channel, 1.0, False) for channel, kind in zip(KIND_CHANNELS, TAUGHT, strict=True))
    yield "first frame", FIRST_FRAME_CHANNEL, 1.0, False
    yield "mirror", MIRROR_CHANNEL, 1.0, False
    yield "radius", SIZE_CHANNEL, SIZES["medium"] / CELL / 2, False
    for part, thing, scene, change in zip(
        _RGB, COLOUR_CHANNELS, SCENE_COLOUR_CHANNELS, SCENE_CHANGE_CHANNELS, strict=True
    ):
        yield f"thing {part}", thing, 1 / COLOUR_SCALE, False
        yield f"scene {part}", scene, 1 / COLOUR_SCALE, True
        yield f"change {part}", change, 1 / CHANGE_SCALE, True
    for axis, channel in zip(AXES, (*PLACE_CHANNELS, *TURN_CHANNELS), strict=True):
        yield axis, channel, 1.0, False
        yield f"own {axis}", channel, 1.0, False
    for index, channel in enumerate(PATTERN_CHANNELS):
        yield f"pattern {index}", channel, 1 / PATTERN_SCALE, len(PATTERNS[index]) > 1


#: Constants of cells.
BIASES: Final = {"constant": drawing.CONSTANT, "radius": SIZES["medium"] / CELL}


def upsampling(level: int, row: int, column: int, half: int) -> list[Wire]:
    """From `level` to one of the 2 x 2 places of the next one, in one half of the time."""
    side = 0.5**level  # of the squares, in cells
    x, y = (column - 0.5) * side / 2, (row - 0.5) * side / 2
    kept = [name for name in (*_SAME, *_SHADES, *_WAY) if name in LEVELS[level] and name in LEVELS[level + 1]]
    wires: list[Wire] = [(name, name, 1.0) for name in kept]
    wires += [(f"scene {part}", f"change {part}", y) for part in _RGB]
    moments = [("", 1.0)]
    if level == 0:
        # The eight frames of a latent are at 1/8 ... 8/8 of the way from the one before, on a parabola through three.
        part = (4 * half + 2.5) / 8
        shares, slopes = (
            (part * (part + 1) / 2, 1 - part**2, part * (part - 1) / 2),
            (part + 0.5, -2 * part, part - 0.5),
        )
        moments = list(zip(("", f"{BEFORE[1]}own ", f"{BEFORE[2]}own "), shares, strict=True))
        for (source, _), slope in zip(moments, slopes, strict=True):
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


@torch.no_grad()
def start_first(weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Sets the rows of named channels in (channels, 3 taps, latent channels): the cells left, at and right of it."""
    names = LEVELS[0]
    weight[: len(names)] = 0
    bias[: len(names)] = torch.tensor([BIASES.get(name, 0.0) for name in names])
    for name, channel, factor, alike in from_latents():
        weight[names.index(name), :, channel] = torch.tensor([1 / 3] * 3 if alike else [0.0, 1.0, 0.0]) * factor


def upsampling_weights(level: int, wide: int, narrow: int) -> torch.Tensor:
    """(8, narrow, inputs): the wires from `wide` channels, at places in the order half, row and column.

    At the first level, the inputs are those of this latent, of the one before, and of the one before that.
    """
    inputs, outputs = LEVELS[level], LEVELS[level + 1]
    times = BEFORE if level == 0 else BEFORE[:1]
    sources = {f"{when}{name}": wide * ago + at for ago, when in enumerate(times) for at, name in enumerate(inputs)}
    weight = torch.zeros(8, narrow, wide * len(times))
    for place in range(8):
        for output, name, factor in upsampling(level, place // 2 % 2, place % 2, place // 4):
            weight[place, outputs.index(output), sources[name]] += factor
    return weight


def shortcut(places: int, narrow: int, wide: int) -> torch.Tensor:
    """(places, narrow, wide): what `HunyuanVideo15Upsample` adds to its convolution. The first frame has 4 places."""
    return torch.eye(wide).view(places, wide // places, wide).repeat_interleave(places * narrow // wide, dim=1)
