"""Faster or smaller, and not quite the same: what an operator may ask for by name. Each is off unless asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from diffusers import FirstBlockCacheConfig, HunyuanVideo15Transformer3DModel, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15TransformerBlock
from torch import nn

from handler.settings import Approximation
from handler.video_model.attention import use_window_attention

#: Mean change of the first block's output under which a step takes over the rest from the one before.
CACHE_THRESHOLD: Final = 0.05
#: Of so many steps one is computed, the rest extrapolated from the two computed last, after so many that are computed
#: all. diffusers' defaults, not tuned for this model.
TAYLORSEER_INTERVAL: Final = 5
TAYLORSEER_FIRST_STEPS: Final = 3
#: Latent frames before and after its own that a latent token of super-resolution attends to; a second has six.
WINDOW_RADIUS: Final = 4


class Fp8Linear(nn.Module):
    """A linear layer whose weight is kept in 8 bits, each row with a scale, and computed with as its input comes.

    diffusers' layerwise casting has no scales, and the weights of a transformer lie where 8 bits are coarsest; it also
    writes each weight back after each use, which can't be compiled.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        largest = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = largest / torch.finfo(torch.float8_e4m3fn).max
        self.weight = nn.Parameter((weight.float() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` times the weight, plus the bias."""
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def _keep_in_8_bits(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Fp8Linear(child))
        else:
            _keep_in_8_bits(child)


def approximate(
    transformers: Sequence[HunyuanVideo15Transformer3DModel],
    wanted: Collection[Approximation],
    *,
    many_steps: Sequence[HunyuanVideo15Transformer3DModel] = (),
    upscalers: Sequence[HunyuanVideo15Transformer3DModel] = (),
    cache_threshold: float = CACHE_THRESHOLD,
) -> None:
    """Apply what is wanted to `transformers`, before they go to their device.

    Those of `many_steps` are the ones whose steps may be cached: where there are few, no two are alike. `upscalers` are
    those of super-resolution. Source: https://huggingface.co/docs/diffusers/optimization/cache
    """
    if Approximation.FP8_WEIGHTS in wanted:
        for transformer in transformers:
            _keep_in_8_bits(transformer.transformer_blocks)
    if Approximation.FIRST_BLOCK_CACHE in wanted:
        TransformerBlockRegistry.register(
            HunyuanVideo15TransformerBlock,
            TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
        )
        for transformer in many_steps:
            transformer.enable_cache(FirstBlockCacheConfig(threshold=cache_threshold))
    if Approximation.TAYLORSEER in wanted:
        for transformer in many_steps:
            transformer.enable_cache(
                TaylorSeerCacheConfig(
                    cache_interval=TAYLORSEER_INTERVAL,
                    disable_cache_before_step=TAYLORSEER_FIRST_STEPS,
                    taylor_factors_dtype=transformer.dtype,
                    use_lite_mode=True,  # keeps what the transformer puts out, not what each block does: 50 GB at 720p
                )
            )
    if Approximation.SR_WINDOW_ATTENTION in wanted:
        for transformer in upscalers:
            use_window_attention(transformer, WINDOW_RADIUS)
