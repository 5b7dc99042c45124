"""Renders at the real dimensions on the meta device: every tensor and operation is counted, and nothing is computed.

The transformers have one block, because all blocks need the same: `tests/integration/handler/test_counted_memory.py`
shows that more of them change no peak.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Event

import diffusers
from PIL import Image

from benchmarks.gpu_models import REAL, RandomModels
from benchmarks.live import Count, counting
from contract.job import JobInput, Profile, Resolution
from contract.result import Stage
from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.video_model.generate import PipelineModel
from handler.video_model.memory import denoising_bytes
from handler.video_model.parts import Parts
from handler.video_model.workload import kind_of_job


@dataclass(frozen=True)
class Peak:
    """Bytes alive at the peak between two calls of `on_progress`, of which the later names the stage."""

    stage: Stage
    alive: int


@lru_cache
def meta_parts(profile: Profile, layers: int = 1) -> Parts:
    """The checkpoints of a profile, also for images, on the meta device. A stage has one step, for it needs no more."""
    diffusers.utils.logging.set_verbosity_error()
    parts = RandomModels(replace(REAL, layers=layers), "meta").parts(profile, images=True)
    for transformer in parts.transformers:
        use_mask_free_attention(transformer, NATIVE)
    stages = [upscaler.stage for upscaler in parts.upscalers.values()]
    for scheduler in (*(base.pipeline.scheduler for base in parts.bases.values()), *(s.scheduler for s in stages)):
        scheduler.index_for_timestep = lambda *_: 0  # it would look for the timestep's value
    upscalers = {
        name: replace(
            upscaler, stage=replace(upscaler.stage, sampling=replace(upscaler.stage.sampling, num_inference_steps=1))
        )
        for name, upscaler in parts.upscalers.items()
    }
    return replace(parts, upscalers=upscalers)


class _DecodingError(Exception):
    """Ends a counted render before it decodes."""


def count_latents(job_input: JobInput, parts: Parts) -> tuple[list[Peak], Count]:
    """Counts a render up to its final latents."""
    peaks: list[Peak] = []
    model = PipelineModel(parts)
    image = Image.new("RGB", (1280, 720)) if job_input.image is not None else None
    with counting() as count:

        def on_progress(stage: Stage, _: float) -> None:
            peaks.append(Peak(stage, count.peak))
            count.peak = count.alive
            if stage is Stage.DECODING:
                raise _DecodingError

        try:
            for _ in model.render(job_input, seed=1, on_progress=on_progress, cancelled=Event(), image=image):
                pass
        except _DecodingError:
            pass
    return peaks, count


def dry_run(kinds: Iterable[tuple[Profile, Resolution, int]]) -> Iterator[str]:
    """A line for each kind of job: what its render makes up to the latents, counted, beside what the plan says."""
    yield "| profile | video | counted GB | planned GB | PFLOP of one step and one block a stage, counted |"
    yield "|---|---|---|---|---|"
    for profile, resolution, duration in kinds:
        job_input = kind_of_job(resolution, duration).model_copy(update={"num_inference_steps": 1})
        parts = meta_parts(profile)
        seen, count = count_latents(job_input, parts)
        video = PipelineModel(parts).workload(job_input)
        planned = max(denoising_bytes(stage, from_image=False) for stage in video.stages)
        counted = max(peak.alive for peak in seen)
        yield (
            f"| {profile} | {resolution} {duration} s | {counted / 1e9:.1f} | {planned / 1e9:.1f} "
            f"| {count.operations / 1e15:.3f} |"
        )
