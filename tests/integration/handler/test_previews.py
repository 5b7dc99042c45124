"""Previews look like the video that they precede, are small, and cost little."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from threading import Event

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from contract.job import JobInput
from contract.result import MAX_PREVIEW_BYTES, Stage
from handler.settings import WorkerSettings
from handler.video_model import demo
from handler.video_model.base import Frames, VideoModel
from handler.video_model.loader import load_model
from handler.video_model.pipeline import step_callback
from handler.video_model.preview import Projection, projection_of

pytestmark = pytest.mark.timeout(600)

PROMPTS = "A red ball moves to the left on a white background", "A yellow star rises slowly in the night sky"
#: Chunks of frames up to the middle of 121: the first frame, and then four at a time.
HALF = 1 + 60 // 4
Picture = npt.NDArray[np.float64]


def opened(jpeg: bytes) -> Image.Image:
    assert len(jpeg) <= MAX_PREVIEW_BYTES
    image = Image.open(io.BytesIO(jpeg))
    assert image.format == "JPEG"
    return image


def pixels(image: Image.Image) -> Picture:
    """At the size of the latents' pixels, where a preview has all that it shows."""
    return np.asarray(image.convert("RGB").resize((36, 20), Image.Resampling.BOX), dtype=np.float64)


def psnr(one: Picture, other: Picture) -> float:
    return float(10 * np.log10(255**2 / np.mean((one - other) ** 2)))


@dataclass
class Rendered:
    previews: list[bytes]
    frame: Picture
    seconds: float
    preview_seconds: float


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return load_model(WorkerSettings(model_path="demo"))


@pytest.fixture(scope="module")
def rendered(model: VideoModel) -> list[Rendered]:
    """The previews of every step, and the middle frame, of each prompt."""
    return [render(model, prompt) for prompt in PROMPTS]


def render(model: VideoModel, prompt: str) -> Rendered:
    previews: list[bytes] = []
    spent = 0.0

    def look(make: Callable[[], bytes]) -> None:
        nonlocal spent
        started = time.process_time()
        previews.append(make())
        spent += time.process_time() - started

    started = time.process_time()
    chunks = model.render(
        JobInput(prompt=prompt, duration=5), seed=1, on_progress=lambda *_: None, cancelled=Event(), on_preview=look
    )
    frames: Frames = np.concatenate(list(islice(chunks, HALF)))
    chunks.close()
    return Rendered(previews, pixels(Image.fromarray(frames[60])), time.process_time() - started, spent)


@pytest.mark.full
def test_the_picture_forms_from_step_to_step(rendered: list[Rendered]) -> None:
    for one in rendered:
        assert len(one.previews) == demo.CHECKPOINT.sampling.num_inference_steps
        likeness = [psnr(pixels(opened(jpeg)), one.frame) for jpeg in one.previews]
        # A plain background can be right from the first step on, so one early step says little.
        assert likeness[-1] > np.mean(likeness[:3]) + 3, likeness


@pytest.mark.full
def test_the_last_preview_resembles_the_frame_of_its_own_video(rendered: list[Rendered]) -> None:
    first, second = rendered
    for own, other in ((first, second), (second, first)):
        last = pixels(opened(own.previews[-1]))
        assert psnr(last, own.frame) > 20
        assert psnr(last, own.frame) > psnr(last, other.frame) + 6


@pytest.mark.full
def test_a_preview_of_every_step_costs_less_than_two_percent(rendered: list[Rendered]) -> None:
    """A worker makes one a second at most. The render here ends at its middle frame, so a whole one takes longer."""
    assert sum(one.preview_seconds for one in rendered) < 0.02 * sum(one.seconds for one in rendered)


@pytest.mark.parametrize("scale", [1.0, 100.0, float("nan")])
def test_noise_of_any_size_fits_what_the_platform_takes(scale: float) -> None:
    torch.manual_seed(0)
    for projection in (Projection.read(demo.PROJECTION), projection_of(32)):
        assert projection is not None
        channels = len(projection.weight) - projection.pairs.shape[1]
        for height, width in ((45, 80), (80, 45), (135, 240), (1, 1)):
            image = opened(projection.jpeg(scale * torch.randn(channels, height, width)))
            assert image.width / image.height == pytest.approx(width / height, rel=0.02)


def test_the_published_projection_takes_the_channels_of_the_published_vae_only() -> None:
    assert projection_of(16) is None
    published = projection_of(32)
    assert published is not None
    assert published.pixels(torch.zeros(32, 2, 3)).shape == (3, 2, 3)
    assert published.pixels(torch.zeros(32, 1, 1)).flatten().tolist() == pytest.approx([0.0456, -0.0202, -0.0644])


def test_each_step_estimates_the_clean_latents_of_the_middle_frame() -> None:
    """With the exact velocity, every step's estimate is exact."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 5, 2, 3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=4.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 7)[:-1])
    sample = noise
    seen: list[torch.Tensor] = []
    with step_callback(scheduler, seen.append):
        for timestep in scheduler.timesteps:
            sample = scheduler.step(noise - clean, timestep, sample, return_dict=False)[0]
    assert len(seen) == 6
    for estimate in seen:
        assert torch.allclose(estimate, clean[0, :, 2], atol=1e-5)


def test_a_worker_that_shows_no_previews_makes_none() -> None:
    model = load_model(WorkerSettings(model_path="demo", previews=False))
    offered: list[Callable[[], bytes]] = []
    job = JobInput(prompt=PROMPTS[0], duration=5, num_inference_steps=1)
    stages: list[Stage] = []
    chunks = model.render(
        job, seed=1, on_progress=lambda stage, _: stages.append(stage), cancelled=Event(), on_preview=offered.append
    )
    next(chunks)
    chunks.close()
    assert Stage.DENOISING in stages
    assert offered == []
