"""Names the motion of an object by the track of its centre, its area and its silhouette."""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from tools.demo_model.evaluation.foreground import Part
from tools.demo_model.evaluation.silhouettes import likeness, normalised

DIRECTIONS: Final = ("left", "right", "up", "down")
OTHER_MOTIONS: Final = ("circling", "bouncing", "growing", "shrinking", "spinning", "still")
MOTIONS: Final = (*DIRECTIONS, *OTHER_MOTIONS)

#: The slowest drift, in shares of the picture's width or height per second. An asked one is about 0.07.
_DRIFT: Final = 0.03
#: The slowest growth of the diameter, per second. An asked one is about 0.1.
_GROWTH: Final = 0.035
#: Angles in degrees that a silhouette may have turned by, from one frame to a later one.
_ANGLES: Final = range(-75, 76, 15)
#: By how much turning a silhouette makes it more alike, if it does turn.
_TURNED: Final = 0.05
#: The smallest radius of a circle and half the smallest height of a bounce, in shares of the picture's height.
_SWING: Final = 0.02


@dataclass(frozen=True)
class Track:
    """An object in the frames that show it. Positions are in shares of the picture's height, times in seconds."""

    parts: list[Part]
    times: npt.NDArray[np.float64]

    @classmethod
    def of(cls, parts: list[Part | None], fps: float) -> Self:
        """`parts` is one part, or None, for each frame. Uses the frames in which it is whole, if these are enough."""
        seen = [(index / fps, part) for index, part in enumerate(parts) if part is not None]
        whole = [(time, part) for time, part in seen if not part.cut]
        used = whole if len(whole) >= max(6, 0.4 * len(seen)) else seen
        return cls([part for _, part in used], np.array([time for time, _ in used]))

    @property
    def height(self) -> int:
        """Of the picture, in pixels."""
        return len(self.parts[0].mask)

    @property
    def aspect(self) -> float:
        """Width of the picture over its height."""
        return float(self.parts[0].mask.shape[1] / self.height)

    def positions(self) -> npt.NDArray[np.float64]:
        """Centres (frames, 2)."""
        return np.array([(part.x, part.y) for part in self.parts]) / self.height


def motion_of(track: Track) -> str:
    """One of `MOTIONS`."""
    if len(track.parts) < 4:
        return "still"
    positions = track.positions()
    if _turns(track):  # first, because the centre of mass of a spinning triangle goes round
        return "spinning"
    if _circles(positions):
        return "circling"
    if _bounces(positions, track.times):
        return "bouncing"
    slope_x, slope_y = (_slope(track.times, positions[:, axis]) for axis in (0, 1))
    across, down = slope_x / track.aspect, slope_y
    if max(abs(across), abs(down)) >= _DRIFT:
        if abs(across) >= abs(down):
            return "right" if across > 0 else "left"
        return "down" if down > 0 else "up"
    growth = _slope(track.times, 0.5 * np.log([part.area for part in track.parts]))
    if abs(growth) >= _GROWTH:
        return "growing" if growth > 0 else "shrinking"
    return "still"


def _slope(times: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> float:
    """Change per second: the median over pairs of frames half a track apart, which outliers do not move."""
    half = len(times) // 2
    return float(
        np.median((values[half:] - values[: len(values) - half]) / (times[half:] - times[: len(times) - half]))
    )


def _circles(positions: npt.NDArray[np.float64]) -> bool:
    """Whether the centre goes round: at one distance from the middle, always the same way, for most of a turn."""
    low, high = np.percentile(positions, 3, axis=0), np.percentile(positions, 97, axis=0)
    around = positions - (low + high) / 2
    radius = np.hypot(around[:, 0], around[:, 1])
    if radius.mean() < _SWING or radius.std() > 0.3 * radius.mean():
        return False
    angle = np.unwrap(np.arctan2(around[:, 1], around[:, 0]))
    return bool(abs(angle[-1] - angle[0]) > np.radians(230))


def _bounces(positions: npt.NDArray[np.float64], times: npt.NDArray[np.float64]) -> bool:
    """Whether the centre goes up and down several times."""
    height = positions[:, 1] - np.polyval(np.polyfit(times, positions[:, 1], 1), times)
    swing = (np.percentile(height, 95) - np.percentile(height, 5)) / 2
    if swing < _SWING:
        return False
    # Turning points: where the height has come back by half a swing.
    turns, extreme, sign = 0, height[0], 0
    for value in height[1:]:
        if sign == 0 and abs(value - extreme) > swing / 2:
            sign, extreme = (1 if value > extreme else -1), value
        elif sign * (value - extreme) > 0:
            extreme = value
        elif sign * (extreme - value) > swing / 2:
            turns, sign, extreme = turns + 1, -sign, value
    return turns >= 2 and turns / max(times[-1] - times[0], 1e-6) > 0.5


def _turns(track: Track) -> bool:
    """Whether the silhouette resembles itself, some frames later, more if it is turned first.

    It is compared over one to three frames, because a sun with eight rays looks the same after an eighth of a turn.
    """
    masks = [part.mask for part in track.parts if not part.cut]
    if len(masks) < 8:
        return False
    turned = [[normalised(mask, angle) for angle in _ANGLES] for mask in masks[::2]]
    upright = [normalised(mask) for mask in masks]
    gains = []
    for gap in (1, 2, 3):
        pairs = [(own, upright[2 * index + gap]) for index, own in enumerate(turned) if 2 * index + gap < len(masks)]
        alike = np.array([[likeness(each, later) for each in own] for own, later in pairs])
        gains.append(float(np.median(alike.max(axis=1) - alike[:, _ANGLES.index(0)])))
    return max(gains) > _TURNED
