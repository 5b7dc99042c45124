"""The encoder, with the ffmpeg of the package imageio-ffmpeg."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import psutil
import pytest

from contract.job import AspectRatio, Resolution
from handler.encode import DiskFullError, EncodeError, Target, codec, encode, files_in
from handler.video_model.base import Frames
from tests.support.mp4 import picture, probe, shows_caption


def target(directory: Path, *, width: int = 1280, height: int = 720, num_frames: int = 25) -> Target:
    return Target(*files_in(directory), width, height, num_frames)


def flat(color: tuple[int, int, int], frames: int, size: tuple[int, int] = (128, 72)) -> Iterator[Frames]:
    width, height = size
    for _ in range(frames):
        yield np.full((1, height, width, 3), color, dtype=np.uint8)


def pixel(path: Path, x: int, y: int, frame: int = 0) -> tuple[int, ...]:
    """One pixel's RGB as a player shows it, by the file's own tags."""
    run = subprocess.run(
        [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-i", str(path)),
            *("-vf", f"select=eq(n\\,{frame}),crop=2:2:{x}:{y},format=rgb24", "-frames:v", "1", "-f", "rawvideo", "-"),
        ],
        capture_output=True,
        check=True,
    )
    return tuple(run.stdout[:3])


def ignore(_: int) -> None:
    pass


@pytest.mark.parametrize("size", [(1280, 720), (1920, 1080)])
def test_the_file_plays_everywhere(tmp_path: Path, size: tuple[int, int]) -> None:
    seen: list[int] = []
    encode(flat((10, 200, 30), 25), target(tmp_path, width=size[0], height=size[1]), seen.append)
    video = probe(tmp_path / "video.mp4")
    assert (video.codec, video.pixel_format, video.color) == ("h264", "yuv420p", "tv, bt709, progressive")
    assert (video.width, video.height, video.fps, video.num_frames) == (*size, 24.0, 25)
    assert video.is_faststart
    assert sorted(set(seen)) == list(range(26))
    assert seen == sorted(seen)


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 120, 200)])
def test_colours_survive_because_frames_are_converted_to_bt709_and_not_only_labelled(
    tmp_path: Path, color: tuple[int, int, int]
) -> None:
    encode(flat(color, 5), target(tmp_path, num_frames=5), ignore)
    for path, frame in ((tmp_path / "video.mp4", 4), (tmp_path / "poster.jpg", 0)):
        assert np.allclose(pixel(path, 600, 300, frame), color, atol=4), path.name


def test_frames_of_another_shape_are_cropped_evenly_and_not_stretched(tmp_path: Path) -> None:
    """A square frame loses its upper and lower parts in 16:9, and its middle stays in place."""
    frame = np.zeros((1, 160, 160, 3), dtype=np.uint8)
    frame[:, :30] = (255, 0, 0)
    frame[:, 130:] = (0, 0, 255)
    frame[:, 70:90, 70:90] = (255, 255, 255)
    encode(iter([frame] * 5), target(tmp_path, num_frames=5), ignore)
    assert np.allclose(pixel(tmp_path / "video.mp4", 640, 360), (255, 255, 255), atol=4)
    assert np.allclose(pixel(tmp_path / "video.mp4", 20, 20), (0, 0, 0), atol=4)
    assert np.allclose(pixel(tmp_path / "video.mp4", 20, 700), (0, 0, 0), atol=4)


def test_the_poster_is_the_middle_frame(tmp_path: Path) -> None:
    frames = (np.full((1, 72, 128, 3), 10 * index, dtype=np.uint8) for index in range(25))
    encode(frames, target(tmp_path), ignore)
    assert np.allclose(pixel(tmp_path / "poster.jpg", 640, 360), (120, 120, 120), atol=3)
    poster = probe(tmp_path / "poster.jpg", container=False)
    assert (poster.width, poster.height) == (1280, 720)


def test_the_sprite_sheet_has_sixteen_frames_of_the_whole_video_in_rows(tmp_path: Path) -> None:
    frames = (np.full((1, 72, 128, 3), 4 * index, dtype=np.uint8) for index in range(49))
    encode(frames, target(tmp_path, num_frames=49), ignore)
    sheet = picture(tmp_path / "sheet.jpg").astype(int)
    assert sheet.shape == (720, 1280, 3)
    seen = sheet[90::180, 160::320, 0].ravel()
    assert np.allclose(seen, [4 * math.ceil(sprite * 49 / 16) for sprite in range(16)], atol=4)


def test_the_sprites_of_a_portrait_video_keep_its_shape(tmp_path: Path) -> None:
    encode(flat((90, 200, 120), 25, (72, 128)), target(tmp_path, width=720, height=1280), ignore)
    assert picture(tmp_path / "sheet.jpg").shape == (1280, 720, 3)


CAPTION = "demo model: A red fish swims to the right over the sea"


@pytest.mark.parametrize(("resolution", "ratio"), list(product(Resolution, AspectRatio)))
def test_a_caption_is_in_the_lower_left_corner_of_every_frame_and_of_the_poster(
    tmp_path: Path, resolution: Resolution, ratio: AspectRatio
) -> None:
    width, height = resolution.sizes[ratio]
    files = target(tmp_path, width=width, height=height, num_frames=5)
    colour = (90, 200, 120)
    encode(flat(colour, 5), replace(files, caption=CAPTION), ignore)
    video = probe(files.video)
    assert (video.width, video.height, video.num_frames, video.pixel_format) == (width, height, 5, "yuv420p")
    assert video.color == "tv, bt709, progressive"
    for shown in (picture(files.video), picture(files.video, 4), picture(files.poster)):
        assert shows_caption(shown, CAPTION)
        assert not shows_caption(shown, CAPTION.replace("red fish", "blue boat"))
        rest = shown.astype(int)
        rest[height * 9 // 10 :, : width * 6 // 10] = colour
        assert np.abs(rest - colour).max() <= 8, "nothing else is drawn"


def test_the_captions_own_greys_survive(tmp_path: Path) -> None:
    """Its background takes 59 % of a white picture's light, and its letters are nearly white."""
    files = target(tmp_path, num_frames=5)
    encode(flat((255, 255, 255), 5), replace(files, caption=CAPTION), ignore)
    for shown in (picture(files.video, 4), picture(files.poster)):
        corner = shown[650:710, 10:200].astype(int)
        assert np.percentile(corner, 99) > 235
        assert abs(np.median(shown[673:675, 100:500].astype(int)) - 255 * (1 - 150 / 255)) < 6


def test_the_gpus_encoder_is_used_only_where_it_works() -> None:
    has_encoder = Path("/dev/nvidia0").exists()
    assert codec()[1] in (("h264_nvenc", "libx264") if has_encoder else ("libx264",))


@pytest.mark.parametrize("frames", [0, 24, 26])
def test_a_wrong_number_of_frames_is_an_error(tmp_path: Path, frames: int) -> None:
    with pytest.raises(EncodeError, match="frames"):
        encode(flat((0, 0, 0), frames), target(tmp_path), ignore)


def test_an_error_of_ffmpeg_carries_its_text(tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match="No such file or directory"):
        encode(flat((0, 0, 0), 2000), target(tmp_path / "absent", num_frames=2000), ignore)


def test_a_full_disk_has_its_own_error(tmp_path: Path) -> None:
    full = Path("/dev/full")
    for files in (replace(target(tmp_path), video=full), replace(target(tmp_path), poster=full)):
        with pytest.raises(DiskFullError, match="No space left on device"):
            encode(flat((0, 0, 0), 25), files, ignore)


def test_an_error_of_the_model_is_raised_and_ends_ffmpeg(tmp_path: Path) -> None:
    def failing() -> Iterator[Frames]:
        yield from flat((0, 0, 0), 3)
        raise RuntimeError("in the model")

    with pytest.raises(RuntimeError, match="in the model"):
        encode(failing(), target(tmp_path), ignore)
    assert not [child for child in psutil.Process().children() if "ffmpeg" in child.name()]


def of_this_process() -> psutil.Process:
    (process,) = (child for child in psutil.Process().children() if "ffmpeg" in child.name())
    return process


def large(frames: int) -> Iterator[Frames]:
    """Each frame is larger than a pipe holds."""
    yield from flat((0, 0, 0), frames, (640, 360))


def test_the_model_computes_while_ffmpeg_encodes(tmp_path: Path) -> None:
    """The next chunk is asked for although ffmpeg, which is stopped, has not read the one before."""
    asked_while_stopped: list[int] = []

    def frames() -> Iterator[Frames]:
        for number, chunk in enumerate(large(25)):
            if number == 10:
                of_this_process().suspend()
            if number == 12:
                asked_while_stopped.append(number)
                of_this_process().resume()
            yield chunk

    encode(frames(), target(tmp_path), ignore)
    assert asked_while_stopped == [12]
    assert probe(tmp_path / "video.mp4").num_frames == 25


def test_only_a_few_chunks_wait_for_ffmpeg_and_it_can_be_killed_meanwhile(tmp_path: Path) -> None:
    kill: list[Callable[[], None]] = []
    asked: list[int] = []
    seen: list[int] = []

    def frames() -> Iterator[Frames]:
        for number, chunk in enumerate(large(200)):
            asked.append(number)
            if number == 10:
                of_this_process().suspend()
                threading.Timer(1.0, kill[0]).start()
            yield chunk

    with pytest.raises(EncodeError, match="stopped reading"):
        encode(frames(), target(tmp_path, num_frames=200), seen.append, kill.append)
    assert asked[-1] <= 13, "one that is being written and two that wait, after those that ffmpeg has read"
    assert seen[-1] >= 7
    assert not [child for child in psutil.Process().children() if "ffmpeg" in child.name()]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ffmpeg")]


def test_an_error_of_the_model_does_not_wait_for_a_stopped_ffmpeg(tmp_path: Path) -> None:
    def failing() -> Iterator[Frames]:
        for number, chunk in enumerate(large(25)):
            if number == 1:
                of_this_process().suspend()
            if number == 2:  # two chunks may wait for ffmpeg, even if it has taken none
                raise RuntimeError("in the model")
            yield chunk

    with pytest.raises(RuntimeError, match="in the model"):
        encode(failing(), target(tmp_path), ignore)
    assert not [child for child in psutil.Process().children() if "ffmpeg" in child.name()]


#: Encodes into the directory at argv[1] until it is killed.
ENDLESS = """
import itertools, sys
from pathlib import Path
import numpy as np
from handler.encode import Target, encode

directory = Path(sys.argv[1])
files = [directory / name for name in ("video.mp4", "poster.jpg", "sheet.jpg")]
frames = np.zeros((1, 36, 64, 3), np.uint8)
encode(itertools.repeat(frames), Target(*files, 64, 36, 1), lambda _: print(flush=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
def test_a_stopped_ffmpeg_dies_with_its_worker(tmp_path: Path) -> None:
    """It does not notice that its pipe was closed."""
    with subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"\n"
        (ffmpeg,) = psutil.Process(worker.pid).children()
        ffmpeg.suspend()
        worker.kill()
    _, alive = psutil.wait_procs([ffmpeg], 10)
    for process in alive:
        process.kill()
    assert not alive
