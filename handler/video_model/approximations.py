"""Faster or smaller, and not quite the same: what an operator may ask for by name. Each is off unless asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import torch
from diffusers import FirstBlockCacheConfig, HunyuanVideo15Transformer3DModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15TransformerBlock

from handler.settings import Approximation

#: Mean change of the first block's output under which a step takes over the rest from the one before.
CACHE_THRESHOLD: Final = 0.05


def approximate(
    bases: Sequence[HunyuanVideo15Transformer3DModel],
    upscalers: Sequence[HunyuanVideo15Transformer3DModel],
    wanted: Collection[Approximation],
    *,
    cache_threshold: float = CACHE_THRESHOLD,
) -> None:
    """Apply what is wanted, before the transformers go to their device.

    Step caching is for base models alone: super-resolution has few steps, and no two are alike.
    Source: https://huggingface.co/docs/diffusers/optimization/memory#layerwise-casting and .../optimization/cache
    """
    if Approximation.FP8_WEIGHTS in wanted:
        for transformer in (*bases, *upscalers):
            transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype)
    if Approximation.FIRST_BLOCK_CACHE in wanted:
        TransformerBlockRegistry.register(
            HunyuanVideo15TransformerBlock,
            TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
        )
        for transformer in bases:
            transformer.enable_cache(FirstBlockCacheConfig(threshold=cache_threshold))
