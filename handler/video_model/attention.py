"""Exact attention with no mask, and the choice of its kernel.

diffusers' own processor builds a dense boolean mask of S x S in each block: 12.9 GB for five seconds at 720p. At
batch size 1 the mask is only there to hide padded text tokens: text that is trimmed to its valid tokens needs none,
and every kernel that takes no mask can be used.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Final

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb

log = logging.getLogger(__name__)

#: PyTorch's scaled_dot_product_attention, which picks its kernel itself.
NATIVE: Final = "native"


class MaskFreeAttnProcessor:
    """Joint attention over latent and text tokens, all of them valid. The mask that it is given is not looked at."""

    _parallel_config = None

    def __init__(self, backend: str = NATIVE) -> None:
        self._attention_backend = AttentionBackendName(backend)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,  # (1, latent tokens, D)
        encoder_hidden_states: torch.Tensor,  # (1, text tokens, D)
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002 - diffusers passes it
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attended latent and text tokens, of the shapes that came in."""
        latent_tokens = hidden_states.shape[1]
        # (1, tokens, heads, D / heads)
        query, key, value = (
            project(hidden_states).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        text_query, text_key, text_value = (
            project(encoder_hidden_states).unflatten(2, (attn.heads, -1))
            for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        text_query, text_key = attn.norm_added_q(text_query), attn.norm_added_k(text_key)
        attended = dispatch_attention_fn(
            torch.cat([query, text_query], dim=1),
            torch.cat([key, text_key], dim=1),
            torch.cat([value, text_value], dim=1),
            attn_mask=None,
            backend=self._attention_backend,
        )
        attended = attended.flatten(2, 3).to(query.dtype)  # (1, latent + text tokens, D)
        latent, text = attended[:, :latent_tokens], attended[:, latent_tokens:]
        return attn.to_out[1](attn.to_out[0](latent)), attn.to_add_out(text)


def use_mask_free_attention(transformer: HunyuanVideo15Transformer3DModel, backend: str) -> None:
    """Trim the text that comes in, and put the processor into each block.

    The text refiner keeps its own processor: its sequence is short. The batch must be 1.
    """
    transformer.register_forward_pre_hook(_trim_text, with_kwargs=True)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(MaskFreeAttnProcessor(backend))


def _trim_text(
    _: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Both texts and their masks cut to what is valid: tokenizers pad on the right, so that is a prefix."""
    trimmed = dict(named)
    for suffix in ("", "_2"):
        states, mask = f"encoder_hidden_states{suffix}", f"encoder_attention_mask{suffix}"
        length = int(named[mask].sum())
        trimmed[states], trimmed[mask] = named[states][:, :length], named[mask][:, :length]
    return arguments, trimmed


def choose_backend(device: str, *, flash: bool, sage: bool) -> str:
    """The kernel for these settings on this device, in diffusers' names; what can't be had is said once, loudly.

    Source: https://huggingface.co/docs/diffusers/optimization/attention_backends
    """
    if device != "cuda":
        if sage:
            log.warning("HUNYUAN_ENABLE_SAGE_ATTN: sageattention needs a CUDA GPU; using PyTorch's attention")
        return NATIVE
    if sage:
        if _installed("sageattention"):
            return "sage"
        log.warning("HUNYUAN_ENABLE_SAGE_ATTN: sageattention is not installed; doing without")
    if not flash:
        return "_native_efficient"
    for module, backend in (("flash_attn_interface", "_flash_3"), ("flash_attn", "flash")):
        if _installed(module):
            return backend
    log.warning("HUNYUAN_ENABLE_FLASH_ATTN: flash-attn is not installed; using PyTorch's own flash attention")
    return NATIVE


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
