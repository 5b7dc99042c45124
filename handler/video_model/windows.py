"""The windows that a super-resolution stage computes one after another, as boxes of latents. Pure arithmetic.

Attention over a whole video costs the square of its tokens; over windows of a fixed size it costs as much as the video
has tokens. Neighbouring windows overlap, and `super_resolution` blends them.
"""

import math
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Window:
    """A box of latents: its frames, rows and columns in the video."""

    frames: range
    rows: range
    columns: range

    @property
    def tokens(self) -> int:
        """Latent tokens; text is not counted."""
        return len(self.frames) * len(self.rows) * len(self.columns)

    @property
    def index(self) -> tuple[slice, slice, slice]:
        """Its place in the last three dimensions of a tensor (..., T, H, W)."""
        frames, rows, columns = (slice(side.start, side.stop) for side in (self.frames, self.rows, self.columns))
        return frames, rows, columns


@dataclass(frozen=True)
class SuperResolutionTiling:
    """How windows cover a video, in latents: 16 pixels, and four frames.

    `tile` is the (height, width) of the largest tile of a video that is wider than high; one that is higher than wide
    gets it on its side. Neighbouring tiles share at least `overlap` latents. A window has at most `window` latent
    frames, and the next one begins at most `stride` later.
    """

    tile: tuple[int, int]
    overlap: int
    window: int
    stride: int


def windows(tiling: SuperResolutionTiling | None, frames: int, height: int, width: int) -> list[Window]:
    """The windows of a video of so many latents, all of one size, in the order in which they are computed.

    As few as possible, and then as small as their overlap permits. One window, the whole video, if it is no larger than
    a window, or without a `tiling`.
    """
    if tiling is None:
        return [Window(range(frames), range(height), range(width))]
    high, wide = tiling.tile if width >= height else reversed(tiling.tile)
    in_time = _cover(frames, tiling.window, tiling.window - tiling.stride)
    return [
        Window(*sides)
        for sides in product(in_time, _cover(height, high, tiling.overlap), _cover(width, wide, tiling.overlap))
    ]


def _cover(length: int, largest: int, overlap: int) -> list[range]:
    """Equal ranges of at most `largest` that cover `length`, evenly spaced, and share at least `overlap`."""
    if length <= largest:
        return [range(length)]
    count = math.ceil((length - overlap) / (largest - overlap))
    size = math.ceil((length + (count - 1) * overlap) / count)
    starts = [index * (length - size) // (count - 1) for index in range(count)]
    return [range(start, start + size) for start in starts]
