"""Approximations: faster or smaller renders with slightly different numbers. All are off by default."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from diffusers import FirstBlockCacheConfig, HunyuanVideo15Transformer3DModel, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15TransformerBlock
from torch import nn

from handler.settings import Approximation
from handler.video_model.attention import use_window_attention
from handler.video_model.step_cache import MAGCACHE, TEACACHE, Rule, cache_steps

log = logging.getLogger(__name__)

#: A step reuses the other blocks' output if the first block's output changed by less than this, on average.
CACHE_THRESHOLD: Final = 0.05
#: TaylorSeer computes one of so many steps and extrapolates the others from the last two computed ones. It computes all
#: of the first steps. diffusers' defaults, not tuned for this model.
TAYLORSEER_INTERVAL: Final = 5
TAYLORSEER_FIRST_STEPS: Final = 3
#: Caches whose numbers are measured on a checkpoint, by its name.
_PUBLISHED_CACHES: Final[Mapping[Approximation, Mapping[str, Rule]]] = {
    Approximation.MAGCACHE: MAGCACHE,
    Approximation.TEACACHE: TEACACHE,
}
#: Latent frames before and after its own that a latent token of super-resolution attends to. A second has six frames.
WINDOW_RADIUS: Final = 4


class Fp8Linear(nn.Module):
    """A linear layer that stores its weight in 8 bits with a scale for each row, and computes in its input's dtype.

    diffusers' layerwise casting has no scales, although 8-bit floats are coarsest where a transformer's weights are. It
    also writes each weight back after each use, which cannot be compiled.
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
        """(..., in) to (..., out)."""
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def _store_in_8_bits(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Fp8Linear(child))
        else:
            _store_in_8_bits(child)


def approximate(
    transformers: Sequence[HunyuanVideo15Transformer3DModel],
    enabled: Collection[Approximation],
    *,
    many_steps: Sequence[HunyuanVideo15Transformer3DModel] = (),
    bases: Mapping[str, HunyuanVideo15Transformer3DModel] | None = None,
    upscalers: Sequence[HunyuanVideo15Transformer3DModel] = (),
    cache_threshold: float = CACHE_THRESHOLD,
) -> list[Approximation]:
    """Applies the enabled approximations to `transformers`, before they are moved. Returns those that have an effect.

    Step caching applies only to `many_steps`: with few steps, no two are alike. MagCache and TeaCache apply only to the
    checkpoints of `bases`, by name, for which numbers are published. Window attention applies only to `upscalers`.
    Source: https://huggingface.co/docs/diffusers/optimization/cache
    """
    if Approximation.FP8_WEIGHTS in enabled:
        for transformer in transformers:
            _store_in_8_bits(transformer.transformer_blocks)
    if Approximation.FIRST_BLOCK_CACHE in enabled:
        TransformerBlockRegistry.register(
            HunyuanVideo15TransformerBlock,
            TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
        )
        for transformer in many_steps:
            transformer.enable_cache(FirstBlockCacheConfig(threshold=cache_threshold))
    if Approximation.TAYLORSEER in enabled:
        for transformer in many_steps:
            transformer.enable_cache(
                TaylorSeerCacheConfig(
                    cache_interval=TAYLORSEER_INTERVAL,
                    disable_cache_before_step=TAYLORSEER_FIRST_STEPS,
                    taylor_factors_dtype=transformer.dtype,
                    use_lite_mode=True,  # caches the transformer's output, not each block's, which takes 50 GB at 720p
                )
            )
    for cache, published in _PUBLISHED_CACHES.items():
        if cache in enabled:
            _cache_published(cache, published, bases or {})
    if Approximation.SR_WINDOW_ATTENTION in enabled:
        for transformer in upscalers:
            use_window_attention(transformer, WINDOW_RADIUS)
    without_effect = {cache for cache, published in _PUBLISHED_CACHES.items() if not published.keys() & (bases or {})}
    return [each for each in enabled if each not in without_effect]


def _cache_published(
    cache: Approximation, published: Mapping[str, Rule], bases: Mapping[str, HunyuanVideo15Transformer3DModel]
) -> None:
    exact = [name for name in bases if name not in published]
    for name in bases.keys() - set(exact):
        cache_steps(bases[name], published[name])
    if exact or not bases:
        log.warning(
            "HUNYUAN_APPROXIMATIONS: %s has published numbers for %s only; every step of %s is computed",
            cache,
            ", ".join(published),
            ", ".join(exact) or "this model",
        )
