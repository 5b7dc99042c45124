"""Reads the properties of an MP4 with the ffmpeg that we ship (imageio-ffmpeg has no ffprobe)."""

from __future__ import annotations

import io
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
from PIL import Image

from handler.caption import draw_caption


@dataclass(frozen=True)
class Video:
    codec: str
    pixel_format: str
    color: str
    width: int
    height: int
    fps: float
    num_frames: int
    boxes: tuple[str, ...]

    @property
    def is_faststart(self) -> bool:
        return self.boxes.index("moov") < self.boxes.index("mdat")


def probe(path: Path, *, container: bool = True) -> Video:
    """Decodes the whole file and fails on any decoding error. `container=True` also reads the boxes of the MP4."""
    run = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-xerror", "-i", str(path), "-map", "0:v", "-f", "null", "-"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    stream = re.search(r"Video: (\w+).*?, (\w+)(?:\(([^)]*)\))?, (\d+)x(\d+).*?, ([\d.]+) fps", run.stderr)
    frames = re.findall(r"frame=\s*(\d+)", run.stderr)
    assert stream is not None, run.stderr
    codec, pixel_format, color, width, height, fps = stream.groups()
    return Video(
        codec,
        pixel_format,
        color or "",
        int(width),
        int(height),
        float(fps),
        int(frames[-1]),
        _boxes(path) if container else (),
    )


def picture(path: Path, frame: int = 0) -> npt.NDArray[np.uint8]:
    """One frame of a video, or an image, in RGB as a player shows it; of shape (height, width, 3)."""
    run = subprocess.run(
        [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-i", str(path)),
            *("-vf", f"select=eq(n\\,{frame}),format=rgb24", "-frames:v", "1", "-f", "image2pipe"),
            *("-c:v", "ppm", "-"),
        ],
        capture_output=True,
        check=True,
    )
    return np.asarray(Image.open(io.BytesIO(run.stdout)))


def shows_caption(frame: npt.NDArray[np.uint8], text: str) -> bool:
    """Whether the lower left corner of the frame has this caption: light letters, dark around them."""
    height, width = frame.shape[:2]
    margin = min(width, height) // 80 * 2
    drawn = np.asarray(draw_caption(text, width, height))
    bottom, right = height - margin, margin + drawn.shape[1]
    corner = frame[bottom - len(drawn) : bottom, margin:right].mean(axis=2)
    return bool(np.corrcoef(drawn[..., 0].ravel(), corner.ravel())[0, 1] > 0.8)


def _boxes(path: Path) -> tuple[str, ...]:
    """The types of the top-level boxes, in order (ISO/IEC 14496-12)."""
    boxes = []
    with path.open("rb") as file:
        while header := file.read(8):
            size, kind = struct.unpack(">I4s", header)
            read = 8
            if size == 1:
                (size,) = struct.unpack(">Q", file.read(8))
                read = 16
            boxes.append(kind.decode())
            if size == 0:
                break
            file.seek(size - read, 1)
    return tuple(boxes)


def decoded(path: Path, width: int, height: int) -> npt.NDArray[np.uint8]:
    """All frames (frames, height, width, 3) in RGB, scaled to this size."""
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-xerror", "-i", str(path)),
        *("-vf", f"scale={width}:{height}:flags=area:in_color_matrix=bt709", "-pix_fmt", "rgb24"),
        *("-f", "rawvideo", "-"),
    ]
    run = subprocess.run(command, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    return np.frombuffer(run.stdout, np.uint8).reshape(-1, height, width, 3)
