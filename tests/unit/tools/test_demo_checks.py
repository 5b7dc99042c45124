"""The checks of `make eval-demo` pass for a model that follows its prompt and its seed, and fail for others."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from threading import Event

import pytest
from PIL import Image

from contract.job import AspectRatio, JobInput
from handler.video_model.base import Frames, OnPreview, OnProgress, no_preview
from tests.support.drawn_clips import Drawn, clip
from tests.support.scripted_model import ScriptedModel
from tools.demo_model.evaluation.checks import (
    Check,
    Clip,
    Renderer,
    other_seeds,
    own_prompt,
    renders,
    same_seed,
    swapped_prompts,
    without_guidance,
)
from tools.demo_model.evaluation.prompts import AskedObject, Prompt

PROMPTS = [
    Prompt(f"A {colour} {kind} on {scene}", (AskedObject(colour, kind, "still"),), scene)
    for colour, kind, scene in (("red", "ball", "white"), ("yellow", "square", "black"))
]

Draw = Callable[[JobInput, int], Frames]


class DrawingModel(ScriptedModel):
    """Draws its videos with PIL, of 24 frames."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self._draw = draw

    def render(
        self,
        job_input: JobInput,
        *,
        seed: int,
        on_progress: OnProgress,
        cancelled: Event,
        image: Image.Image | None = None,
        on_preview: OnPreview = no_preview,
    ) -> Generator[Frames, None, None]:
        yield self._draw(job_input, seed)


def picture(prompt: Prompt, place: tuple[float, float]) -> Frames:
    (asked,) = prompt.objects
    drawn = Drawn(asked.colour, asked.kind, asked.motion, 0.25, place)
    return clip(prompt.scene, [drawn], size=(144, 80), seconds=1).repeat(5, axis=0)


def faithful(job_input: JobInput, seed: int) -> Frames:
    """What the prompt asks for, at a place that the seed chooses; without guidance, a gray picture."""
    if job_input.guidance_scale == 1:
        return clip("gray", [], size=(144, 80), seconds=1)
    draw = random.Random(seed)
    (prompt,) = (each for each in PROMPTS if each.text == job_input.prompt)
    return picture(prompt, (draw.uniform(0.2, 0.8), draw.uniform(0.3, 0.7)))


def deaf(job_input: JobInput, seed: int) -> Frames:
    """The same video for every prompt and seed."""
    return picture(PROMPTS[0], (0.5, 0.5))


def fickle(job_input: JobInput, seed: int) -> Frames:
    """Another video each time."""
    return picture(PROMPTS[0], (random.uniform(0.2, 0.8), 0.5))


def rendered(draw: Draw) -> tuple[Renderer, Sequence[Clip]]:
    renderer = Renderer(DrawingModel(draw), 5, AspectRatio.WIDE, expected=renders(PROMPTS, checks=True))
    return renderer, [renderer.clip(prompt, seed) for seed, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("check", [without_guidance, own_prompt, swapped_prompts, other_seeds])
def test_a_check_passes_for_a_faithful_model_and_fails_for_a_deaf_one(
    check: Callable[[Renderer, Sequence[Clip]], Check],
) -> None:
    assert check(*rendered(faithful)).passes
    assert not check(*rendered(deaf)).passes


def test_the_same_seed_must_give_the_same_frames() -> None:
    assert same_seed(*rendered(faithful)).passes
    assert not same_seed(*rendered(fickle)).passes


def test_the_number_of_renders_is_known_before() -> None:
    renderer, clips = rendered(faithful)
    for check in (without_guidance, own_prompt, swapped_prompts, other_seeds, same_seed):
        check(renderer, clips)
    assert renderer.rendered == renderer.expected
    assert renders(PROMPTS, checks=False) == 2
