"""Exact attention without a mask, and the choice of its kernel.

diffusers' own processor builds a dense boolean mask of S x S in each block: 12.9 GB for five seconds at 720p. At batch
size 1 the mask only hides padded text tokens. Text that is trimmed to its valid tokens needs no mask, and kernels that
support no mask can be used.

Source of the stock processor: diffusers, models/transformers/transformer_hunyuan_video15.py.
"""

import logging
from importlib.util import find_spec
from typing import Any, Final

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from handler.video_model.blocks import CHUNK, Attend, chunked_blocks, use_chunks

log = logging.getLogger(__name__)

#: PyTorch's scaled_dot_product_attention, which chooses its own kernel.
NATIVE: Final = "native"


class FullAttention:
    """Each token attends to all latent and text tokens, with one of diffusers' kernels. All tokens must be valid."""

    def __init__(self, backend: str = NATIVE) -> None:
        self._backend = AttentionBackendName(backend)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        text: int,  # noqa: ARG002 - full attention treats text and latent tokens alike
    ) -> torch.Tensor:
        """See `Attend`."""
        attended: torch.Tensor = dispatch_attention_fn(query, key, value, attn_mask=None, backend=self._backend)
        return attended


def use_mask_free_attention(transformer: HunyuanVideo15Transformer3DModel, backend: str, *, chunk: int = CHUNK) -> None:
    """Trims incoming text, and makes each block attend without a mask and compute in chunks. The batch must be 1.

    The text refiner keeps its own processor: its sequence is short.
    """
    transformer.register_forward_pre_hook(_trim_text, with_kwargs=True)
    use_chunks(transformer, FullAttention(backend), chunk)


class WindowAttention:
    """Latent tokens attend to the frames near their own and to all text, text tokens to everything. Approximate.

    Calls `attend` for each frame with the keys of its window, so that any kernel works without a mask. Time grows with
    the number of frames, not with its square. Windows at the ends are as wide as the others.
    """

    def __init__(self, attend: Attend, radius: int) -> None:
        self._attend = attend
        self._radius = radius
        self._frames = 1

    def note_frames(self, _: torch.nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A pre-forward hook of the transformer that notes the number of latent frames."""
        self._frames = named["hidden_states"].shape[2]

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, text: int) -> torch.Tensor:
        """See `Attend`."""
        width = 2 * self._radius + 1
        if width >= self._frames:
            return self._attend(query, key, value, text=text)
        latent = query.shape[1] - text
        size = latent // self._frames
        attended = torch.empty_like(query)
        for frame in range(self._frames):
            first = min(max(frame - self._radius, 0), self._frames - width)
            window = slice(first * size, (first + width) * size)
            visible = [torch.cat([whole[:, window], whole[:, latent:]], dim=1) for whole in (key, value)]
            own = slice(frame * size, (frame + 1) * size)
            attended[:, own] = self._attend(query[:, own], *visible, text=text)
        attended[:, latent:] = self._attend(query[:, latent:], key, value, text=text)
        return attended


def use_window_attention(transformer: HunyuanVideo15Transformer3DModel, radius: int) -> None:
    """Makes latent tokens attend to `radius` frames before and after theirs. Call after `use_mask_free_attention`."""
    blocks = list(chunked_blocks(transformer))
    window = WindowAttention(blocks[0].attend, radius)
    transformer.register_forward_pre_hook(window.note_frames, with_kwargs=True)
    for block in blocks:
        block.attend = window


def _trim_text(
    _: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cuts both texts and their masks to the valid tokens. Tokenizers pad on the right, so these are a prefix."""
    trimmed = dict(named)
    for suffix in ("", "_2"):
        states, mask = f"encoder_hidden_states{suffix}", f"encoder_attention_mask{suffix}"
        length = int(named[mask].sum())
        trimmed[states], trimmed[mask] = named[states][:, :length], named[mask][:, :length]
    return arguments, trimmed


def choose_backend(device: str, *, flash: bool, sage: bool) -> str:
    """The kernel for these settings on this device, in diffusers' names. Logs a warning if a setting cannot be met.

    Source: https://huggingface.co/docs/diffusers/optimization/attention_backends
    """
    if device != "cuda":
        if sage:
            log.warning(
                "HUNYUAN_ENABLE_SAGE_ATTN has no effect: sageattention needs a CUDA GPU; using PyTorch's attention"
            )
        return NATIVE
    if sage:
        if find_spec("sageattention"):
            return "sage"
        log.warning("HUNYUAN_ENABLE_SAGE_ATTN has no effect: install the package sageattention, or set it to false")
    if not flash:
        return "_native_efficient"
    for module, backend in (("flash_attn_interface", "_flash_3"), ("flash_attn", "flash")):
        if find_spec(module):
            return backend
    log.warning("HUNYUAN_ENABLE_FLASH_ATTN: flash-attn is not installed; using PyTorch's own flash attention")
    return NATIVE
