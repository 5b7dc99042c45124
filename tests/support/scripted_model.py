"""A `VideoModel` whose renders do what a test wants."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from threading import Event

import numpy as np
from PIL import Image

from contract.job import DEFAULT_MODEL, JobInput, num_frames
from contract.offer import SamplingLimits
from contract.result import Stage
from contract.worker import Gpu
from handler.video_model.base import Frames, OnPreview, OnProgress, RenderCancelledError, no_preview

STEPS = 4


def preview_of(step: int) -> bytes:
    """Begins as a JPEG does."""
    return b"\xff\xd8 a preview of step " + bytes([step])


class ScriptedModel:
    """Renders a still picture of 64x36 with random colours.

    `before_step` is called before each denoising step and may raise; `before_frames` before each chunk of frames, with
    the number of frames that are left.
    """

    name = "scripted"
    models = (DEFAULT_MODEL,)
    attention = "none"
    takes_images = True
    limits: Sequence[SamplingLimits] = ()
    loras: Sequence[str] = ()
    approximations: Sequence[str] = ()
    load_seconds: Mapping[str, float] = {}
    caption_text: str | None = None
    seconds_by_duration: Mapping[int, float] = {}

    def __init__(self, before_step: Callable[[int], object] = lambda _: None, missing_frames: int = 0) -> None:
        self.before_step = before_step
        self.before_frames: Callable[[int], None] = lambda _: None
        self.missing_frames = missing_frames
        self.rendered: list[tuple[JobInput, int]] = []
        self.images: list[Image.Image | None] = []
        self.released = 0

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
        self.images.append(image)
        self.rendered.append((job_input, seed))
        on_progress(Stage.ENCODING_PROMPT, 0.0)
        for step in range(STEPS):
            self.before_step(step)
            if cancelled.is_set():
                raise RenderCancelledError("cancelled")
            on_preview(partial(preview_of, step))
            on_progress(Stage.DENOISING, (step + 1) / STEPS)
        frames = left = num_frames(job_input.duration) - self.missing_frames
        # A picture of its own for each render: bytes of two attempts must never pass for each other.
        tiles = np.frombuffer(os.urandom(4 * 4 * 3), dtype=np.uint8).reshape(4, 4, 3)
        picture = tiles.repeat(9, axis=0).repeat(16, axis=1)
        while left > 0:
            on_progress(Stage.DECODING, 1 - left / frames)
            self.before_frames(left)
            yield np.repeat(picture[None], min(left, 8), axis=0)
            left -= 8

    def caption(self, job_input: JobInput) -> str | None:
        return self.caption_text

    def expected_seconds(self, job_input: JobInput) -> float | None:
        return self.seconds_by_duration.get(job_input.duration)

    def gpu(self) -> Gpu | None:
        return None

    def release_memory(self) -> None:
        self.released += 1
