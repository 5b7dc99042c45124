"""A picture of the prompts that came out wrong: three frames of each, what was asked, and what was seen."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from tools.demo_model.evaluation.prompts import Prompt
from tools.demo_model.evaluation.seen import Seen

#: Pixels of a frame on the sheet, and of the text beside three of them.
_FRAME: Final = (240, 135)
_TEXT: Final = 520
_GAP: Final = 6
#: Prompts on a sheet at most.
_ROWS: Final = 60


@dataclass(frozen=True)
class Shown:
    """A prompt, its first, middle and last frame (3, height, width, 3), and the judgement."""

    prompt: Prompt
    frames: npt.NDArray[np.uint8]
    seen: Seen
    judged: dict[str, bool]


def write_sheet(path: Path, failures: Sequence[Shown]) -> None:
    """Writes a PNG with a row for each failure."""
    rows = failures[:_ROWS]
    width, height = 3 * (_FRAME[0] + _GAP) + _TEXT, max(len(rows), 1) * (_FRAME[1] + _GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, shown in enumerate(rows):
        top = row * (_FRAME[1] + _GAP)
        for column, frame in enumerate(shown.frames):
            image = Image.fromarray(frame)
            image.thumbnail(_FRAME)
            sheet.paste(image, (column * (_FRAME[0] + _GAP), top))
        draw.multiline_text((3 * (_FRAME[0] + _GAP) + 4, top + 2), _text(shown), fill="black", font=font)
    sheet.save(path)


def _text(shown: Shown) -> str:
    """What was asked for, seen and wrong."""
    asked = "; ".join(map(str, shown.prompt.objects))
    seen = "; ".join(map(str, shown.seen.objects)) or "no object"
    wrong = ", ".join(aspect for aspect, right in shown.judged.items() if not right)
    lines = [
        *textwrap.wrap(shown.prompt.text, 78),
        f"asked: {asked}, {shown.prompt.scene}",
        f"seen: {seen}, {shown.seen.background}",
        f"wrong: {wrong}",
    ]
    return "\n".join(line for text in lines for line in textwrap.wrap(text, 78))
