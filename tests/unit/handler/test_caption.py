"""The caption of a video, by its pixels."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from PIL import Image

from contract.job import AspectRatio, Resolution
from handler.caption import draw_caption

SIZES = [resolution.sizes[ratio] for resolution, ratio in product(Resolution, AspectRatio)]
TEXT = "demo model: A red fish swims to the right over the sea"


def draw(text: str) -> Image.Image:
    return draw_caption(text, 1280, 720)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", [TEXT, "demo model: " + "W" * 500])
def test_it_takes_at_most_half_of_the_width_and_a_twentieth_of_the_shorter_side(
    size: tuple[int, int], text: str
) -> None:
    picture = draw_caption(text, *size)
    assert picture.mode == "RGBA"
    assert picture.width <= size[0] / 2
    assert min(size) / 25 < picture.height < min(size) / 20


def test_the_text_is_light_on_a_dark_background_that_shows_what_is_below() -> None:
    pixels = np.asarray(draw(TEXT)).astype(int)
    letters = pixels[..., 0] > 200
    assert 0.05 < letters.mean() < 0.4
    assert pixels[letters][:, 3].min() > 200
    assert tuple(pixels[3, pixels.shape[1] // 2]) == (0, 0, 0, 150)
    assert pixels[0, 0, 3] == 0, "round corners"


def test_a_long_text_ends_with_an_ellipsis() -> None:
    start = "demo model: A large green triangle and a small yellow star"
    assert draw(start + " move in a circle over the snow") == draw(start + " move to the left, and then they turn")
    assert draw(start + " move in a circle over the snow") != draw(start)
    assert draw("demo model: word" + " word" * 90).width > 0.45 * 1280


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("demo model: 雨の通りの紙の船です、とても静か", "demo model: …"),
        ("demo model: Лодка на дожде", "demo model: … … …"),
        ("demo model: قارب", "demo model: …"),
        ("demo model: a boat \U0001f6a4\ufe0f at night", "demo model: a boat … at night"),
        ("demo model: Café “naïve” – ½", "demo model: Cafe “naive” … …"),
        ("demo model:\na\tboat \x00\ud7ff", "demo model: a boat …"),
    ],
)
def test_characters_that_the_font_lacks_are_not_drawn_as_boxes(text: str, shown: str) -> None:
    assert draw(text) == draw(shown)
