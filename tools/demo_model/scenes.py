"""Colours, and what is behind the objects: landscapes with their textures and stars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

#: Pixels on a side of a cell, which is what one latent shows.
CELL: Final = 32

RGB = tuple[float, float, float]

COLOURS: Final[dict[str, RGB]] = {
    "red": (0.88, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.87, 0.10),
    "green": (0.13, 0.65, 0.22),
    "turquoise": (0.10, 0.78, 0.78),
    "blue": (0.12, 0.32, 0.90),
    "purple": (0.52, 0.18, 0.72),
    "pink": (1.00, 0.50, 0.72),
    "brown": (0.48, 0.28, 0.12),
    "white": (0.97, 0.97, 0.97),
    "gray": (0.55, 0.55, 0.57),
    "black": (0.06, 0.06, 0.07),
}


@dataclass(frozen=True)
class Scene:
    """What is behind the objects: colours from top to bottom above and below the horizon, and a texture of the ground.

    A scene without a ground has a sky alone.
    """

    sky: tuple[RGB, RGB]
    ground: tuple[RGB, RGB] | None = None
    texture: int = 0
    stars: bool = False


WAVES, BLADES, DUNES = 1, 2, 3
LANDSCAPES: Final[dict[str, Scene]] = {
    "sea": Scene(((0.55, 0.80, 0.98), (0.80, 0.92, 1.00)), ((0.10, 0.45, 0.75), (0.03, 0.25, 0.55)), WAVES),
    "meadow": Scene(((0.50, 0.78, 1.00), (0.78, 0.91, 1.00)), ((0.42, 0.74, 0.28), (0.25, 0.55, 0.15)), BLADES),
    "snow": Scene(((0.42, 0.58, 0.80), (0.70, 0.82, 0.94)), ((0.98, 0.99, 1.00), (0.84, 0.91, 0.98)), DUNES),
    "desert": Scene(((0.45, 0.72, 0.95), (0.95, 0.88, 0.75)), ((0.93, 0.78, 0.48), (0.80, 0.60, 0.32)), DUNES),
    "night": Scene(((0.02, 0.02, 0.12), (0.10, 0.10, 0.30)), stars=True),
    "sky": Scene(((0.35, 0.65, 0.98), (0.82, 0.93, 1.00))),
    "sunset": Scene(((0.35, 0.15, 0.45), (1.00, 0.60, 0.25))),
}


#: What textures and stars are made of, in squares of 2 x 2 pixels: darker (-) or brighter (+).
TILES: Final = {
    "crest's left": ("...+", ".++.", "+...", "...."),
    "crest's right": ("+...", ".++.", "...+", "...."),
    "tuft": ("-..-", "-..-", ".--.", ".--."),
    "ripple's left": ("....", "..--", "--..", "...."),
    "ripple's right": ("....", "--..", "..--", "...."),
    "star": (".o..", "o+o.", ".o..", "...."),
}
_STRENGTHS: Final = {"crest": 0.16, "tuft": 0.10, "ripple": 0.05, "star": 0.85}
_SIGNS: Final = {".": 0.0, "-": -1.0, "+": 1.0, "o": 0.4}
#: Pixels on a side of a square, and squares on a side of a tile.
GRAIN: Final = 2
TILE: Final = 4
#: Tiles of each texture and of each star: their rows and columns in a cell of 4 x 4 tiles.
PATTERNS: Final[tuple[dict[tuple[int, int], str], ...]] = (
    {(row, column): "crest's left" if (row // 2 + column) % 2 == 0 else "crest's right"
     for row in (0, 2) for column in range(4)},
    {(0, 0): "tuft", (0, 2): "tuft", (2, 1): "tuft", (2, 3): "tuft"},
    {(row, column): "ripple's left" if (row // 2 + column) % 2 == 0 else "ripple's right"
     for row in (0, 2) for column in range(4)},
    {(1, 0): "star"},
    {(3, 2): "star"},
    {(0, 3): "star"},
)  # fmt: skip


def tile_light(name: str) -> torch.Tensor:
    """(TILE, TILE): the light of each square."""
    signs = torch.tensor([[_SIGNS[square] for square in row] for row in TILES[name]])
    return _STRENGTHS[name.partition("'")[0]] * signs


def patterns() -> torch.Tensor:
    """(6, 16, 16): the light of each texture and star in a cell."""
    light = torch.zeros(len(PATTERNS), CELL // GRAIN, CELL // GRAIN)
    for pattern, tiles in zip(light, PATTERNS, strict=True):
        for (row, column), name in tiles.items():
            pattern[TILE * row : TILE * (row + 1), TILE * column : TILE * (column + 1)] = tile_light(name)
    return light
