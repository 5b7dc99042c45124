"""Names the kind of an object by its silhouette: compares it with templates drawn here."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tools.demo_model.evaluation.foreground import Mask

#: A silhouette of standard area around its centre of mass: coverage from 0 to 1, (_SIZE, _SIZE).
Silhouette: TypeAlias = npt.NDArray[np.float32]
Point: TypeAlias = tuple[float, float]

_SIZE: Final = 64
#: Share of a silhouette's square that it covers. Spread-out ones, such as a crescent, need the space around.
_AREA: Final = 0.2
#: Pixels of the square that templates are drawn on. Their coordinates are from -1 to 1, y downwards.
_CANVAS: Final = 160
_STRETCH: Final = (0.87, 1.0, 1.15)
_ANGLES: Final = range(0, 360, 10)
#: The least likeness, from 0 to 1, at which an object has a kind at all.
_ALIKE: Final = 0.6
UNKNOWN: Final = "unknown"


class _Drawing:
    """A white picture of a template on black."""

    def __init__(self) -> None:
        self.image = Image.new("L", (_CANVAS, _CANVAS))
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, points: Sequence[Point], fill: int = 255) -> None:
        self._draw.polygon([_pixel(point) for point in points], fill=fill)

    def ellipse(self, x: float, y: float, width: float, height: float, fill: int = 255) -> None:
        """Around (x, y), with these half axes."""
        self._draw.ellipse([_pixel((x - width, y - height)), _pixel((x + width, y + height))], fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: int = 255) -> None:
        self._draw.rectangle([_pixel((left, top)), _pixel((right, bottom))], fill=fill)


def _pixel(point: Point) -> Point:
    """Leaves a margin, because some templates reach a little over 1."""
    return tuple((0.7 * value + 1) * _CANVAS / 2 for value in point)  # type: ignore[return-value]


def _ball(drawing: _Drawing) -> None:
    drawing.ellipse(0, 0, 1, 1)


def _square(drawing: _Drawing) -> None:
    drawing.box(-1, -1, 1, 1)


def _triangle(drawing: _Drawing, height: float) -> None:
    drawing.polygon([(0, -height), (1, height), (-1, height)])


def _spikes(points: int, inner: float) -> list[Point]:
    corners = []
    for index in range(2 * points):
        angle, radius = math.pi * index / points, 1 if index % 2 == 0 else inner
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


def _star(drawing: _Drawing, inner: float) -> None:
    drawing.polygon(_spikes(5, inner))


def _heart(drawing: _Drawing, tip: float) -> None:
    drawing.ellipse(-0.48, -0.4, 0.52, 0.52)
    drawing.ellipse(0.48, -0.4, 0.52, 0.52)
    drawing.polygon([(-0.93, -0.14), (0, -0.4), (0.93, -0.14), (0, tip)])


def _curved_heart(drawing: _Drawing) -> None:
    """Source of the curve: https://mathworld.wolfram.com/HeartCurve.html."""
    curve = [math.tau * index / 120 for index in range(120)]
    drawing.polygon([
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in curve
    ])  # fmt: skip


def _ring(drawing: _Drawing, hole: float) -> None:
    drawing.ellipse(0, 0, 1, 1)
    drawing.ellipse(0, 0, hole, hole, fill=0)


def _cross(drawing: _Drawing, arm: float) -> None:
    drawing.box(-1, -arm, 1, arm)
    drawing.box(-arm, -1, arm, 1)


def _diamond(drawing: _Drawing, width: float) -> None:
    drawing.polygon([(0, -1), (width, 0), (0, 1), (-width, 0)])


def _moon(drawing: _Drawing, shift: float, bite: float) -> None:
    drawing.ellipse(0, 0, 1, 1)
    drawing.ellipse(shift, 0, bite, bite, fill=0)


def _fish(drawing: _Drawing, body: float, tail: float) -> None:
    drawing.ellipse(0.2, 0, 0.8, body)
    drawing.polygon([(-0.35, 0), (-1, -tail), (-1, tail)])


def _notched_fish(drawing: _Drawing, body: float) -> None:
    drawing.ellipse(0.2, 0, 0.8, body)
    drawing.polygon([(-0.35, 0), (-1, -0.5), (-0.8, 0), (-1, 0.5)])


def _boat(drawing: _Drawing, sail: float, left: float) -> None:
    drawing.polygon([(-1, 0.35), (1, 0.35), (0.65, 0.85), (-0.65, 0.85)])
    drawing.box(-0.05, -1, 0.05, 0.4)
    drawing.polygon([(0, -1), (sail, 0.2), (left, 0.2)])


def _sun(drawing: _Drawing, disc: float, half_width: float) -> None:
    drawing.ellipse(0, 0, disc, disc)
    for index in range(8):
        angle = math.tau * index / 8
        along, across = (math.sin(angle), math.cos(angle)), (math.cos(angle), -math.sin(angle))
        drawing.polygon([
            (along[0] * reach + across[0] * side, along[1] * reach + across[1] * side)
            for reach, side in ((0.3, half_width), (1, half_width), (1, -half_width), (0.3, -half_width))
        ])  # fmt: skip


def _pointed_sun(drawing: _Drawing, disc: float, base: float) -> None:
    drawing.ellipse(0, 0, disc, disc)
    drawing.polygon(_spikes(8, base))


def _house(drawing: _Drawing, eaves: float, overhang: float, door: float) -> None:
    drawing.polygon([(0, -1), (0.8 + overhang, eaves), (-0.8 - overhang, eaves)])
    drawing.box(-0.8, eaves, 0.8, 0.9)
    drawing.box(-door, 0.9 - 2.6 * door, door, 0.95, fill=0)


def _tree(drawing: _Drawing, tiers: int, trunk: float) -> None:
    drawing.box(-trunk, 0.5, trunk, 1)
    for tier in range(tiers):
        bottom = 0.6 - 1.2 * (tiers - 1 - tier) / tiers * 0.9
        width = 0.75 * (0.55 + 0.45 * tier / max(tiers - 1, 1))
        top = -1 if tier == 0 else bottom - 1.5 / tiers
        drawing.polygon([(0, top), (width, bottom), (-width, bottom)])


_Draw: TypeAlias = Callable[[_Drawing], None]

_TEMPLATES: Final[Mapping[str, tuple[_Draw, ...]]] = {
    "ball": (_ball,),
    "square": (_square,),
    "triangle": (partial(_triangle, height=0.87), partial(_triangle, height=1)),
    "star": tuple(partial(_star, inner=inner) for inner in (0.38, 0.45, 0.52)),
    "heart": (partial(_heart, tip=0.9), partial(_heart, tip=1.1), _curved_heart),
    "ring": tuple(partial(_ring, hole=hole) for hole in (0.4, 0.5, 0.6, 0.7)),
    "cross": tuple(partial(_cross, arm=arm) for arm in (0.22, 0.28, 0.34, 0.42)),
    "diamond": tuple(partial(_diamond, width=width) for width in (0.55, 0.65, 0.75)),
    "moon": tuple(
        partial(_moon, shift=shift, bite=bite)
        for shift, bite in ((0.35, 0.85), (0.45, 0.8), (0.5, 0.95), (0.35, 0.7), (0.6, 1.0))
    ),
    "fish": (
        *(partial(_fish, body=body, tail=tail) for body, tail in product((0.4, 0.5, 0.6), (0.4, 0.55))),
        partial(_notched_fish, body=0.45),
        partial(_notched_fish, body=0.6),
    ),
    "boat": tuple(partial(_boat, sail=sail, left=left) for sail, left in product((0.6, 0.85), (0, -0.3, -0.6))),
    "sun": (
        *(partial(_sun, disc=disc, half_width=half) for disc, half in product((0.5, 0.6, 0.68), (0.06, 0.1))),
        *(partial(_pointed_sun, disc=disc, base=base) for disc, base in product((0.5, 0.62), (0.5, 0.6))),
    ),
    "house": tuple(
        partial(_house, eaves=eaves, overhang=overhang, door=door)
        for eaves, overhang, door in product((-0.3, -0.05), (0.0, 0.2), (0.15, 0.22))
    ),
    "tree": tuple(partial(_tree, tiers=tiers, trunk=trunk) for tiers, trunk in product((1, 2, 3), (0.1, 0.16))),
}
KINDS: Final = tuple(_TEMPLATES)


@cache
def _templates() -> tuple[list[str], npt.NDArray[np.float32]]:
    """The kind and the flattened silhouette of each template, stretched and mirrored."""
    names, silhouettes = [], []
    for kind, drawers in _TEMPLATES.items():
        for drawer in drawers:
            drawing = _Drawing()
            drawer(drawing)
            for stretch in _STRETCH:
                image = drawing.image.resize((round(_CANVAS * stretch), _CANVAS))
                silhouette = normalised(_coverage(image))
                names += [kind, kind]
                silhouettes += [silhouette, silhouette[:, ::-1]]
    return names, np.array(silhouettes, np.float32).reshape(len(names), -1)


def normalised(coverage: npt.NDArray[np.float32] | Mask, angle: float = 0.0) -> Silhouette:
    """The silhouette at standard area around its centre of mass, turned by `angle` degrees."""
    weights = coverage.astype(np.float32)
    area = weights.sum()
    ys, xs = np.arange(weights.shape[0]), np.arange(weights.shape[1])
    x, y = (weights.sum(axis=0) * xs).sum() / area + 0.5, (weights.sum(axis=1) * ys).sum() / area + 0.5
    scale = math.sqrt(area / (_AREA * _SIZE**2))
    cos, sin, half = scale * math.cos(math.radians(angle)), scale * math.sin(math.radians(angle)), _SIZE / 2
    matrix = (cos, -sin, x - half * (cos - sin), sin, cos, y - half * (sin + cos))
    image = Image.fromarray((255 * weights).astype(np.uint8))
    if scale > 1.5:  # bilinear sampling would skip pixels
        factor = int(scale)
        image = image.reduce(factor)
        matrix = tuple(value / factor for value in matrix)  # type: ignore[assignment]
    turned = image.transform((_SIZE, _SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return _coverage(turned)


def _coverage(image: Image.Image) -> npt.NDArray[np.float32]:
    """A picture's brightness, from 0 to 1."""
    coverage: npt.NDArray[np.float32] = np.asarray(image, np.float32) / np.float32(255)
    return coverage


def likeness(one: Silhouette, other: Silhouette) -> float:
    """Shared area over joint area: 1 for the same silhouette."""
    shared = float((one * other).sum())
    return shared / (float((one * one).sum() + (other * other).sum()) - shared)


def kind_of(masks: Sequence[Mask]) -> str:
    """The kind of an object that does not turn, from its masks in some frames: one of `KINDS`, or `UNKNOWN`."""
    mean: Silhouette = np.add.reduce([normalised(mask) for mask in masks]) / len(masks)
    return _best([mean])


def kind_of_turning(masks: Sequence[Mask]) -> str:
    """The kind of an object that turns: what most of its frames are most like, at any angle."""
    votes = [_best([normalised(mask, angle) for angle in _ANGLES]) for mask in masks]
    return max(sorted(set(votes)), key=votes.count)


def _best(silhouettes: Sequence[Silhouette]) -> str:
    names, templates = _templates()
    candidates = np.array(silhouettes, np.float32).reshape(len(silhouettes), -1)
    shared = templates @ candidates.T
    joint = np.square(templates).sum(axis=1)[:, None] + np.square(candidates).sum(axis=1)[None] - shared
    alike = (shared / joint).max(axis=1)
    return names[int(alike.argmax())] if alike.max() >= _ALIKE else UNKNOWN
