"""Exact attention with no mask, and the choice of its kernel.

diffusers' own processor builds a dense boolean mask of S x S in each block: 12.9 GB for five seconds at 720p. At
batch size 1 the mask is only there to hide padded text tokens: text that is trimmed to its valid tokens needs none,
and every kernel that takes no mask can be used.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock
from diffusers.models.embeddings import apply_rotary_emb

log = logging.getLogger(__name__)

#: PyTorch's scaled_dot_product_attention, which picks its kernel itself.
NATIVE: Final = "native"
#: Tokens that are projected at once: enough to fill a GPU, 256 MB a temporary at the model's width.
CHUNK: Final = 65_536


class MaskFreeAttnProcessor:
    """Joint attention over latent and text tokens, all of them valid. The mask that it is given is not looked at.

    What lies between the block's input and the kernel (projection, norm, rotation in float32) is done `chunk` tokens
    at a time, straight into the joint tensors: at 1080p each full-size temporary is 1 to 4 GB.
    """

    _parallel_config = None

    def __init__(self, backend: str = NATIVE, chunk: int = CHUNK) -> None:
        self._attention_backend = AttentionBackendName(backend)
        self._chunk = chunk

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,  # (1, latent tokens, D)
        encoder_hidden_states: torch.Tensor,  # (1, text tokens, D)
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002 - diffusers passes it
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attended latent and text tokens, of the shapes that came in."""
        joint = [
            self._joint(attn, hidden_states, encoder_hidden_states, parts, image_rotary_emb)
            for parts in (
                (attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
                (attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
                (attn.to_v, None, attn.add_v_proj, None),
            )
        ]
        attended = dispatch_attention_fn(*joint, attn_mask=None, backend=self._attention_backend)
        del joint
        attended = attended.flatten(2, 3)  # (1, latent + text tokens, D)
        latent, text = attended.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](latent)), attn.to_add_out(text)

    def _joint(
        self,
        attn: Any,
        latent: torch.Tensor,
        text: torch.Tensor,
        parts: tuple[Any, Any, Any, Any],
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Query, key or value of both: (1, latent + text tokens, heads, D / heads). A value has no norm."""
        project, norm, project_text, norm_text = parts
        tokens = latent.shape[1]
        joint = latent.new_empty(1, tokens + text.shape[1], attn.heads, attn.inner_dim // attn.heads)
        for begin in range(0, tokens, self._chunk):
            chunk = slice(begin, min(begin + self._chunk, tokens))
            states = project(latent[:, chunk]).unflatten(2, (attn.heads, -1))
            if norm is not None:
                states = norm(states)
                if rotation is not None:
                    cosine, sine = rotation
                    states = apply_rotary_emb(states, (cosine[chunk], sine[chunk]), sequence_dim=1)
            joint[:, chunk] = states
        states = project_text(text).unflatten(2, (attn.heads, -1))
        joint[:, tokens:] = states if norm_text is None else norm_text(states)
        return joint


def use_mask_free_attention(transformer: HunyuanVideo15Transformer3DModel, backend: str, *, chunk: int = CHUNK) -> None:
    """Trim the text that comes in, and put the processor into each block; the feed-forward works in chunks, too.

    The text refiner keeps its own processor: its sequence is short. The batch must be 1.
    """
    transformer.register_forward_pre_hook(_trim_text, with_kwargs=True)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(MaskFreeAttnProcessor(backend, chunk))
        block.ff.forward = partial(_in_chunks, block.ff.forward, chunk)


def use_fast_causal_mask(vae: AutoencoderKLHunyuanVideo15) -> None:
    """Make the VAE's frame-causal mask in one go and once for all tiles: the stock one is filled row by row.

    A tile of 256 pixels and 121 frames has 7,936 rows, each a kernel launch, and a 720p video has 28 tiles.
    """
    for module in vae.modules():
        if isinstance(module, HunyuanVideo15AttnBlock):
            module.prepare_causal_attention_mask = causal_mask


@lru_cache(maxsize=1)
def causal_mask(
    n_frame: int, n_hw: int, dtype: torch.dtype, device: torch.device, batch_size: int | None = None
) -> torch.Tensor:
    """(S, S), or (batch, S, S): 0 where the key's frame is the query's or an earlier one, else -inf."""
    frame = torch.arange(n_frame, device=device).repeat_interleave(n_hw)
    mask = torch.zeros(len(frame), len(frame), dtype=dtype, device=device)
    mask.masked_fill_(frame[None, :] > frame[:, None], float("-inf"))
    return mask if batch_size is None else mask.expand(batch_size, -1, -1)


def _in_chunks(forward: Callable[[torch.Tensor], torch.Tensor], chunk: int, states: torch.Tensor) -> torch.Tensor:
    """A feed-forward of (1, tokens, D), whose inside is four times as wide, `chunk` tokens at a time."""
    if states.shape[1] <= chunk:
        return forward(states)
    result = torch.empty_like(states)
    for begin in range(0, states.shape[1], chunk):
        result[:, begin : begin + chunk] = forward(states[:, begin : begin + chunk])
    return result


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
