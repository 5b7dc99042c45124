"""Super-resolution in windows: exact in one, a plain weighted mean of several, and cancelled between two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch
from torch import nn

from contract.job import JobInput, Resolution
from contract.result import Stage
from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.video_model.base import RenderCancelledError
from handler.video_model.generate import PipelineModel
from handler.video_model.super_resolution import ImageCondition, stage_arguments
from handler.video_model.windows import SuperResolutionTiling, windows
from tests.support.small_models import LATENTS, family, sr_transformer, stage, upsampler_720p

STEPS = 3
FRAMES, HEIGHT, WIDTH = 7, 9, 14
TILING = SuperResolutionTiling(tile=(6, 8), overlap=2, window=4, stride=3)
PROMPT = {
    "prompt_embeds": torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(2)),
    "prompt_embeds_mask": torch.cat([torch.ones(1, 9), torch.zeros(1, 3)], dim=1),
    "prompt_embeds_2": torch.zeros(1, 4, 16),
    "prompt_embeds_mask_2": torch.zeros(1, 4),
}
LOW = torch.randn(1, LATENTS, FRAMES, 5, 8, generator=torch.Generator().manual_seed(1))
IMAGE = ImageCondition(
    latents=torch.randn(1, LATENTS, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3)),
    states=torch.randn(1, 729, 16, generator=torch.Generator().manual_seed(4)),
)


def upscaled(tiling: SuperResolutionTiling | None, image: ImageCondition | None = None) -> tuple[torch.Tensor, int]:
    """The stage's latents, and the passes that it took."""
    ours = stage(upsampler_720p(), STEPS)
    use_mask_free_attention(ours.transformer, NATIVE)
    passes: list[int] = []
    generator = torch.Generator().manual_seed(5)
    size = HEIGHT, WIDTH
    latents = ours(LOW, size, stage_arguments(PROMPT), generator, lambda: passes.append(1), image, tiling)
    return latents, len(passes)


class FixedRotation(nn.Module):
    """In place of a transformer's own `rope`."""

    def __init__(self, rotation: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.rotation = rotation

    def forward(self, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotation


def straight(boxes: Sequence[tuple[slice, slice, slice]], image: ImageCondition | None) -> torch.Tensor:
    """The stage with a loop over `boxes`, the stock attention and its masks, and weights that are written out."""
    transformer, upsampler = sr_transformer(), upsampler_720p()
    whole = [
        part.reshape(FRAMES, HEIGHT, WIDTH, -1) for part in transformer.rope(torch.empty(1, 1, FRAMES, HEIGHT, WIDTH))
    ]
    generator = torch.Generator().manual_seed(5)
    shape = 1, LATENTS, FRAMES, HEIGHT, WIDTH
    current = torch.randn(shape, generator=generator)
    resized = torch.nn.functional.interpolate(LOW[0].transpose(0, 1), size=(HEIGHT, WIDTH), mode="bilinear")
    low = 0.3 * upsampler(resized.transpose(0, 1)[None]) + 0.7 * torch.randn(shape, generator=generator)
    condition = torch.zeros(1, LATENTS + 1, FRAMES, HEIGHT, WIDTH)
    if image is not None:
        condition[:, :LATENTS, 0], condition[:, LATENTS, 0] = image.latents[:, :, 0], 1
    linear = torch.linspace(1, 0, STEPS + 1)
    sigmas = 2 * linear / (1 + linear)  # shift 2
    for step in range(STEPS):
        seen = float(sigmas[step] >= 0.7)
        inputs = torch.cat([current, condition, seen * low, seen * torch.ones(1, 1, *shape[2:])], dim=1)
        total, weights = torch.zeros(shape), torch.zeros(shape[2:])
        for box in boxes:
            rotation = [part[box].reshape(-1, part.shape[-1]) for part in whole]
            transformer.rope = FixedRotation((rotation[0], rotation[1]))
            velocity = transformer(
                inputs[:, :, *box],
                1000 * sigmas[step].reshape(1),
                PROMPT["prompt_embeds"],
                PROMPT["prompt_embeds_mask"],
                timestep_r=1000 * sigmas[step + 1].reshape(1),
                encoder_hidden_states_2=PROMPT["prompt_embeds_2"],
                encoder_attention_mask_2=PROMPT["prompt_embeds_mask_2"],
                image_embeds=image.states if image is not None else torch.zeros(1, 729, 16),
                return_dict=False,
            )[0]
            for t in range(velocity.shape[2]):
                for y in range(velocity.shape[3]):
                    for x in range(velocity.shape[4]):
                        at = box[0].start + t, box[1].start + y, box[2].start + x
                        weight = weight_of(t, box[0], FRAMES, 1) * weight_of(y, box[1], HEIGHT, 2)
                        weight *= weight_of(x, box[2], WIDTH, 2)
                        total[:, :, *at] += weight * velocity[:, :, t, y, x]
                        weights[at] += weight
        current = current + (sigmas[step + 1] - sigmas[step]) * total / weights
    return current


def weight_of(position: int, side: slice, length: int, overlap: int) -> float:
    """A third and two thirds in an overlap of two, one half in an overlap of one, and one elsewhere."""
    before = position + 1 if side.start > 0 else overlap + 1
    after = side.stop - side.start - position if side.stop < length else overlap + 1
    return min(before, after, overlap + 1) / (overlap + 1)


@pytest.mark.parametrize("image", [None, IMAGE], ids=["text", "image"])
@torch.no_grad()
def test_windows_compute_what_a_plain_loop_over_boxes_computes(image: ImageCondition | None) -> None:
    boxes = [(slice(t, t + 4), slice(y, y + 6), slice(x, x + 8)) for t in (0, 3) for y in (0, 3) for x in (0, 6)]
    latents, passes = upscaled(TILING, image)
    assert passes == STEPS * len(boxes)
    assert (latents - straight(boxes, image)).abs().max() < 1e-4


@pytest.mark.parametrize("image", [None, IMAGE], ids=["text", "image"])
def test_one_window_is_the_untiled_loop_bit_for_bit(image: ImageCondition | None) -> None:
    exact, passes = upscaled(None, image)
    fits = SuperResolutionTiling(tile=(HEIGHT, WIDTH), overlap=2, window=FRAMES, stride=4)
    latents, passes_of_one = upscaled(fits, image)
    assert torch.equal(latents, exact)
    assert passes == passes_of_one == STEPS


def test_windows_come_closer_to_the_untiled_loop_the_larger_they_are() -> None:
    exact, _ = upscaled(None)
    tilings = (
        SuperResolutionTiling((5, 5), 1, 3, 2),
        SuperResolutionTiling((6, 8), 2, 4, 3),
        SuperResolutionTiling((9, 12), 4, 6, 4),
    )
    errors = [float((upscaled(tiling)[0] - exact).norm() / exact.norm()) for tiling in tilings]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 0.1


def tiled_family() -> PipelineModel:
    """The small family, with windows in each of its stages."""
    model = family()
    tiling = SuperResolutionTiling(tile=(5, 8), overlap=2, window=16, stride=15)
    routes = {key: replace(route, tiling=tiling) for key, route in model.parts.routes.items()}
    model.parts = replace(model.parts, routes=routes)
    return model


def render(model: PipelineModel, on_progress: Any, cancelled: Event) -> None:
    """Until the first frame."""
    job = JobInput(prompt="A paper boat on a rainy street", duration=5, resolution=Resolution.P720)
    next(model.render(job, seed=1, on_progress=on_progress, cancelled=cancelled))


def test_progress_moves_after_each_window_and_ends_at_one() -> None:
    told: list[tuple[Stage, float]] = []
    render(tiled_family(), lambda stage, done: told.append((stage, done)), Event())
    upscaling = [done for stage, done in told if stage is Stage.UPSCALING]
    boxes = windows(SuperResolutionTiling(tile=(5, 8), overlap=2, window=16, stride=15), 31, 7, 11)
    assert len(boxes) == 8
    assert len(upscaling) == 2 * len(boxes)
    assert upscaling == sorted(set(upscaling))
    assert upscaling[-1] == pytest.approx(1.0)


def test_a_render_is_cancelled_between_two_windows() -> None:
    cancelled, seen = Event(), []

    def on_progress(stage: Stage, _: float) -> None:
        if stage is Stage.UPSCALING:
            seen.append(stage)
            if len(seen) == 3:
                cancelled.set()

    with pytest.raises(RenderCancelledError):
        render(tiled_family(), on_progress, cancelled)
    assert len(seen) == 3
