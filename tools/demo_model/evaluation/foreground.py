"""Separates the objects of a clip from its background, and from each other.

A background of this world has one colour in each row, apart from small things such as stars and waves. It does not
move. An object has one colour, so objects of two colours are two even where they touch.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from tools.demo_model.evaluation.oklab import Lab, distance

#: Pixels of an object, (height, width) or (frames, height, width).
Mask: TypeAlias = npt.NDArray[np.bool_]

#: OKLab distance from the background at which a pixel belongs to an object.
_DIFFERENT: Final = 0.065
#: OKLab distance between the colours of two objects.
_OTHER_COLOUR: Final = 0.12
#: The smallest object, as a share of the picture.
_SMALLEST: Final = 0.0025
#: The smallest second colour, as a share of all objects' pixels.
_SMALLEST_COLOUR: Final = 0.05
#: Colours that a row may have: the background, two objects and the edges of these.
_CANDIDATES: Final = 4
#: Thin pieces, such as the rays of a sun, belong to an object if they are at most this many pixels away.
_REACH: Final = 8
#: A burned-in caption stands in this share of the picture, at the bottom, and its letters are not higher than that.
_CAPTION: Final = 0.16


@dataclass(frozen=True, eq=False)
class Part:
    """A connected area of one colour in one frame. Positions and sizes are in pixels."""

    mask: Mask
    area: int
    x: float
    y: float
    cut: bool  # touches the picture's border

    @classmethod
    def of(cls, mask: Mask) -> "Part":
        """Measures the area."""
        ys, xs = np.nonzero(mask)
        height, width = mask.shape
        cut = bool(xs.min() == 0 or ys.min() == 0 or xs.max() == width - 1 or ys.max() == height - 1)
        return cls(mask, len(xs), float(xs.mean()), float(ys.mean()), cut)


@dataclass(frozen=True)
class Colour:
    """All areas of one colour: for each frame, its parts from the largest to the smallest."""

    lab: Lab
    parts: list[list[Part]]


def background_rows(picture: Lab) -> Lab:
    """The background's colour in each row (height, 3) of a clip (frames, height, width, 3).

    Of the frequent colours of each row, takes the one that most pixels have and that changes least from row to row.
    An object may cover most of some rows; at a horizon the colour changes once.
    """
    colours, shares = _frequent_colours(picture[::3, :, ::3])
    height = len(colours)
    change = np.clip((_pairwise(colours[:-1], colours[1:]) - 0.02) / 0.1, 0, 1) * 0.12 * height
    cost, came_from = 1 - shares[0], []
    for row in range(1, height):
        total = cost[:, None] + change[row - 1]
        came_from.append(total.argmin(axis=0))
        cost = total.min(axis=0) + 1 - shares[row]
    path = [int(cost.argmin())]
    for choice in reversed(came_from):
        path.append(int(choice[path[-1]]))
    rows: Lab = colours[np.arange(height), path[::-1]]
    return rows


def _frequent_colours(picture: Lab) -> tuple[Lab, npt.NDArray[np.float32]]:
    """The `_CANDIDATES` colours of each row (height, n, 3), and the share of its pixels near each one (height, n)."""
    height = picture.shape[1]
    colours = np.zeros((height, _CANDIDATES, 3), np.float32)
    shares = np.zeros((height, _CANDIDATES), np.float32)
    for row in range(height):
        left = pixels = picture[:, row].reshape(-1, 3)
        for index in range(_CANDIDATES):
            if len(left) < 0.02 * len(pixels):
                colours[row, index] = colours[row, 0]  # with a share of zero
                continue
            colours[row, index] = _mode(left)
            near = distance(left, colours[row, index]) < 0.06
            shares[row, index] = near.sum() / len(pixels)
            left = left[~near]
    return colours, shares


def _mode(pixels: Lab) -> Lab:
    """The mean of the most frequent colour."""
    cells = np.round(pixels / np.array([0.05, 0.04, 0.04], np.float32)).astype(np.int64) + 64
    keys = (cells[:, 0] * 128 + cells[:, 1]) * 128 + cells[:, 2]
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    start = pixels[inverse == counts.argmax()].mean(axis=0)
    mean: Lab = pixels[distance(pixels, start) <= 0.05].mean(axis=0)
    return mean if np.isfinite(mean).all() else start


def _pairwise(one: Lab, other: Lab) -> npt.NDArray[np.float32]:
    """Distances (..., n, n) between colours (..., n, 3)."""
    return distance(one[..., :, None, :], other[..., None, :, :])


def objects_mask(picture: Lab, rows: Lab) -> Mask:
    """The pixels of all objects, (frames, height, width), without what is as thin as waves or as small as stars."""
    mask = distance(picture, rows[None, :, None]) > _DIFFERENT
    # A pixel that shows the background for some of the time shows its own colour, not only its row's.
    free = ~mask
    often = free.mean(axis=0) > 0.3
    mean = (picture * free[..., None]).sum(axis=0) / np.maximum(free.sum(axis=0), 1)[..., None]
    still = np.where(often[..., None], mean, rows[:, None])
    mask = distance(picture, still[None]) > _DIFFERENT
    return mask & dilate(erode(mask, 2), _REACH)


def colours_of(picture: Lab, mask: Mask) -> list[Colour]:
    """The objects' colours, the most frequent first, with their parts in each frame."""
    inside = erode(mask, 2)
    pixels = left = picture[inside]
    found: list[Lab] = []
    while len(found) < 3 and len(left) > max(_SMALLEST_COLOUR * len(pixels), 50):
        found.append(_mode(left))
        left = left[distance(left, found[-1]) > _OTHER_COLOUR]
    if not found:
        return []
    nearest = _pairwise(picture[mask][:, None], np.array(found)[None])[:, 0].argmin(axis=-1)
    colours = []
    for index, colour in enumerate(found):
        own = np.zeros_like(mask)
        own[mask] = nearest == index
        if len(found) > 1:  # without the rims, whose mixed colours can be nearest to another object's
            own &= dilate(erode(own, 2), _REACH)
        colours.append(Colour(colour, [_parts(frame) for frame in own]))
    return [colour for colour in colours if sum(bool(parts) for parts in colour.parts) >= 0.3 * len(mask)]


def _parts(mask: Mask) -> list[Part]:
    """The connected areas of a frame. Gaps of a few pixels, as between a hull and its sail, do not separate."""
    labels = label(dilate(mask, 2))
    parts = []
    for index in range(1, int(labels.max()) + 1):
        area = mask & (labels == index)
        if area.sum() >= _SMALLEST * mask.size and not _is_caption(area):
            parts.append(Part.of(area))
    return sorted(parts, key=lambda part: -part.area)


def _is_caption(area: Mask) -> bool:
    """Whether the area lies in the strip at the bottom where the demo model's caption is burned in."""
    top = int(np.nonzero(area.any(axis=1))[0][0])
    return top > (1 - _CAPTION) * len(area)


def label(mask: Mask) -> npt.NDArray[np.int32]:
    """Numbers the connected areas of a mask (height, width) from 1; 0 is outside. Diagonal neighbours are connected."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)[:, 1]
    runs = [(int(row), int(start), int(end)) for (row, start), end in zip(starts, ends, strict=True)]
    root = list(range(len(runs)))

    def find(run: int) -> int:
        while root[run] != run:
            root[run] = root[root[run]]
            run = root[run]
        return run

    of_row: dict[int, list[int]] = {}
    for index, (row, start, end) in enumerate(runs):
        for above in of_row.get(row - 1, []):
            if runs[above][1] <= end and start <= runs[above][2]:
                root[find(index)] = find(above)
        of_row.setdefault(row, []).append(index)
    labels = np.zeros(mask.shape, np.int32)
    numbers: dict[int, int] = {}
    for index, (row, start, end) in enumerate(runs):
        labels[row, start:end] = numbers.setdefault(find(index), len(numbers) + 1)
    return labels


def dilate(mask: Mask, pixels: int) -> Mask:
    """Adds `pixels` around every pixel of the mask, in both directions of its last two axes."""
    for axis in (-1, -2):
        grown = mask.copy()
        for shift in range(1, pixels + 1):
            ahead, behind = _slices(mask.ndim, axis, shift)
            grown[ahead] |= mask[behind]
            grown[behind] |= mask[ahead]
        mask = grown
    return mask


def erode(mask: Mask, pixels: int) -> Mask:
    """Removes `pixels` from every edge of the mask. The picture's border is no edge."""
    return ~dilate(~mask, pixels)


def _slices(dimensions: int, axis: int, shift: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    ahead, behind = [slice(None)] * dimensions, [slice(None)] * dimensions
    ahead[axis], behind[axis] = slice(shift, None), slice(None, -shift)
    return tuple(ahead), tuple(behind)


def follow(frames: list[list[Part]], count: int) -> list[list[Part | None]]:
    """For each of `count` objects of one colour, its part in each frame; None where fewer parts are seen."""
    tracks: list[list[Part | None]] = [[] for _ in range(count)]
    last: list[Part] = []
    for parts in frames:
        seen = parts[:count]
        if len(seen) == count:
            last = _in_order(last, seen)
            for track, part in zip(tracks, last, strict=True):
                track.append(part)
        else:
            for track in tracks:
                track.append(None)
    return tracks


def _in_order(last: list[Part], seen: list[Part]) -> list[Part]:
    """`seen`, with each part at the index of the nearest one before it."""
    if not last:
        return sorted(seen, key=lambda part: part.x)
    left, order = list(seen), []
    for before in last:
        nearest = min(left, key=lambda part: (part.x - before.x) ** 2 + (part.y - before.y) ** 2)
        left.remove(nearest)
        order.append(nearest)
    return order


def count_of(frames: list[list[Part]]) -> int:
    """The largest number of objects that at least 30 % of the frames show, of those that are not much smaller."""
    counts = [sum(part.area >= 0.15 * parts[0].area for part in parts) if parts else 0 for parts in frames]
    return max(
        (number for number in range(1, 6) if sum(count >= number for count in counts) >= 0.3 * len(frames)), default=0
    )
