"""A caption for a lower corner of a video: light text on a dark, rounded, half-transparent background."""

import unicodedata
from bisect import bisect_right
from itertools import groupby
from typing import Final

from PIL import Image, ImageDraw, ImageFont

#: The caption's height, as a fraction of the picture's shorter side.
_HEIGHT: Final = 1 / 22
#: The largest width of the caption, as a fraction of the picture's width.
_WIDTH: Final = 0.5
#: The size of the font and the space beside the text, as fractions of the caption's height.
_FONT: Final = 0.64
_PADDING: Final = 0.36
_TEXT: Final = (255, 255, 255, 235)
_BACKGROUND: Final = (0, 0, 0, 150)
_ELLIPSIS: Final = "…"
#: A code point that no font draws: a font shows its sign for unknown characters.
_UNKNOWN: Final = "\uffff"


def draw_caption(text: str, width: int, height: int) -> Image.Image:
    """The caption of a picture with this width and height, as RGBA.

    A text that is too long ends with an ellipsis. An ellipsis also takes the place of characters that Pillow's own
    font lacks, which has letters without accents only: `Café 東京, at night` is drawn as `Cafe …, at night`.
    """
    tall = 2 * round(min(width, height) * _HEIGHT / 2)  # even, as the positions of yuv420p's colours
    padding = round(tall * _PADDING)
    font = ImageFont.load_default(tall * _FONT)
    assert isinstance(font, ImageFont.FreeTypeFont)  # noqa: S101 - tells the type checker that a size was passed
    shown = _shortened(_drawable(text, font), font, width * _WIDTH - 2 * padding)
    wide = round(font.getlength(shown)) + 2 * padding
    picture = Image.new("RGBA", (wide, tall))
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle((0, 0, wide - 1, tall - 1), radius=tall / 2, fill=_BACKGROUND)
    draw.text((padding, tall / 2), shown, font=font, fill=_TEXT, anchor="lm")
    return picture


def _drawable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text in one line and in the characters that the font has."""
    letters = [each for each in unicodedata.normalize("NFD", " ".join(text.split())) if not unicodedata.combining(each)]
    unknown = bytes(font.getmask(_UNKNOWN))
    known = {letter for letter in set(letters) if bytes(font.getmask(letter)) != unknown}
    runs = groupby(letters, key=known.__contains__)
    return "".join("".join(run) if is_known else _ELLIPSIS for is_known, run in runs)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(
        range(1, len(text)), width, key=lambda kept: font.getlength(text[:kept].rstrip() + _ELLIPSIS)
    )
    return text[:fitting].rstrip() + _ELLIPSIS
