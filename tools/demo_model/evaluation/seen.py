"""What a clip shows, from its pixels alone: objects with colour, kind and motion, and the background.

The evaluation must not repeat a mistake of the generator, so this package's analysis shares no code and no number with
it: `oklab`, `foreground`, `silhouettes`, `motions`, `backgrounds` and this module import each other only.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from tools.demo_model.evaluation import oklab
from tools.demo_model.evaluation.backgrounds import Background, background_of
from tools.demo_model.evaluation.foreground import (
    Colour,
    Part,
    background_rows,
    colours_of,
    count_of,
    follow,
    objects_mask,
)
from tools.demo_model.evaluation.motions import Track, motion_of
from tools.demo_model.evaluation.silhouettes import kind_of, kind_of_turning

#: Frames a second that are looked at; enough for the fastest motion, a bounce.
LOOKS_PER_SECOND: Final = 6
#: Pixels of the picture's shorter side that are looked at.
LOOKED_AT_SIZE: Final = 160
_MASKS_FOR_KIND: Final = 9


@dataclass(frozen=True)
class SeenObject:
    """An object. `place` is where its centre is in the first frame that shows it, in shares of width and height."""

    colour: str
    kind: str
    motion: str
    place: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}, {self.motion}"


@dataclass(frozen=True)
class Seen:
    """What a clip shows."""

    objects: tuple[SeenObject, ...]
    background: Background


def look_at(frames: npt.NDArray[np.uint8], fps: float = 24) -> Seen:
    """Analyses a clip of RGB frames (frames, height, width, 3)."""
    step = max(round(fps / LOOKS_PER_SECOND), 1)
    picture = oklab.lab(_smaller(frames[::step]))
    rows = background_rows(picture)
    mask = objects_mask(picture, rows)
    objects = [
        _object(colour, track, fps / step)
        for colour in colours_of(picture, mask)
        for track in follow(colour.parts, count_of(colour.parts))
    ]
    return Seen(tuple(objects), background_of(picture, rows, mask))


def _smaller(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    height, width = frames.shape[1:3]
    scale = LOOKED_AT_SIZE / min(height, width)
    if scale >= 1:
        return frames
    size = (round(scale * width), round(scale * height))
    return np.array([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])


def _object(colour: Colour, parts: list[Part | None], fps: float) -> SeenObject:
    track = Track.of(parts, fps)
    motion = motion_of(track)
    masks = _masks_for_kind(track)
    kind = kind_of_turning(masks) if motion == "spinning" else kind_of(masks)
    height, width = track.parts[0].mask.shape
    return SeenObject(oklab.name(colour.lab), kind, motion, (track.parts[0].x / width, track.parts[0].y / height))


def _masks_for_kind(track: Track) -> list[npt.NDArray[np.bool_]]:
    """Some masks, spread over time; whole ones if there are any."""
    whole = [part.mask for part in track.parts if not part.cut] or [part.mask for part in track.parts]
    picked = np.linspace(0, len(whole) - 1, min(len(whole), _MASKS_FOR_KIND)).round().astype(int)
    return [whole[index] for index in picked]
