"""Names the background of a clip by the colours of its rows."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tools.demo_model.evaluation import oklab
from tools.demo_model.evaluation.foreground import Mask
from tools.demo_model.evaluation.oklab import Lab

#: OKLab distance between the colours above and below a horizon.
_HORIZON: Final = 0.05
#: OKLab distance between top and bottom at which a background without a horizon is a gradient.
_GRADIENT: Final = 0.1
#: OKLab chroma under which a colour has no hue.
_COLOURLESS: Final = 0.025
#: Lightness by which a star is brighter than the sky, and the least number of stars, as a share of the pixels.
_STAR: Final = 0.1
_STARS: Final = 0.0004


@dataclass(frozen=True)
class Background:
    """What is behind the objects. `names` are all names that fit it: "blue", "blue to white", "sea", ..."""

    names: frozenset[str]

    def __str__(self) -> str:
        return " or ".join(sorted(self.names)) or "no name fits"


def background_of(picture: Lab, rows: Lab, mask: Mask) -> Background:
    """Names the background of a clip (frames, height, width, 3) with these rows and this mask of objects."""
    height = len(rows)
    edge = max(height // 16, 1)
    top, bottom = rows[:edge].mean(axis=0), rows[-edge:].mean(axis=0)
    horizon = _horizon(rows)
    if horizon is not None:
        above, below = rows[max(horizon - height // 4, 0) : horizon - 3], rows[horizon + 3 : horizon + height // 4]
        return Background(frozenset(_landscapes(above.mean(axis=0), below.mean(axis=0))))
    names = {"night"} if _is_night(picture, rows, mask) else set()
    if float(oklab.distance(top, bottom)) < _GRADIENT:
        return Background(frozenset(names | {oklab.name(rows.mean(axis=0))}))
    return Background(frozenset(names | set(_gradients(top, bottom))))


def _horizon(rows: Lab) -> int | None:
    """The row below the horizon: where the colour jumps, in the middle of the picture; None if it changes gradually."""
    height = len(rows)
    jump = oklab.distance(rows[6:], rows[:-6])
    low, high = int(0.25 * height), int(0.85 * height)
    row = low + int(jump[low:high].argmax())
    around = np.concatenate([jump[max(row - 14, 0) : max(row - 7, 1)], jump[row + 8 : row + 15]])
    return row + 3 if jump[row] > max(_HORIZON, 2.5 * float(np.median(around))) else None


def _hue(colour: Lab) -> float | None:
    """OKLab hue in degrees: red about 29, yellow 110, green 142, blue 264; None for white, gray and black."""
    _, a, b = (float(value) for value in colour)
    return float(np.degrees(np.arctan2(b, a))) % 360 if float(np.hypot(a, b)) > _COLOURLESS else None


def _landscapes(above: Lab, below: Lab) -> list[str]:
    """Names of landscapes that have these colours above and below the horizon."""
    hue, ground = _hue(above), _hue(below)
    light, ground_light = float(above[0]), float(below[0])
    blue_sky = hue is None or 180 <= hue <= 290
    names = []
    if ground is not None and 200 <= ground <= 290 and ground_light < light:
        names.append("sea")
    if ground is not None and 110 <= ground <= 165:
        names.append("meadow")
    if ground_light > 0.85 and (ground is None or float(np.hypot(*below[1:])) < 0.04) and blue_sky:
        names.append("snow")
    if ground is not None and 40 <= ground <= 108 and ground_light > 0.5:
        names.append("desert")
    return names


def _gradients(top: Lab, bottom: Lab) -> list[str]:
    names = [f"{oklab.name(top)} to {oklab.name(bottom)}"]
    hues = _hue(top), _hue(bottom)
    blue_top = hues[0] is not None and 215 <= hues[0] <= 285
    if blue_top and float(bottom[0]) > float(top[0]) and (hues[1] is None or 180 <= hues[1] <= 290):
        names.append("sky")
    purple_top = hues[0] is not None and 275 <= hues[0] <= 350
    if purple_top and hues[1] is not None and (20 <= hues[1] <= 100):
        names.append("sunset")
    return names


def _is_night(picture: Lab, rows: Lab, mask: Mask) -> bool:
    """Whether the sky is dark, blue if anything, and has stars: still pixels that are brighter than their row."""
    mean = rows.mean(axis=0)
    hue = _hue(mean)
    if float(mean[0]) > 0.38 or (hue is not None and not 215 <= hue <= 320):
        return False
    brighter: npt.NDArray[np.bool_] = picture[..., 0] > rows[None, :, None, 0] + _STAR
    stars = (brighter & ~mask).mean(axis=0) > 0.4
    stars[int(0.84 * len(rows)) :] = False  # the caption is there
    return float(stars.mean()) > _STARS
