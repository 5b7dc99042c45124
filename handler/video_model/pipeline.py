"""What is changed about diffusers' HunyuanVideo15Pipeline, beside what its arguments can say.

It has no step callback and no argument for the guidance scale, and rounds latents and timesteps to 16 bits. Source:
diffusers, pipelines/hunyuan_video1_5/pipeline_hunyuan_video1_5.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Pipeline

from handler.video_model.parts import Base
from handler.video_model.precision import sample_in_float32, start_in_float32


def configure(base: Base) -> None:
    """Sets what the checkpoint's numbers say, once."""
    pipeline, sampling = base.pipeline, base.checkpoint.sampling
    pipeline.set_progress_bar_config(disable=True)
    start_in_float32(pipeline)
    sample_in_float32(pipeline.transformer)
    if base.image_encoder is not None:
        # Images come in the size of the video. diffusers would choose a size again: 720x1264 for 9:16 at 720p.
        pipeline.video_processor.calculate_default_height_width = _own_size
    else:
        pipeline.vision_num_semantic_tokens = 0  # text-to-video has no image: leaves out 729 masked tokens
    if sampling.shift is not None:
        pipeline.scheduler.set_shift(sampling.shift)
    if sampling.guidance_scale is not None:
        pipeline.guider = pipeline.guider.new(guidance_scale=sampling.guidance_scale)


def _own_size(height: int, width: int, target_size: int) -> tuple[int, int]:  # noqa: ARG001 - diffusers passes it
    return height, width


def encode_no_words(pipeline: HunyuanVideo15Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """ByT5's states of a text without quotation marks, and their mask: zeros."""
    states: tuple[torch.Tensor, torch.Tensor] = pipeline._get_byt5_prompt_embeds(
        pipeline.tokenizer_2, pipeline.text_encoder_2, "", pipeline._execution_device, pipeline.tokenizer_2_max_length
    )
    return states


@contextmanager
def untiled(vae: AutoencoderKLHunyuanVideo15) -> Iterator[None]:
    """Makes the VAE encode an image in one piece inside the block, as the source does. Tiles differ at their edges."""
    tiling, vae.use_tiling = vae.use_tiling, False
    try:
        yield
    finally:
        vae.use_tiling = tiling


@contextmanager
def guided(pipeline: HunyuanVideo15Pipeline, scale: float | None) -> Iterator[None]:
    """Replaces the pipeline's guidance scale inside the block; None leaves it.

    The guider is a new one in any case: one that has guided a part of its steps only stays where it has stopped.
    """
    guider = pipeline.guider
    pipeline.guider = guider.new(**({} if scale is None else {"guidance_scale": scale}))
    try:
        yield
    finally:
        pipeline.guider = guider


@contextmanager
def step_callback(scheduler: Any, after_step: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Calls `after_step` after each step of the scheduler. An exception from it ends the pipeline's loop.

    It gets the middle frame of the clean latents as the step estimates them, (C, h, w). In flow matching a sample is
    clean latents + sigma * velocity (https://arxiv.org/abs/2210.02747).
    """
    step = scheduler.step

    def step_and_call(velocity: torch.Tensor, timestep: Any, sample: torch.Tensor, **named: Any) -> Any:
        result = step(velocity, timestep, sample, **named)
        sigma = scheduler.sigmas[scheduler.step_index - 1]
        middle = sample.shape[2] // 2
        after_step(sample[0, :, middle] - sigma * velocity[0, :, middle])
        return result

    scheduler.step = step_and_call
    try:
        yield
    finally:
        del scheduler.step
