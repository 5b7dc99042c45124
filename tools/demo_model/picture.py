"""`make demo-picture`: docs/demo.png, a frame of each of three videos of the demo model, over their prompts.

python -m tools.demo_model.picture docs/demo.png
"""

import sys
from pathlib import Path
from threading import Event
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from contract.job import JobInput
from handler.settings import WorkerSettings
from handler.video_model.base import VideoModel
from handler.video_model.loader import load_model

#: Each prompt with its seed and the frame that is shown, of 121.
SHOWN: Final = (
    ("A red fish swims to the right over the sea", 0, 48),
    ("A yellow star spins in the starry night sky", 1, 60),
    ("A pink heart grows on a white background", 2, 110),
)
_FRAME: Final = (432, 240)
_GAP: Final = 12
_TEXT_HEIGHT: Final = 30
_FONT_SIZE: Final = 16


def draw_picture(model: VideoModel, path: Path) -> None:
    """Writes a PNG with the frames side by side and each prompt below its frame."""
    width, height = _FRAME
    picture = Image.new("RGB", (len(SHOWN) * (width + _GAP) - _GAP, height + _TEXT_HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_SIZE)
    for index, (prompt, seed, shown) in enumerate(SHOWN):
        left = index * (width + _GAP)
        frame = _frame(model, prompt, seed, shown)
        picture.paste(Image.fromarray(frame).resize(_FRAME, Image.Resampling.LANCZOS), (left, 0))
        draw.text((left + width / 2, height + _TEXT_HEIGHT / 2), prompt, fill="black", font=font, anchor="mm")
    picture.save(path, optimize=True)


def _frame(model: VideoModel, prompt: str, seed: int, shown: int) -> npt.NDArray[np.uint8]:
    """(height, width, 3)."""
    job_input = JobInput(prompt=prompt, duration=5)
    chunks = list(model.render(job_input, seed=seed, on_progress=lambda *_: None, cancelled=Event()))
    frame: npt.NDArray[np.uint8] = np.concatenate(chunks)[shown]
    return frame


if __name__ == "__main__":
    draw_picture(load_model(WorkerSettings(model_path="demo")), Path(sys.argv[1]))
