"""Windows cover a video evenly, overlap as they must, and make the work of profile turbo what it may be."""

from itertools import pairwise, product

import pytest

from contract.job import AspectRatio, Profile, Resolution
from handler.video_model.catalog import CHECKPOINTS, ROUTES, TURBO_TILING, trained_size
from handler.video_model.windows import SuperResolutionTiling, Window, windows

TILING = SuperResolutionTiling(tile=(6, 9), overlap=2, window=5, stride=3)


def sides(boxes: list[Window]) -> list[list[range]]:
    """The different ranges of frames, rows and columns."""
    return [list(dict.fromkeys(getattr(box, name) for box in boxes)) for name in ("frames", "rows", "columns")]


@pytest.mark.parametrize("size", list(product((1, 5, 6, 31), (1, 6, 7, 45), (9, 10, 45, 80))))
def test_windows_cover_a_video_with_boxes_of_one_size_that_overlap(size: tuple[int, int, int]) -> None:
    boxes = windows(TILING, *size)
    wide = size[2] >= size[1]
    largest = (5, *((6, 9) if wide else (9, 6)))
    for ranges, length, most, overlap in zip(sides(boxes), size, largest, (2, 2, 2), strict=True):
        assert (ranges[0].start, ranges[-1].stop) == (0, length)
        assert {len(each) for each in ranges} == {len(ranges[0])}
        assert len(ranges[0]) <= most
        assert all(before.stop - after.start >= overlap for before, after in pairwise(ranges))
    assert len(boxes) == len(set(boxes)) == len(list(product(*sides(boxes))))


def test_a_video_that_fits_has_one_window_and_so_has_one_without_a_tiling() -> None:
    whole = [Window(range(5), range(6), range(9))]
    assert windows(TILING, 5, 6, 9) == whole == windows(None, 5, 6, 9)
    assert len(windows(TILING, 5, 6, 10)) == 2
    assert len(windows(TILING, 6, 6, 9)) == 2


def test_windows_are_no_larger_than_their_overlap_requires() -> None:
    assert sides(windows(SuperResolutionTiling((10, 10), 2, 10, 8), 11, 11, 18)) == [
        [range(7), range(4, 11)],
        [range(7), range(4, 11)],
        [range(10), range(8, 18)],
    ]


def test_a_video_that_is_higher_than_wide_has_the_windows_of_one_that_is_wider_than_high() -> None:
    wide, high = windows(TURBO_TILING, 31, 45, 80), windows(TURBO_TILING, 31, 80, 45)
    assert {(box.frames, box.columns, box.rows) for box in wide} == {
        (box.frames, box.rows, box.columns) for box in high
    }


#: Of the real transformer: blocks, and channels of its hidden states.
LAYERS, WIDTH = 54, 2048
#: TFLOP/s: 60 % of an H100's peak in 16 bits, which 8-bit attention doubles.
REACHED = 0.6 * 989.4
#: Tokens of a prompt of some sixty words.
TEXT = 128


def pass_seconds(tokens: int, eight_bit: bool) -> float:
    """24 D^2 operations a token in linear layers, 4 D for each pair of tokens in attention."""
    linear, attention = 24 * tokens * WIDTH**2, 4 * tokens**2 * WIDTH
    return LAYERS * (linear + attention / (2 if eight_bit else 1)) / REACHED / 1e12


def turbo_seconds(resolution: Resolution, duration: int, aspect_ratio: AspectRatio, *, eight_bit: bool) -> float:
    """Denoising, super-resolution and decoding, calculated from shapes.

    A decoded latent takes 25.5 GFLOP, one of the first frame 8.3: counted on the meta device at the decoder's real
    size.
    """
    route, frames = ROUTES[Profile.TURBO, resolution], 6 * duration + 1
    wide, high = map(int, aspect_ratio.split(":"))
    base, upscaler = (CHECKPOINTS[name] for name in route.checkpoints)
    (base_width, base_height), (width, height) = (trained_size(each.base_size, wide, high) for each in (base, upscaler))
    denoising = pass_seconds(frames * base_height * base_width // 256 + TEXT, eight_bit)
    boxes = windows(route.tiling, frames, height // 16, width // 16)
    upscaling = sum(pass_seconds(box.tokens + TEXT, eight_bit) for box in boxes)
    decoding = width * height / 256 * (8.3e9 + (frames - 1) * 25.5e9) / REACHED / 1e12
    steps = base.sampling.num_inference_steps, upscaler.sampling.num_inference_steps
    return steps[0] * denoising + steps[1] * upscaling + decoding


@pytest.mark.parametrize("aspect_ratio", AspectRatio)
@pytest.mark.parametrize(
    ("resolution", "duration", "most"),
    [(Resolution.P720, 5, 30), (Resolution.P720, 10, 60), (Resolution.P1080, 5, 45), (Resolution.P1080, 10, 90)],
)
def test_turbo_takes_the_documented_times_at_60_percent_of_an_h100(
    resolution: Resolution, duration: int, most: int, aspect_ratio: AspectRatio
) -> None:
    assert turbo_seconds(resolution, duration, aspect_ratio, eight_bit=True) < 0.97 * most
    if resolution is Resolution.P1080:
        assert turbo_seconds(resolution, duration, aspect_ratio, eight_bit=False) < most, "and without 8-bit attention"
