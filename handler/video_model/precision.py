"""Sampling in float32 around a transformer that computes in 16 bits.

Between two steps the latents stay in float32: a step adds a velocity times a small difference of noise levels, and in
bfloat16 the smaller of these sums round back to the latents as they were. Timesteps stay in float32, too: bfloat16 has
eight bits for them, so that neighbouring ones become equal. Only what enters the transformer is rounded. Source:
https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5, hyvideo/pipelines/hunyuan_video_pipeline.py (its loop, under
autocast) and hyvideo/models/transformers/modules/embed_layers.py (the sinusoid of a timestep).
"""

from typing import Any

import torch
from diffusers import HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel
from torch import nn


def sample_in_float32(transformer: HunyuanVideo15Transformer3DModel) -> None:
    """Makes the transformer take latents and timesteps in float32, and return its velocity in float32.

    Latents are cast to the weights' dtype where they enter, and a timestep after its sinusoid. The other arguments keep
    the dtype of the weights. A transformer in float32 computes as before.
    """
    embed = transformer.time_embed
    for module in (transformer.x_embedder, embed.timestep_embedder, embed.timestep_embedder_r):
        if module is not None:
            module.register_forward_pre_hook(_cast_to_weights)
    transformer.proj_out.register_forward_hook(_cast_to_float32)


def start_in_float32(pipeline: HunyuanVideo15Pipeline) -> None:
    """Makes the pipeline's loop start from float32 latents: its own noise in the transformer's dtype, then cast.

    The loop keeps the dtype of the latents, and computes timesteps and the transformer's input in it. Call
    `sample_in_float32` for the transformer.
    """
    prepare = pipeline.prepare_latents

    def prepare_in_float32(*arguments: Any, **named: Any) -> torch.Tensor:
        latents: torch.Tensor = prepare(*arguments, **named)
        return latents.float()

    pipeline.prepare_latents = prepare_in_float32


def _cast_to_weights(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    first, *others = arguments
    return (first.to(next(module.parameters()).dtype), *others)


def _cast_to_float32(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.float()
