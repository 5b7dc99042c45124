"""Clips drawn with PIL whose contents are known, for the tests of the demo model's evaluation."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT, FPS, SECONDS = 288, 160, 4, 5
#: Pixels are drawn four times as large and scaled down.
_FINER = 4

COLOURS = {
    "red": (218, 38, 40),
    "orange": (250, 135, 20),
    "yellow": (245, 212, 40),
    "green": (45, 150, 62),
    "turquoise": (45, 196, 190),
    "blue": (38, 84, 214),
    "purple": (128, 48, 168),
    "pink": (248, 128, 182),
    "brown": (122, 74, 36),
    "white": (248, 248, 246),
    "gray": (134, 136, 138),
    "black": (16, 16, 18),
}
#: The colour of the first row, of the rows above the horizon, below it, and of the last row.
SCENES = {
    "sea": ((176, 214, 240), (190, 220, 240), (28, 100, 176), (20, 84, 160)),
    "meadow": ((120, 184, 240), (150, 200, 244), (86, 168, 70), (76, 158, 62)),
    "snow": ((150, 166, 186), (172, 186, 204), (242, 244, 248), (248, 250, 252)),
    "desert": ((150, 186, 216), (214, 208, 184), (222, 188, 122), (214, 176, 108)),
}
GRADIENTS = {"sky": ((52, 120, 220), (178, 214, 246)), "sunset": ((88, 44, 122), (250, 146, 60))}
NIGHT = (12, 16, 46)


@dataclass(frozen=True)
class Drawn:
    """An object of a clip."""

    colour: str
    kind: str
    motion: str
    radius: float = 0.19  # of the picture's height
    place: tuple[float, float] = (0.5, 0.5)  # of the picture's width and height, halfway through the clip


def clip(
    scene: str, objects: Sequence[Drawn], *, size: tuple[int, int] = (WIDTH, HEIGHT), seconds: int = SECONDS
) -> npt.NDArray[np.uint8]:
    """Frames (FPS * seconds + 1, height, width, 3). `scene` is a colour, "COLOUR to COLOUR", or a name."""
    behind = _scene(scene, size)
    frames = []
    for index in range(FPS * seconds + 1):
        frame = behind.copy()
        for drawn in objects:
            _draw(frame, drawn, index / FPS, seconds)
        frames.append(np.asarray(frame))
    return np.array(frames)


def noisy(frames: npt.NDArray[np.uint8], seed: int = 0) -> npt.NDArray[np.uint8]:
    """The frames with a slight blur, noise, and JPEG's losses."""
    generator = np.random.default_rng(seed)
    out = []
    for frame in frames:
        blurred = np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(0.9)), np.float32)
        coarse = generator.normal(0, 5, (frame.shape[0] // 8 + 1, frame.shape[1] // 8 + 1, 3))
        coarse = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)[: frame.shape[0], : frame.shape[1]]
        grainy = blurred + coarse + generator.normal(0, 3, frame.shape)
        file = BytesIO()
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=60)
        out.append(np.asarray(Image.open(file)))
    return np.array(out)


def with_caption(frames: npt.NDArray[np.uint8], text: str) -> npt.NDArray[np.uint8]:
    """The frames with a text in the lower left corner."""
    out = []
    for frame in frames:
        image = Image.fromarray(frame)
        draw = ImageDraw.Draw(image)
        top = image.height - 13
        draw.text((5, top + 1), text, fill=(0, 0, 0))
        draw.text((4, top), text, fill=(255, 255, 255))
        out.append(np.asarray(image))
    return np.array(out)


def _scene(scene: str, size: tuple[int, int]) -> Image.Image:
    width, height = size
    if scene in COLOURS:
        return Image.new("RGB", size, COLOURS[scene])
    if scene in SCENES:
        first, above, below, last = SCENES[scene]
        horizon = round(0.6 * height)
        image = Image.new("RGB", size)
        image.paste(_gradient(first, above, (width, horizon)), (0, 0))
        image.paste(_gradient(below, last, (width, height - horizon)), (0, horizon))
        if scene == "sea":
            _waves(image, horizon)
        return image
    if scene == "night":
        return _night(size)
    if scene in GRADIENTS:
        return _gradient(*GRADIENTS[scene], size)
    one, other = scene.split(" to ")
    return _gradient(COLOURS[one], COLOURS[other], size)


def _gradient(top: tuple[int, ...], bottom: tuple[int, ...], size: tuple[int, int]) -> Image.Image:
    share = np.linspace(0, 1, size[1])[:, None, None]
    rows = (1 - share) * np.array(top) + share * np.array(bottom)
    return Image.fromarray(np.broadcast_to(rows, (size[1], size[0], 3)).round().astype(np.uint8))


def _waves(image: Image.Image, horizon: int) -> None:
    draw, random_ = ImageDraw.Draw(image), random.Random(7)
    for _ in range(14):
        x, y = random_.randrange(image.width), random_.randrange(horizon + 4, image.height - 3)
        draw.line((x, y, x + random_.randrange(10, 30), y), fill=(120, 176, 224), width=1)


def _night(size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, NIGHT)
    draw, random_ = ImageDraw.Draw(image), random.Random(11)
    for _ in range(45):
        x, y, radius = random_.randrange(size[0]), random_.randrange(size[1]), random_.choice((0, 0, 1))
        draw.rectangle((x, y, x + radius, y + radius), fill=(236, 236, 240))
    return image


def _draw(frame: Image.Image, drawn: Drawn, time: float, seconds: int) -> None:
    centred = time - seconds / 2
    x, y = drawn.place[0] * frame.width, drawn.place[1] * frame.height
    radius, angle = drawn.radius * frame.height, 0.0
    match drawn.motion:
        case "left":
            x -= 0.07 * frame.width * centred
        case "right":
            x += 0.07 * frame.width * centred
        case "up":
            y -= 0.07 * frame.height * centred
        case "down":
            y += 0.07 * frame.height * centred
        case "circling":
            x += 0.13 * frame.height * math.cos(math.tau * time / 5)
            y += 0.13 * frame.height * math.sin(math.tau * time / 5)
        case "bouncing":
            y += frame.height * (0.08 - 0.16 * abs(math.sin(math.pi * time / 1.6)))
        case "growing":
            radius *= 1.1**centred
        case "shrinking":
            radius *= 1.1**-centred
        case "spinning":
            angle = 72 * time
    box = max(round(2.6 * radius), 8)
    stencil = Image.new("L", (_FINER * box, _FINER * box))
    _stencil(stencil, drawn.kind, _FINER * radius)
    if angle:
        stencil = stencil.rotate(angle, Image.Resampling.BICUBIC)
    stencil = stencil.resize((box, box), Image.Resampling.BOX)
    frame.paste(Image.new("RGB", (box, box), COLOURS[drawn.colour]), (round(x - box / 2), round(y - box / 2)), stencil)


def _stencil(stencil: Image.Image, kind: str, radius: float) -> None:
    """Draws the kind in white on the black stencil, with another hand than the evaluation's templates."""
    draw, centre = ImageDraw.Draw(stencil), stencil.width / 2
    for shape, points, fill in _SHAPES[kind]:
        placed = [(centre + radius * x, centre + radius * y) for x, y in points]
        if shape == "oval":
            draw.ellipse(placed, fill=fill)
        elif shape == "box":
            draw.rectangle(placed, fill=fill)
        else:
            draw.polygon(placed, fill=fill)


def _spokes(number: int, inner: float) -> list[tuple[float, float]]:
    turn = math.pi / number
    reach = [1 if index % 2 == 0 else inner for index in range(2 * number)]
    return [(far * math.sin(turn * index), -far * math.cos(turn * index)) for index, far in enumerate(reach)]


def _ray(angle: float) -> list[tuple[float, float]]:
    x, y = math.cos(angle), math.sin(angle)
    return [(r * x - s * y, r * y + s * x) for r, s in ((0.68, 0.09), (1, 0.09), (1, -0.09), (0.68, -0.09))]


#: What each kind consists of, in order: the shape, its points in radii from the centre, and 255 or, for a hole, 0.
_SHAPES: dict[str, list[tuple[str, list[tuple[float, float]], int]]] = {
    "ball": [("oval", [(-1, -1), (1, 1)], 255)],
    "square": [("box", [(-0.85, -0.85), (0.85, 0.85)], 255)],
    "triangle": [("polygon", [(0, -1), (0.92, 0.7), (-0.92, 0.7)], 255)],
    "star": [("polygon", _spokes(5, 0.42), 255)],
    "heart": [
        ("oval", [(-0.98, -0.85), (0.05, 0.18)], 255),
        ("oval", [(-0.05, -0.85), (0.98, 0.18)], 255),
        ("polygon", [(-0.92, -0.12), (-0.48, -0.4), (0.48, -0.4), (0.92, -0.12), (0, 0.95)], 255),
    ],
    "ring": [("oval", [(-1, -1), (1, 1)], 255), ("oval", [(-0.55, -0.55), (0.55, 0.55)], 0)],
    "cross": [("box", [(-0.95, -0.3), (0.95, 0.3)], 255), ("box", [(-0.3, -0.95), (0.3, 0.95)], 255)],
    "diamond": [("polygon", [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)], 255)],
    "moon": [("oval", [(-1, -1), (1, 1)], 255), ("oval", [(-0.4, -0.85), (1.3, 0.85)], 0)],
    "fish": [
        ("oval", [(-0.55, -0.5), (1, 0.5)], 255),
        ("polygon", [(-0.4, 0), (-1, -0.48), (-1, 0.48)], 255),
    ],
    "boat": [
        ("polygon", [(-1, 0.3), (1, 0.3), (0.7, 0.8), (-0.7, 0.8)], 255),
        ("polygon", [(-0.05, -0.95), (-0.05, 0.2), (0.75, 0.2)], 255),
        ("box", [(-0.1, -0.95), (0, 0.35)], 255),
    ],
    "sun": [
        ("oval", [(-0.55, -0.55), (0.55, 0.55)], 255),
        *(("polygon", _ray(math.tau * index / 8), 255) for index in range(8)),
    ],
    "house": [
        ("box", [(-0.75, -0.15), (0.75, 0.9)], 255),
        ("polygon", [(-0.95, -0.15), (0, -0.95), (0.95, -0.15)], 255),
        ("box", [(-0.18, 0.35), (0.18, 0.95)], 0),
    ],
    "tree": [
        ("box", [(-0.12, 0.5), (0.12, 1)], 255),
        ("polygon", [(0, -1), (0.45, -0.25), (-0.45, -0.25)], 255),
        ("polygon", [(0, -0.6), (0.6, 0.2), (-0.6, 0.2)], 255),
        ("polygon", [(0, -0.15), (0.75, 0.65), (-0.75, 0.65)], 255),
    ],
}
