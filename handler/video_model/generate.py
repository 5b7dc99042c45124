"""Prompt to frames: diffusers' HunyuanVideo15Pipeline, super-resolution in latents, decode, uint8 frames out.

The pipeline has no step callback and takes no guidance scale. Both are done from outside: its scheduler's `step` is
watched, its guider is replaced.
"""

from __future__ import annotations

import math
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any, Final

import torch
from diffusers import HunyuanVideo15Pipeline
from PIL import Image, ImageOps

from contract.job import JobInput, Resolution, num_frames
from contract.result import Stage
from contract.worker import Gpu
from handler.video_model.base import Frames, ModelOutOfMemoryError, OnProgress, RenderCancelledError
from handler.video_model.catalog import Checkpoint, Route, bucket_size
from handler.video_model.decode import decode
from handler.video_model.memory import Budget, DoesNotFitError, Workload
from handler.video_model.super_resolution import ImageCondition, SuperResolution, stage_arguments

#: Frames that are handed on at once: 8 of 1280x720 are 22 MB.
_CHUNK: Final = 8
#: Encoded prompts that are kept, each some 10 MB at real size.
_KEPT_PROMPTS: Final = 16

#: Both text encoders' states of a text and their masks, under the names of the pipeline's arguments.
Prompt = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Base:
    """A pipeline, from text or from an image, and what its checkpoint needs."""

    checkpoint: Checkpoint
    pipeline: HunyuanVideo15Pipeline  # or its image-to-video twin, which has an image encoder beside

    @property
    def image_encoder(self) -> torch.nn.Module | None:
        """The vision tower; None where videos are made from text alone."""
        encoder: torch.nn.Module | None = self.pipeline.components.get("image_encoder")
        return encoder


@dataclass(frozen=True)
class Upscaler:
    """A super-resolution stage and the size that its checkpoint renders."""

    checkpoint: Checkpoint
    stage: SuperResolution


class PipelineModel:
    """A `VideoModel` over loaded checkpoints.

    `routes` says for each `model` a client may name, and each resolution, which checkpoints a video goes through, and
    `image_routes` the same where it starts from an image; `bases` and `upscalers` hold them by name. All bases share
    their text encoders and their VAE. A job that does not fit into `memory` is refused before it starts.
    """

    def __init__(
        self,
        *,
        name: str,
        bases: Mapping[str, Base],
        routes: Mapping[tuple[str, Resolution], Route],
        image_routes: Mapping[tuple[str, Resolution], Route] | None = None,
        upscalers: Mapping[str, Upscaler] | None = None,
        attention: str = "",
        memory: Budget | None = None,
        approximations: Sequence[str] = (),
        load_seconds: Mapping[str, float] | None = None,
    ) -> None:
        self.approximations = approximations
        self.name = name
        self.load_seconds = load_seconds or {}
        self._memory = memory
        self.attention = attention
        self.models: Sequence[str] = list(dict.fromkeys(model for model, _ in routes))
        self._bases = bases
        self._upscalers = upscalers or {}
        self._routes = routes
        self._image_routes = image_routes or {}
        self.takes_images = bool(self._image_routes)
        self._shared = next(iter(bases.values())).pipeline
        self._prompts: OrderedDict[str, Prompt] = OrderedDict()
        for base in bases.values():
            _prepare(base)

    def render(
        self,
        job_input: JobInput,
        *,
        seed: int,
        on_progress: OnProgress,
        cancelled: Event,
        image: Image.Image | None = None,
    ) -> Iterator[Frames]:
        """See `VideoModel.render`."""
        self._check_memory(job_input)
        try:
            latents = self._latents(job_input, image, seed, on_progress, cancelled)
            video = self._decode(latents, on_progress, cancelled)
            del latents
            for first in range(0, len(video), _CHUNK):
                _stop_if(cancelled)
                yield video[first : first + _CHUNK]
        except (RuntimeError, MemoryError) as exc:
            if not _is_out_of_memory(exc):
                raise
            # The tensors of the calls that failed live on in their frames for as long as the exception does.
            traceback.clear_frames(exc.__traceback__)
            raise ModelOutOfMemoryError(str(exc).partition("\n")[0] or "out of memory") from None
        finally:
            for base in self._bases.values():
                base.pipeline.maybe_free_model_hooks()

    def gpu(self) -> Gpu | None:
        """The GPU that the pipelines run on."""
        device = self._shared._execution_device
        if device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(device)
        return Gpu(name=torch.cuda.get_device_name(device), memory_total=total, memory_free=free)

    def release_memory(self) -> None:
        """Give PyTorch's cached blocks back to the GPU."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def workload(self, job_input: JobInput) -> Workload:
        """What the job's largest stage comes to."""
        route = self._routes[job_input.model, job_input.resolution]
        checkpoints = [self._bases[route.base].checkpoint]
        checkpoints += [self._upscalers[name].checkpoint for name in route.super_resolution]
        sizes = [_render_size(checkpoint, job_input, self._shared) for checkpoint in checkpoints]
        return Workload(num_frames(job_input.duration), max(sizes, key=math.prod))

    def _check_memory(self, job_input: JobInput) -> None:
        if self._memory is None:
            return
        try:
            self._memory.check(self.workload(job_input))
        except DoesNotFitError as exc:
            raise ModelOutOfMemoryError(str(exc)) from exc

    def _latents(
        self,
        job_input: JobInput,
        image: Image.Image | None,
        seed: int,
        on_progress: OnProgress,
        cancelled: Event,
    ) -> torch.Tensor:
        """Final latents (1, C, T, H / 16, W / 16), scaled as the VAE takes them."""
        routes = self._routes if image is None else self._image_routes
        route = routes[job_input.model, job_input.resolution]
        base = self._bases[route.base]
        upscalers = [self._upscalers[name] for name in route.super_resolution]
        work = _Work(job_input, base, upscalers, on_progress, cancelled)
        on_progress(Stage.ENCODING_PROMPT, 0.0)
        _stop_if(cancelled)
        prompt = self._encoded(job_input.prompt)
        # On the CPU, so that a seed means the same noise on every GPU.
        generator = torch.Generator("cpu").manual_seed(seed)
        if image is not None:
            image = _fitted(image, job_input)
        latents = self._denoise(job_input, image, base, prompt, generator, work)
        for upscaler in upscalers:
            width, height = _render_size(upscaler.checkpoint, job_input, base.pipeline)
            ratio = base.pipeline.vae_scale_factor_spatial
            latents = upscaler.stage(
                latents,
                (height // ratio, width // ratio),
                stage_arguments(prompt),
                generator,
                work.after_upscaling,
                _condition(base.pipeline, image, width, height) if image is not None else None,
            )
            work.next_upscaler()
        scaled: torch.Tensor = latents / base.pipeline.vae.config.scaling_factor
        return scaled

    def _denoise(
        self,
        job_input: JobInput,
        image: Image.Image | None,
        base: Base,
        prompt: Prompt,
        generator: torch.Generator,
        work: _Work,
    ) -> torch.Tensor:
        """The base model's latents (1, C, T, h, w)."""
        pipeline = base.pipeline
        guider = pipeline.guider
        if job_input.guidance_scale is not None:
            pipeline.guider = guider.new(guidance_scale=job_input.guidance_scale)
        try:
            arguments: dict[str, Any] = dict(prompt)
            if pipeline.guider.num_conditions > 1:
                negative = self._encoded(job_input.negative_prompt or "")
                arguments |= {f"negative_{name}": state for name, state in negative.items()}
            work.start()
            if image is not None:
                arguments["image"] = image  # which decides the size
            else:
                arguments["width"], arguments["height"] = _render_size(base.checkpoint, job_input, pipeline)
            with _watched(pipeline.scheduler, work.after_denoising):
                latents: torch.Tensor = pipeline(
                    num_frames=num_frames(job_input.duration),
                    num_inference_steps=_steps(base, job_input),
                    generator=generator,
                    output_type="latent",
                    **arguments,
                ).frames
        finally:
            pipeline.guider = guider
        return latents

    def _encoded(self, text: str) -> Prompt:
        """The text's states, from memory if it was encoded lately: they depend on nothing else."""
        if text not in self._prompts:
            names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
            with torch.no_grad():
                states = self._shared.encode_prompt(prompt=text, dtype=self._shared.transformer.dtype)
            self._prompts[text] = dict(zip(names, states, strict=True))
            if len(self._prompts) > _KEPT_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(text)
        return self._prompts[text]

    def _decode(self, latents: torch.Tensor, on_progress: OnProgress, cancelled: Event) -> Frames:
        def tell(done: float) -> None:
            _stop_if(cancelled)
            on_progress(Stage.DECODING, done)

        video = decode(self._shared.vae, latents, tell)
        tell(1.0)
        return video


class _Work:
    """How much of all denoising is done, over the base model and its upscalers.

    A step counts with the square of its tokens, as attention does: a step at 1080p is worth 25 at 480p.
    """

    def __init__(
        self,
        job_input: JobInput,
        base: Base,
        upscalers: Sequence[Upscaler],
        on_progress: OnProgress,
        cancelled: Event,
    ) -> None:
        def weight(checkpoint: Checkpoint) -> float:
            width, height = _render_size(checkpoint, job_input, base.pipeline)
            return float((width * height) ** 2)

        guidance = job_input.guidance_scale or base.pipeline.guider.guidance_scale
        passes = 2 if guidance > 1 else 1
        self._base_step = passes * weight(base.checkpoint)
        self._upscaler_steps = [weight(upscaler.checkpoint) for upscaler in upscalers]
        steps = [upscaler.stage.sampling.num_inference_steps for upscaler in upscalers]
        self._total = self._base_step * _steps(base, job_input) + sum(
            count * step for count, step in zip(steps, self._upscaler_steps, strict=True)
        )
        self._done = 0.0
        self._on_progress = on_progress
        self._cancelled = cancelled

    def start(self) -> None:
        """The prompt is encoded."""
        _stop_if(self._cancelled)
        self._on_progress(Stage.DENOISING, 0.0)

    def after_denoising(self) -> None:
        """One step of the base model is done."""
        self._advance(Stage.DENOISING, self._base_step)

    def after_upscaling(self) -> None:
        """One step of the upscaler that is at work is done."""
        self._advance(Stage.UPSCALING, self._upscaler_steps[0])

    def next_upscaler(self) -> None:
        """The one that was at work is done."""
        self._upscaler_steps.pop(0)

    def _advance(self, stage: Stage, step: float) -> None:
        _stop_if(self._cancelled)
        self._done += step
        self._on_progress(stage, self._done / self._total)


def _prepare(base: Base) -> None:
    pipeline, sampling = base.pipeline, base.checkpoint.sampling
    pipeline.set_progress_bar_config(disable=True)
    if base.image_encoder is not None:
        pipeline.target_size = base.checkpoint.base_size
    else:
        pipeline.vision_num_semantic_tokens = 0  # text to video attends to no image: 729 masked tokens less
    if sampling.shift is not None:
        pipeline.scheduler.set_shift(sampling.shift)
    if sampling.guidance_scale is not None:
        pipeline.guider = pipeline.guider.new(guidance_scale=sampling.guidance_scale)


def _steps(base: Base, job_input: JobInput) -> int:
    return job_input.num_inference_steps or base.checkpoint.sampling.num_inference_steps


def _render_size(checkpoint: Checkpoint, job_input: JobInput, pipeline: HunyuanVideo15Pipeline) -> tuple[int, int]:
    """(width, height) in pixels that the checkpoint renders for this job."""
    width, height = (int(side) for side in job_input.aspect_ratio.split(":"))
    return bucket_size(checkpoint.base_size, width, height, pipeline.vae_scale_factor_spatial)


def _fitted(image: Image.Image, job_input: JobInput) -> Image.Image:
    """The image, cropped evenly to the video's aspect ratio: the pipeline takes its size from it."""
    width, height = (int(side) for side in job_input.aspect_ratio.split(":"))
    scale = max(job_input.size) // max(width, height)
    return ImageOps.fit(image, (width * scale, height * scale), Image.Resampling.LANCZOS)


@torch.no_grad()
def _condition(pipeline: HunyuanVideo15Pipeline, image: Image.Image, width: int, height: int) -> ImageCondition:
    """The image at the size of a super-resolution stage, encoded as the base pipeline encodes it at its own."""
    device, dtype = pipeline._execution_device, pipeline.transformer.dtype
    sized = pipeline.video_processor.resize(image, height=height, width=width, resize_mode="crop")
    return ImageCondition(
        latents=pipeline._get_image_latents(
            pipeline.vae, pipeline.video_processor, sized, height=height, width=width, device=device
        ).to(dtype),
        states=pipeline.encode_image(image=sized, batch_size=1, device=device, dtype=dtype),
    )


@contextmanager
def _watched(scheduler: Any, after_step: Callable[[], None]) -> Iterator[None]:
    """Call `after_step` after each of the scheduler's steps; what it raises ends the pipeline's loop."""
    step = scheduler.step

    def watched_step(*arguments: Any, **named: Any) -> Any:
        result = step(*arguments, **named)
        after_step()
        return result

    scheduler.step = watched_step
    try:
        yield
    finally:
        del scheduler.step


def _stop_if(cancelled: Event) -> None:
    if cancelled.is_set():
        raise RenderCancelledError("the render was cancelled")


def _is_out_of_memory(exc: BaseException) -> bool:
    """On a CPU, PyTorch has no class of its own for it: c10/core/impl/alloc_cpu.cpp."""
    return isinstance(exc, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(exc)
