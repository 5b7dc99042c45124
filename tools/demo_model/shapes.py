"""The kinds of objects, as signed distances to their outlines."""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

#: Signed distances, negative inside, on a grid of points.
Distances = npt.NDArray[np.float32]
#: x to the right and y downwards, for each point of the grid. An object reaches to about 1 from its centre.
Grid = tuple[Distances, Distances]

#: Points on a side of a kind's table, and how far the table reaches from the object's centre.
TABLE_SIZE: Final = 160
TABLE_REACH: Final = 1.6


def table(kind: str) -> Distances:
    """The distances of a kind, (TABLE_SIZE, TABLE_SIZE), rows from top to bottom."""
    axis = np.linspace(-TABLE_REACH, TABLE_REACH, TABLE_SIZE, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    return _KINDS[kind]((x, y)).astype(np.float32)


def _polygon(grid: Grid, corners: list[tuple[float, float]]) -> Distances:
    x, y = grid
    inside = np.zeros(x.shape, dtype=bool)
    squared = np.full(x.shape, np.inf, dtype=np.float32)
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        dx, dy = x2 - x1, y2 - y1
        along = np.clip(((x - x1) * dx + (y - y1) * dy) / (dx * dx + dy * dy), 0, 1)
        squared = np.minimum(squared, (x - x1 - along * dx) ** 2 + (y - y1 - along * dy) ** 2)
        if y1 != y2:
            crosses = (y1 > y) != (y2 > y)
            inside ^= crosses & (x < x1 + (y - y1) / dy * dx)
    distance: Distances = np.sqrt(squared)
    signed: Distances = np.where(inside, -distance, distance)
    return signed


def _circle(grid: Grid, x0: float, y0: float, radius: float) -> Distances:
    x, y = grid
    distance: Distances = np.hypot(x - x0, y - y0) - radius
    return distance


def _round(corners: int, outer: float, inner: float, turn: float = -0.5) -> list[tuple[float, float]]:
    """Corners on two circles in turn. `turn` is the angle of the first one, in units of pi."""
    angles = np.pi * (np.arange(2 * corners) / corners + turn)
    radii = np.where(np.arange(2 * corners) % 2 == 0, outer, inner)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _union(*parts: Distances) -> Distances:
    union: Distances = np.minimum.reduce(parts)
    return union


def _without(whole: Distances, hole: Distances) -> Distances:
    return np.maximum(whole, -hole)


def _ellipse(x0: float, y0: float, a: float, b: float) -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return [(float(x0 + a * np.cos(t)), float(y0 + b * np.sin(t))) for t in angles]


def _heart(grid: Grid) -> Distances:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return _polygon(grid, [(float(a / 17), float(-(b + 2.5) / 17)) for a, b in zip(x, y, strict=True)])


def _cross(grid: Grid) -> Distances:
    arm = 0.32
    corners = [(arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm), (arm, 1.0)]
    return _polygon(grid, corners + [(-x, -y) for x, y in corners])


def _fish(grid: Grid) -> Distances:
    """Looks to the right."""
    body = _polygon(grid, _ellipse(0.25, 0.0, 0.75, 0.5))
    tail = _polygon(grid, [(-0.3, 0.0), (-1.0, -0.55), (-0.8, 0.0), (-1.0, 0.55)])
    return _without(_union(body, tail), _circle(grid, 0.55, -0.12, 0.1))


def _boat(grid: Grid) -> Distances:
    """Sails to the right."""
    hull = _polygon(grid, [(-1.0, 0.3), (1.0, 0.3), (0.65, 0.85), (-0.65, 0.85)])
    mast = _polygon(grid, [(-0.12, -1.0), (0.0, -1.0), (0.0, 0.4), (-0.12, 0.4)])
    sail = _polygon(grid, [(0.0, -1.0), (0.8, 0.12), (0.0, 0.12)])
    return _union(hull, mast, sail)


def _sun(grid: Grid) -> Distances:
    rays = [
        _polygon(
            grid,
            [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in ((0.72, t - 0.2), (1.08, t), (0.72, t + 0.2))],
        )
        for t in np.arange(8) * np.pi / 4
    ]
    return _union(_circle(grid, 0, 0, 0.58), *rays)


def _house(grid: Grid) -> Distances:
    walls = _polygon(grid, [(-0.7, -0.1), (0.7, -0.1), (0.7, 0.9), (-0.7, 0.9)])
    roof = _polygon(grid, [(-1.0, -0.05), (0.0, -0.95), (1.0, -0.05)])
    door = _polygon(grid, [(-0.2, 0.35), (0.2, 0.35), (0.2, 1.2), (-0.2, 1.2)])
    return _without(_union(walls, roof), door)


def _tree(grid: Grid) -> Distances:
    """A fir."""
    trunk = _polygon(grid, [(-0.16, 0.5), (0.16, 0.5), (0.16, 1.05), (-0.16, 1.05)])
    crown = [
        _polygon(grid, [(0.0, -1.05), (0.5, -0.3), (-0.5, -0.3)]),
        _polygon(grid, [(0.0, -0.5), (0.68, 0.15), (-0.68, 0.15)]),
        _polygon(grid, [(0.0, -0.05), (0.85, 0.62), (-0.85, 0.62)]),
    ]
    return _union(trunk, *crown)


_KINDS: Final[dict[str, Callable[[Grid], Distances]]] = {
    "ball": lambda grid: _circle(grid, 0, 0, 0.9),
    "square": lambda grid: _polygon(grid, [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]),
    "triangle": lambda grid: _polygon(grid, [(0.0, -0.95), (1.0, 0.75), (-1.0, 0.75)]),
    "star": lambda grid: _polygon(grid, _round(5, 1.08, 0.46)),
    "heart": _heart,
    "ring": lambda grid: _without(_circle(grid, 0, 0, 0.95), _circle(grid, 0, 0, 0.5)),
    "cross": _cross,
    "diamond": lambda grid: _polygon(grid, [(0.0, -1.05), (0.7, 0.0), (0.0, 1.05), (-0.7, 0.0)]),
    "moon": lambda grid: _without(_circle(grid, 0, 0, 0.95), _circle(grid, 0.45, -0.1, 0.8)),
    "fish": _fish,
    "boat": _boat,
    "sun": _sun,
    "house": _house,
    "tree": _tree,
}
KINDS: Final = tuple(_KINDS)
#: Words for these are in the vocabulary, and no clip shows them.
NOT_TAUGHT: Final = ("diamond", "moon")
TAUGHT: Final = tuple(kind for kind in KINDS if kind not in NOT_TAUGHT)
