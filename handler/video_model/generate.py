"""A prompt to frames: diffusers' HunyuanVideo15Pipeline, super-resolution in latents, decode to uint8.

`pipeline.py` has what is changed about the pipeline.
"""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import Event
from typing import Any, Final

import torch
from diffusers import HunyuanVideo15Pipeline
from PIL import Image, ImageOps

from contract.job import DEMO_MODEL, JobInput, num_frames
from contract.result import Stage
from contract.worker import Gpu
from handler.video_model.base import (
    Cancellation,
    Frames,
    ModelOutOfMemoryError,
    OnPreview,
    OnProgress,
    no_preview,
)
from handler.video_model.compilation import warm_up
from handler.video_model.cost import Speed, render_seconds
from handler.video_model.decode import decode
from handler.video_model.lora import Updates, applied, bytes_of, read_updates
from handler.video_model.lora_files import LoraFiles
from handler.video_model.memory import Budget, DoesNotFitError, Placement
from handler.video_model.parallel import Parallel
from handler.video_model.parts import Base, Parts, Upscaler
from handler.video_model.pipeline import configure, encode_no_words, guided, step_callback, untiled
from handler.video_model.preview import Projection
from handler.video_model.progress import DenoisingProgress, raise_if, render_size, steps_of
from handler.video_model.ranks import OtherRanks
from handler.video_model.step_cache import note_steps
from handler.video_model.super_resolution import ImageCondition, stage_arguments
from handler.video_model.windows import SuperResolutionTiling
from handler.video_model.workload import Workload, workload

#: Encoded prompts that stay in memory, about 10 MB each at real size.
_CACHED_PROMPTS: Final = 16

#: Both text encoders' states of a text and their masks, under the names of the pipeline's arguments.
EncodedPrompt = Mapping[str, torch.Tensor]


class PipelineModel:
    """A `VideoModel` of loaded checkpoints. Refuses a job that does not fit into `memory` before it starts.

    `projection` makes its previews; without one it offers none. `parallel` is this process's part of a render that
    several processes share, and `ranks` are the others, if this one takes the jobs.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        attention: str = "",
        memory: Budget | None = None,
        speed: Speed | None = None,
        approximations: Sequence[str] = (),
        load_seconds: Mapping[str, float] | None = None,
        projection: Projection | None = None,
        loras: LoraFiles | None = None,
        parallel: Parallel | None = None,
        ranks: OtherRanks | None = None,
    ) -> None:
        self.parts = parts
        self.name = parts.name
        self.models: Sequence[str] = list(dict.fromkeys(model for model, _ in parts.routes))
        self.takes_images = bool(parts.image_routes)
        self.limits = parts.limits
        self.attention = attention
        self.approximations = approximations
        self.load_seconds = load_seconds or {}
        self._memory = memory
        self._speed = speed
        self._projection = projection
        self._loras = loras or LoraFiles(None)
        self._parallel = parallel
        self._ranks = ranks
        self._prompts: OrderedDict[tuple[str, bool], EncodedPrompt] = OrderedDict()
        for base in parts.bases.values():
            configure(base)

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
        """See `VideoModel.render`."""
        with self._leaving_nothing():
            with self._rendering(job_input, image, seed, cancelled) as cancellation:
                latents = self._latents(job_input, image, seed, on_progress, cancellation, on_preview)
            yield from self._decode(latents, on_progress, cancelled)

    def render_latents(
        self, job_input: JobInput, *, image: Image.Image | None, seed: int, cancelled: Cancellation
    ) -> None:
        """Takes part in a render of rank 0. Raises what `render` raises."""
        with self._leaving_nothing():
            self._latents(job_input, image, seed, lambda _, __: None, cancelled)

    def _rendering(
        self, job_input: JobInput, image: Image.Image | None, seed: int, cancelled: Event
    ) -> AbstractContextManager[Cancellation]:
        """What the other ranks do meanwhile, if there are any."""
        if self._ranks is None:
            return nullcontext(cancelled)
        return self._ranks.rendering(job_input, image, seed, cancelled)

    @contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """Drops what a render has left in memory, and raises ModelOutOfMemoryError for every error that means it."""
        try:
            yield
        except (RuntimeError, MemoryError) as exc:
            if not _is_out_of_memory(exc):
                raise
            # The exception holds its frames, and these hold the tensors of the calls that failed.
            traceback.clear_frames(exc.__traceback__)
            raise ModelOutOfMemoryError(str(exc).partition("\n")[0] or "out of memory") from None
        finally:
            for base in self.parts.bases.values():
                base.pipeline.maybe_free_model_hooks()

    @property
    def loras(self) -> list[str]:
        """See `VideoModel.loras`."""
        return self._loras.names

    def warm_up(self) -> None:
        """Runs what every video needs once over a few numbers. The first job then finds its kernels chosen."""
        vae, device = self.parts.shared.vae, self.parts.shared._execution_device
        self._encode("A prompt of the warm-up")
        self._prompts.clear()
        for transformer in self.parts.transformers:
            warm_up(transformer, device)
        latents = torch.zeros(1, vae.config.latent_channels, 2, 8, 8, device=device)
        for _ in decode(vae, latents, lambda _: None):
            pass

    def gpu(self) -> Gpu | None:
        """The GPU that the pipelines run on; None on a CPU."""
        device = self.parts.shared._execution_device
        if device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(device)
        return Gpu(name=torch.cuda.get_device_name(device), memory_total=total, memory_free=free)

    def release_memory(self) -> None:
        """Returns PyTorch's cached blocks to the GPU."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def workload(self, job_input: JobInput) -> Workload:
        """The job's stages, with their sizes and passes."""
        routes = self.parts.routes if job_input.image is None else self.parts.image_routes
        return workload(job_input, routes[job_input.model, job_input.resolution], self.parts.checkpoints)

    def caption(self, job_input: JobInput) -> str | None:
        """See `VideoModel.caption`. Nobody may take a video of the demo model for one of HunyuanVideo-1.5."""
        return f"demo model: {job_input.prompt}" if self.name == DEMO_MODEL else None

    def expected_seconds(self, job_input: JobInput) -> float | None:
        """See `VideoModel.expected_seconds`."""
        if self._speed is None or self._memory is None:
            return None
        plan = self._memory.plan
        streamed = plan.transformers is Placement.STREAMED
        gpus = self._parallel.size if self._parallel is not None else 1
        seconds = render_seconds(self.workload(job_input), self._speed, streamed=streamed, tile=plan.tile, gpus=gpus)
        return sum(seconds.values())

    def _route(
        self, job_input: JobInput, *, from_image: bool
    ) -> tuple[Base, list[Upscaler], SuperResolutionTiling | None]:
        routes = self.parts.image_routes if from_image else self.parts.routes
        route = routes[job_input.model, job_input.resolution]
        upscalers = [self.parts.upscalers[name] for name in route.super_resolution]
        return self.parts.bases[route.base], upscalers, route.tiling

    def _check_memory(self, job_input: JobInput, updates: Updates) -> None:
        if self._memory is None:
            return
        try:
            self._memory.check(self.workload(job_input), bytes_of(updates))
        except DoesNotFitError as exc:
            raise ModelOutOfMemoryError(str(exc)) from exc

    def _latents(
        self,
        job_input: JobInput,
        image: Image.Image | None,
        seed: int,
        on_progress: OnProgress,
        cancelled: Cancellation,
        on_preview: OnPreview = no_preview,
    ) -> torch.Tensor:
        """Final latents (1, C, T, H / 16, W / 16), scaled for the VAE."""
        # 1. Choose the route, and check that the job fits.
        base, upscalers, tiling = self._route(job_input, from_image=image is not None)
        updates = read_updates(job_input.loras, self._loras, base.pipeline.transformer)
        self._check_memory(job_input, updates)
        offer = partial(self._offer_preview, on_preview)
        progress = DenoisingProgress(job_input, base, upscalers, tiling, on_progress, offer, cancelled)
        # 2. Encode the prompt.
        on_progress(Stage.ENCODING_PROMPT, 0.0)
        raise_if(cancelled)
        prompt = self._encode(job_input.prompt)
        # 3. Denoise with the base model. The noise comes from the CPU: there a seed gives the same on every machine.
        generator = torch.Generator("cpu").manual_seed(seed)
        with applied(updates, base.pipeline.transformer, base.pipeline._execution_device):
            latents = self._denoise(job_input, image, base, prompt, generator, progress)
        # 4. Upscale the latents, stage by stage.
        ratio = base.pipeline.vae_scale_factor_spatial
        for upscaler in upscalers:
            width, height = render_size(upscaler.checkpoint, job_input, base.pipeline)
            latents = upscaler.stage(
                latents,
                (height // ratio, width // ratio),
                stage_arguments(prompt),
                generator,
                progress.after_upscaling,
                _encode_image(base.pipeline, image, width, height) if image is not None else None,
                tiling,
            )
            progress.next_upscaler()
        scaled: torch.Tensor = latents / base.pipeline.vae.config.scaling_factor
        return scaled

    def _denoise(
        self,
        job_input: JobInput,
        image: Image.Image | None,
        base: Base,
        prompt: EncodedPrompt,
        generator: torch.Generator,
        progress: DenoisingProgress,
    ) -> torch.Tensor:
        """The base model's latents (1, C, T, h, w)."""
        pipeline = base.pipeline
        with guided(pipeline, job_input.guidance_scale):
            arguments: dict[str, Any] = dict(prompt)
            if pipeline.guider.num_conditions > 1:
                negative = self._encode(job_input.negative_prompt or "", negative=True)
                arguments |= {f"negative_{name}": state for name, state in negative.items()}
            size = render_size(base.checkpoint, job_input, pipeline)
            if image is not None:
                arguments["image"] = _fit(image, size)  # the pipeline takes its size from the image
            else:
                arguments["width"], arguments["height"] = size
            steps = steps_of(base, job_input)
            note_steps(pipeline.transformer, steps)
            progress.start()
            shared = self._parallel.guidance(pipeline) if self._parallel is not None else nullcontext()
            with step_callback(pipeline.scheduler, progress.after_denoising), untiled(pipeline.vae), shared:
                latents: torch.Tensor = pipeline(
                    num_frames=num_frames(job_input.duration),
                    num_inference_steps=steps,
                    generator=generator,
                    output_type="latent",
                    **arguments,
                ).frames
        return latents

    def _offer_preview(self, on_preview: OnPreview, latents: torch.Tensor) -> None:
        if self._projection is not None:
            on_preview(partial(self._projection.jpeg, latents))

    def _encode(self, text: str, *, negative: bool = False) -> EncodedPrompt:
        """The text's states. They depend on these arguments alone, so the last `_CACHED_PROMPTS` stay in memory.

        ByT5 encodes the words in quotation marks, which the video is to show. Of a negative prompt it encodes none.
        Source: https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5, hyvideo/pipelines/hunyuan_video_pipeline.py.
        """
        key = (text, negative)
        if key not in self._prompts:
            pipeline = self.parts.shared
            names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
            with torch.no_grad():
                arguments = dict(zip(names[2:], encode_no_words(pipeline), strict=True)) if negative else {}
                states = pipeline.encode_prompt(prompt=text, dtype=pipeline.transformer.dtype, **arguments)
            self._prompts[key] = dict(zip(names, states, strict=True))
            if len(self._prompts) > _CACHED_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(key)
        return self._prompts[key]

    def _decode(self, latents: torch.Tensor, on_progress: OnProgress, cancelled: Event) -> Iterator[Frames]:
        def on_step(done: float) -> None:
            raise_if(cancelled)
            on_progress(Stage.DECODING, done)

        yield from decode(self.parts.shared.vae, latents, on_step)
        on_step(1.0)


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image, cropped around its centre and resampled once, to (width, height)."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


@torch.no_grad()
def _encode_image(pipeline: HunyuanVideo15Pipeline, image: Image.Image, width: int, height: int) -> ImageCondition:
    """The image at the size of a super-resolution stage, encoded as the base pipeline does at its own size."""
    device, dtype = pipeline._execution_device, pipeline.transformer.dtype
    sized = _fit(image, (width, height))
    with untiled(pipeline.vae):
        latents = pipeline._get_image_latents(
            pipeline.vae, pipeline.video_processor, sized, height=height, width=width, device=device
        )
    return ImageCondition(
        latents=latents.float(),
        states=pipeline.encode_image(image=sized, batch_size=1, device=device, dtype=dtype),
    )


def _is_out_of_memory(exc: BaseException) -> bool:
    """On a CPU, PyTorch raises a plain RuntimeError. Source of its text: c10/core/impl/alloc_cpu.cpp."""
    return isinstance(exc, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(exc)
