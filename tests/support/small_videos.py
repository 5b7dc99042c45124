"""Encodes a tenth of the width and height of a video: 0.1 s of a core instead of 1.8, where nobody looks at pixels."""

from pathlib import Path
from typing import Any

import pytest

from handler.encode import Target


def make_videos_small(patch: pytest.MonkeyPatch) -> None:
    """From now on the workers of this process encode small videos."""
    patch.setattr("handler.worker.Target", _small_target)


def _small_target(video: Path, poster: Path, sheet: Path, width: int, height: int, frames: int, **named: Any) -> Target:
    shrink = 10 if height > 64 else 1  # the warm-up's video is small already
    return Target(video, poster, sheet, width // shrink, height // shrink, frames, **named)
