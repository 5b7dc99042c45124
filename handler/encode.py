"""Encodes frames to an MP4, a poster and a sprite sheet.

Frames are streamed into one ffmpeg process, never held in memory together.
A thread writes frames to ffmpeg while the model computes the next ones. All else happens in the thread of the caller.
"""

import contextlib
import errno
import itertools
import os
import subprocess
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Final

import imageio_ffmpeg

from contract.job import FPS
from handler.caption import draw_caption
from handler.machine import dying_with_parent
from handler.provenance import AI_GENERATED
from handler.video_model.base import Frames

#: CRF 18 is visually lossless (https://trac.ffmpeg.org/wiki/Encode/H.264#crf). "veryfast" keeps up with the model on
#: few cores and makes files about 10 % larger than "medium".
_X264: Final = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "18")
#: The same quality from the GPU's encoder, which many data-centre GPUs (A100, H100) lack.
_NVENC: Final = ("-c:v", "h264_nvenc", "-preset", "p5", "-tune", "hq", "-rc", "vbr", "-cq", "19", "-b:v", "0")
_JPEG: Final = ("-frames:v", "1", "-q:v", "3", "-update", "1", "-f", "image2")
#: Chunks of frames that may wait for ffmpeg, or be on their way to it, while the model computes the next one.
_AHEAD: Final = 2
#: The caption's distance from the edges: the picture's shorter side divided by this.
_MARGIN: Final = 40
#: The sprite sheet: columns and rows of small frames, and the longer side of each in pixels.
_GRID: Final = 4
_SPRITE: Final = 320
#: Seconds for the trial of NVENC.
_TRIAL_TIMEOUT: Final = 30.0
_MAX_ERROR_TEXT: Final = 2000
#: Marks the MP4 as generated, for people and for programs that know the IPTC's digital source types.
_AI_GENERATED: Final = f"comment=AI-generated video ({AI_GENERATED})"
#: How ffmpeg reports a full disk.
_FULL: Final = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


class EncodeError(Exception):
    """ffmpeg failed, or the model rendered too few or too many frames."""


class DiskFullError(EncodeError):
    """The disk is full."""


@dataclass(frozen=True)
class Target:
    """The files to write, their size in pixels and the number of frames.

    The poster is the middle frame. The sprite sheet has 16 frames that are evenly spread over the video, row by row.
    A `caption` is drawn in the lower left corner of every frame.
    """

    video: Path
    poster: Path
    sheet: Path
    width: int
    height: int
    num_frames: int
    caption: str | None = None

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """The video, its poster and its sprite sheet."""
        return self.video, self.poster, self.sheet


def files_in(directory: Path) -> tuple[Path, Path, Path]:
    """The files of a `Target` in a directory of their own."""
    return directory / "video.mp4", directory / "poster.jpg", directory / "sheet.jpg"


def encode(
    chunks: Iterable[Frames],
    target: Target,
    on_frames: Callable[[int], None],
    on_start: Callable[[Callable[[], None]], None] = lambda _: None,
) -> tuple[int, int]:
    """Write H.264 (yuv420p, bt709, index in front) and two JPEGs from RGB frames that all have the same size.

    Frames are scaled to cover the target's size and cropped evenly. Returns their (width, height) before that. For each
    chunk, `on_frames` gets the number of frames that ffmpeg has read, and it is called again before a wait for ffmpeg.
    `on_start` gets a function that kills ffmpeg, because a stopped ffmpeg blocks this call. Errors of `chunks` are
    raised unchanged; the files are then incomplete. A chunk must not change after it was yielded.

    Raises:
        DiskFullError: the disk is full.
        EncodeError: with ffmpeg's error text, or with the wrong number of frames.
    """
    iterator = iter(chunks)
    first = next(iterator, None)
    if first is None:
        raise EncodeError("the model rendered no frames")
    height, width = first.shape[1:3]
    with _file_in_memory() as errors, _file_in_memory() as caption:
        if target.caption is not None:
            draw_caption(target.caption, target.width, target.height).save(caption, "PNG")
            caption.seek(0)
        process = subprocess.Popen(
            [*dying_with_parent(), *_command(width, height, target, caption.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(caption.fileno(),),
        )
        assert process.stdin is not None  # noqa: S101 - tells the type checker about PIPE
        on_start(process.kill)
        writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ffmpeg")
        try:
            taken = _write(writer, process.stdin, itertools.chain([first], iterator), on_frames)
            process.stdin.close()
            process.wait()
        except BrokenPipeError as exc:
            process.wait()
            raise _error("ffmpeg stopped reading frames", errors) from exc
        finally:
            process.kill()
            writer.shutdown(cancel_futures=True)  # after the kill, which ends a write that waits for ffmpeg
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
        if process.returncode != 0:
            raise _error(f"ffmpeg exited with code {process.returncode}", errors)
    if taken != target.num_frames:
        raise EncodeError(f"the model rendered {taken} frames instead of {target.num_frames}")
    return width, height


def _file_in_memory() -> IO[bytes]:
    """A file that needs no disk, because the disk may be full."""
    return os.fdopen(os.memfd_create("ffmpeg"), "w+b")


def _write(
    writer: ThreadPoolExecutor, stdin: IO[bytes], chunks: Iterable[Frames], on_frames: Callable[[int], None]
) -> int:
    """Writes the chunks in order and returns their number of frames. At most `_AHEAD` of them wait."""
    under_way: deque[Future[int]] = deque()
    taken = 0

    def wait_until(left: int) -> None:
        nonlocal taken
        on_frames(taken)
        while len(under_way) > left:
            taken += under_way.popleft().result()
            on_frames(taken)

    def write(chunk: Frames) -> int:
        stdin.write(chunk.data)
        return len(chunk)

    for chunk in chunks:
        under_way.append(writer.submit(write, chunk))
        wait_until(_AHEAD)
    wait_until(0)
    return taken


def _command(width: int, height: int, target: Target, caption: int) -> list[str]:
    """`caption` is the file descriptor of the caption's PNG."""
    size = f"{target.width}:{target.height}"
    # The input is full-range RGB. `scale` converts it to bt709, `setparams` labels it so.
    fit = (
        f"scale={size}:force_original_aspect_ratio=increase:flags=lanczos+accurate_rnd"
        f":out_color_matrix=bt709:out_range=limited,crop={size},format=yuv420p"
        ",setparams=range=limited:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    )
    captioned: tuple[str, ...] = ()
    sprites = _GRID**2
    if target.caption is not None:
        captioned = ("-f", "png_pipe", "-i", f"pipe:{caption}")
        margin = 2 * (min(target.width, target.height) // (2 * _MARGIN))  # `overlay` takes even positions
        fit += (
            "[plain];[1:v]scale=out_color_matrix=bt709:out_range=limited,format=yuva420p[caption]"
            f";[plain][caption]overlay=x={margin}:y=main_h-overlay_h-{margin}"
        )
    as_jpeg = "in_color_matrix=bt709:out_color_matrix=bt601:in_range=limited:out_range=full,format=yuvj420p"
    pictures = (
        f"[stills]select=eq(n\\,{target.num_frames // 2}),scale={as_jpeg}[poster]"
        # Frame k of `sprites` is the first one at or after k/sprites of the video.
        f";[all]select=lt(mod(n*{sprites}\\,{target.num_frames})\\,{sprites})"
        f",scale={_SPRITE}:{_SPRITE}:force_original_aspect_ratio=decrease:force_divisible_by=2:{as_jpeg}"
        f",tile={_GRID}x{_GRID}[sheet]"
    )
    return [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-loglevel", "error", "-y"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}", "-framerate", str(FPS)),
        *("-i", "pipe:0", *captioned, "-filter_complex", f"[0:v]{fit},split=3[video][stills][all];{pictures}"),
        *("-map", "[video]", *codec(), "-pix_fmt", "yuv420p"),
        *("-metadata", _AI_GENERATED, "-movflags", "+faststart", "-f", "mp4", str(target.video)),
        *("-map", "[poster]", *_JPEG, str(target.poster), "-map", "[sheet]", *_JPEG, str(target.sheet)),
    ]


@cache
def codec() -> tuple[str, ...]:
    """ffmpeg's options for H.264: NVENC if a trial shows that this ffmpeg and GPU have it, otherwise x264."""
    trial = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-f", "lavfi"),
        *("-i", f"color=size=256x256:rate={FPS}:duration=0.2", *_NVENC, "-f", "null", "-"),
    ]
    try:
        works = subprocess.run(trial, capture_output=True, check=False, timeout=_TRIAL_TIMEOUT).returncode == 0
    except subprocess.TimeoutExpired:  # a GPU that hangs
        works = False
    return _NVENC if works else _X264


def _error(what: str, errors: IO[bytes]) -> EncodeError:
    errors.seek(0)
    text = errors.read()[-_MAX_ERROR_TEXT:].decode(errors="replace").strip()
    kind = DiskFullError if any(words in text for words in _FULL) else EncodeError
    return kind(f"{what}: {text}")
