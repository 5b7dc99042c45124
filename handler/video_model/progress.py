"""How far the denoising of a video is, and the sizes and numbers of steps that this follows from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from diffusers import HunyuanVideo15Pipeline

from contract.job import JobInput, num_frames
from contract.result import Stage
from handler.video_model.base import Cancellation, OnProgress, RenderCancelledError
from handler.video_model.catalog import Checkpoint, trained_size
from handler.video_model.cost import pass_work
from handler.video_model.dimensions import TRANSFORMER
from handler.video_model.parts import Base, Upscaler
from handler.video_model.windows import SuperResolutionTiling, Window, windows


class DenoisingProgress:
    """The fraction of all denoising that is done, over the base model and its upscalers."""

    def __init__(
        self,
        job_input: JobInput,
        base: Base,
        upscalers: Sequence[Upscaler],
        tiling: SuperResolutionTiling | None,
        on_progress: OnProgress,
        offer_preview: Callable[[torch.Tensor], None],
        cancelled: Cancellation,
    ) -> None:
        def boxes(checkpoint: Checkpoint, tiling: SuperResolutionTiling | None) -> list[Window]:
            return windows(tiling, *_latent_size(checkpoint, job_input, base.pipeline))

        guidance = job_input.guidance_scale or base.pipeline.guider.guidance_scale
        (whole,) = boxes(base.checkpoint, None)
        self._base_step = _operations(whole) * (2 if guidance > 1 else 1)
        upscaling = [boxes(upscaler.checkpoint, tiling) for upscaler in upscalers]
        self._upscaler_passes = [_operations(of[0]) for of in upscaling]
        counts = [
            len(of) * upscaler.stage.sampling.num_inference_steps
            for of, upscaler in zip(upscaling, upscalers, strict=True)
        ]
        upscaled = sum(map(operator.mul, counts, self._upscaler_passes))
        self._total = steps_of(base, job_input) * self._base_step + upscaled
        self._done = 0.0
        self._on_progress = on_progress
        self._offer_preview = offer_preview
        self._cancelled = cancelled

    def start(self) -> None:
        """Call before the first step."""
        raise_if(self._cancelled)
        self._on_progress(Stage.DENOISING, 0.0)

    def after_denoising(self, latents: torch.Tensor) -> None:
        """Call after each step of the base model, with the clean latents of a frame as the step estimates them."""
        self._offer_preview(latents)
        self._advance(Stage.DENOISING, self._base_step)

    def after_upscaling(self) -> None:
        """Call after each pass of the current upscaler."""
        self._advance(Stage.UPSCALING, self._upscaler_passes[0])

    def next_upscaler(self) -> None:
        """Call after the last pass of an upscaler."""
        self._upscaler_passes.pop(0)

    def _advance(self, stage: Stage, cost: float) -> None:
        raise_if(self._cancelled)
        self._done += cost
        self._on_progress(stage, self._done / self._total)


def steps_of(base: Base, job_input: JobInput) -> int:
    """Of the base model for this job."""
    return job_input.num_inference_steps or base.checkpoint.sampling.num_inference_steps


def _ratio(job_input: JobInput) -> tuple[int, int]:
    """The aspect ratio as (width, height): (16, 9)."""
    width, height = job_input.aspect_ratio.split(":")
    return int(width), int(height)


def render_size(checkpoint: Checkpoint, job_input: JobInput, pipeline: HunyuanVideo15Pipeline) -> tuple[int, int]:
    """(width, height) in pixels that the checkpoint renders for this job."""
    return trained_size(checkpoint.base_size, *_ratio(job_input), pipeline.vae_scale_factor_spatial)


def _latent_size(checkpoint: Checkpoint, job_input: JobInput, pipeline: HunyuanVideo15Pipeline) -> tuple[int, int, int]:
    """(frames, height, width) in latents that the checkpoint renders for this job."""
    width, height = render_size(checkpoint, job_input, pipeline)
    ratio = pipeline.vae_scale_factor_spatial
    frames = (num_frames(job_input.duration) - 1) // pipeline.vae_scale_factor_temporal + 1
    return frames, height // ratio, width // ratio


def _operations(box: Window) -> float:
    """Of a pass of a published transformer. The few more channels of a super-resolution stage do not matter here."""
    return pass_work(box.tokens, 2 * TRANSFORMER.latent_channels + 1).total


def raise_if(cancelled: Cancellation) -> None:
    """Raises RenderCancelledError."""
    if cancelled.is_set():
        raise RenderCancelledError("the render was cancelled")
