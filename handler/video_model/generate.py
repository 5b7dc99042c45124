"""Prompt to frames with diffusers' HunyuanVideo15Pipeline: progress and cancellation at every step, uint8 frames out.

The pipeline has no step callback and takes no guidance scale. Both are done from outside: its scheduler's `step` is
watched, its guider is replaced once at load.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any, Final

import torch
from diffusers import HunyuanVideo15Pipeline

from handler.contract import Gpu, JobInput, Stage, num_frames
from handler.video_model.base import Frames, ModelOutOfMemoryError, OnProgress, RenderCancelledError
from handler.video_model.catalog import Sampling

#: Frames that are converted and handed on at once: 8 of 1280x720 are 22 MB.
_CHUNK: Final = 8


class PipelineModel:
    """A `VideoModel` over a loaded pipeline, rendering at `size` (width, height in pixels, multiples of 16)."""

    def __init__(
        self, pipeline: HunyuanVideo15Pipeline, *, name: str, size: tuple[int, int], sampling: Sampling
    ) -> None:
        self.name = name
        self._pipeline = pipeline
        self._size = size
        self._num_inference_steps = sampling.num_inference_steps
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vision_num_semantic_tokens = 0  # text to video attends to no image: 729 masked tokens less
        if sampling.shift is not None:
            pipeline.scheduler.set_shift(sampling.shift)
        if sampling.guidance_scale is not None:
            pipeline.guider = pipeline.guider.new(guidance_scale=sampling.guidance_scale)

    def render(self, job_input: JobInput, *, seed: int, on_progress: OnProgress, cancelled: Event) -> Iterator[Frames]:
        """See `VideoModel.render`."""
        try:
            video = self._decode(self._denoise(job_input, seed, on_progress, cancelled), on_progress, cancelled)
            for first in range(0, video.shape[2], _CHUNK):
                _stop_if(cancelled)
                yield _frames(video[:, :, first : first + _CHUNK])
        except (RuntimeError, MemoryError) as exc:
            if not _is_out_of_memory(exc):
                raise
            # The tensors of the calls that failed live on in their frames for as long as the exception does.
            traceback.clear_frames(exc.__traceback__)
            raise ModelOutOfMemoryError(str(exc).partition("\n")[0] or "out of memory") from None
        finally:
            self._pipeline.maybe_free_model_hooks()

    def gpu(self) -> Gpu | None:
        """The GPU that the pipeline runs on."""
        device = self._pipeline._execution_device
        if device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(device)
        return Gpu(name=torch.cuda.get_device_name(device), memory_total=total, memory_free=free)

    def release_memory(self) -> None:
        """Give PyTorch's cached blocks back to the GPU."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _denoise(self, job_input: JobInput, seed: int, on_progress: OnProgress, cancelled: Event) -> torch.Tensor:
        """Latents (1, C, T, H / 16, W / 16), scaled as the VAE takes them."""
        on_progress(Stage.ENCODING_PROMPT, 0.0)
        _stop_if(cancelled)
        pipeline, (width, height) = self._pipeline, self._size
        with torch.no_grad():
            arguments = _encoded(pipeline, job_input.prompt)
            if pipeline.guider.num_conditions > 1:
                arguments |= _encoded(pipeline, "", prefix="negative_")
        on_progress(Stage.DENOISING, 0.0)
        done = 0

        def after_step() -> None:
            nonlocal done
            _stop_if(cancelled)
            done += 1
            on_progress(Stage.DENOISING, done / self._num_inference_steps)

        _stop_if(cancelled)
        with _watched(pipeline.scheduler, after_step):
            latents: torch.Tensor = pipeline(
                height=height,
                width=width,
                num_frames=num_frames(job_input.duration),
                num_inference_steps=self._num_inference_steps,
                # On the CPU, so that a seed means the same noise on every GPU.
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                **arguments,
            ).frames
        scaled: torch.Tensor = latents / pipeline.vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor, on_progress: OnProgress, cancelled: Event) -> torch.Tensor:
        """Video (1, 3, frames, height, width), about -1 to 1."""
        vae = self._pipeline.vae
        done, tiles = 0, _num_tiles(vae, *latents.shape[-2:])
        on_progress(Stage.DECODING, 0.0)

        def before_tile(*_: Any) -> None:
            nonlocal done
            _stop_if(cancelled)
            on_progress(Stage.DECODING, done / tiles)
            done += 1

        hook = vae.decoder.register_forward_pre_hook(before_tile)
        try:
            video: torch.Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        finally:
            hook.remove()
        on_progress(Stage.DECODING, 1.0)
        return video


def _encoded(pipeline: HunyuanVideo15Pipeline, text: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """Qwen2.5-VL's and ByT5's states of `text` and their masks, as the pipeline's call takes them."""
    names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
    states = pipeline.encode_prompt(prompt=text, dtype=pipeline.transformer.dtype)
    return {prefix + name: state for name, state in zip(names, states, strict=True)}


def _num_tiles(vae: Any, height: int, width: int) -> int:
    """How often the decoder runs for latents of `height` x `width`: `AutoencoderKLHunyuanVideo15.tiled_decode`."""
    if not vae.use_tiling or (height <= vae.tile_latent_min_height and width <= vae.tile_latent_min_width):
        return 1
    stride = 1 - vae.tile_overlap_factor
    rows = math.ceil(height / int(vae.tile_latent_min_height * stride))
    return rows * math.ceil(width / int(vae.tile_latent_min_width * stride))


def _frames(video: torch.Tensor) -> Frames:
    """(1, 3, n, H, W) of -1 to 1 to uint8 (n, H, W, 3), converted where the tensor is."""
    pixels = video[0].permute(1, 2, 3, 0).float().add(1).mul(127.5).round().clamp(0, 255)
    frames: Frames = pixels.to(torch.uint8).contiguous().cpu().numpy()
    return frames


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
