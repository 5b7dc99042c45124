"""The transformer's repeated block, computed in chunks of tokens, and compiled where that pays.

All but attention works on each token by itself: what lies before it (norm, projection, rotation) and what lies after
it (projection, norm, feed-forward, both residuals) are two functions, called for `chunk` tokens at a time. At 1080p
each full-size temporary of theirs is 1 to 8 GB. The loops over chunks stay in Python, so that a compiled function
sees tokens as one dynamic dimension, and one compilation serves every size and length of video.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.embeddings import apply_rotary_emb

#: Tokens that are computed at once: enough to fill a GPU, 256 MB a temporary at the model's width.
CHUNK: Final = 65_536

#: Cosines and sines of the positions: (tokens, head size) each.
Rotation = tuple[torch.Tensor, torch.Tensor]


class Attend(Protocol):
    """Attention over (1, tokens, heads, head size) each, latent tokens first and `text` text tokens after them."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, text: int) -> torch.Tensor:
        """The attended tokens, of the query's shape."""
        ...


class ChunkedBlock:
    """Stands for the forward of one `HunyuanVideo15TransformerBlock`, whose batch is 1 and whose text is all valid."""

    def __init__(self, block: Any, attend: Attend, chunk: int = CHUNK) -> None:
        self._block = block
        self.attend = attend
        self._chunk = chunk
        self.use(before_attention, after_attention)

    def use(self, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Compute with these, which are the functions below, compiled or not."""
        self._before, self._after = before, after

    def __call__(
        self,
        hidden_states: torch.Tensor,  # (1, latent tokens, D)
        encoder_hidden_states: torch.Tensor,  # (1, text tokens, D)
        temb: torch.Tensor,
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002 - diffusers passes it
        freqs_cis: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The latent and text tokens, of the shapes that came in."""
        block, attn = self._block, self._block.attn
        hidden_states = hidden_states.contiguous()  # the first block is given a transposed view
        tokens, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        chunks = [slice(begin, min(begin + self._chunk, tokens)) for begin in range(0, tokens, self._chunk)]
        joint = [hidden_states.new_empty(1, tokens + text, attn.heads, attn.inner_dim // attn.heads) for _ in range(3)]
        for chunk in chunks:
            rotation = None if freqs_cis is None else (freqs_cis[0][chunk].detach(), freqs_cis[1][chunk].detach())
            _write(joint, chunk, self._before(block, _part(hidden_states, chunk), temb, rotation, text=False))
        _write(joint, slice(tokens, None), self._before(block, encoder_hidden_states, temb, None, text=True))
        attended = self.attend(*joint, text=text).flatten(2)  # (1, latent + text tokens, D)
        del joint
        latent = torch.empty_like(hidden_states)
        for chunk in chunks:
            states, seen = _part(hidden_states, chunk), _part(attended, chunk)
            latent[:, chunk] = self._after(block, states, seen, temb, text=False)
        seen = _part(attended, slice(tokens, None))
        return latent, self._after(block, encoder_hidden_states, seen, temb, text=True)


def _part(states: torch.Tensor, chunk: slice) -> torch.Tensor:
    """Some tokens of (1, tokens, D) that pass for a tensor of their own.

    Compiled functions are bound to strides, and to whether a view is as long as what it looks into.
    """
    return states[0, chunk][None].detach()


def _write(joint: list[torch.Tensor], chunk: slice, parts: tuple[torch.Tensor, ...]) -> None:
    for whole, part in zip(joint, parts, strict=True):
        whole[:, chunk] = part


def before_attention(
    block: Any, states: torch.Tensor, temb: torch.Tensor, rotation: Rotation | None, *, text: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of some tokens: (1, tokens, heads, head size) each."""
    attn = block.attn
    if text:
        norm, project = block.norm1_context, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norm_query, norm_key = attn.norm_added_q, attn.norm_added_k
    else:
        norm, project = block.norm1, (attn.to_q, attn.to_k, attn.to_v)
        norm_query, norm_key = attn.norm_q, attn.norm_k
    normed = norm(states, emb=temb)[0]
    query, key, value = (part(normed).unflatten(2, (attn.heads, -1)) for part in project)
    query, key = norm_query(query), norm_key(key)
    if rotation is not None:
        query, key = (apply_rotary_emb(part, rotation, sequence_dim=1) for part in (query, key))
    return query, key, value


def after_attention(
    block: Any, states: torch.Tensor, attended: torch.Tensor, temb: torch.Tensor, *, text: bool
) -> torch.Tensor:
    """Some tokens as the block leaves them: (1, tokens, D)."""
    if text:
        first, project = block.norm1_context, block.attn.to_add_out
        norm, feed_forward = block.norm2_context, block.ff_context
    else:
        first, project = block.norm1, block.attn.to_out[0]
        norm, feed_forward = block.norm2, block.ff
    _, gate, shift, scale, gate_feed_forward = first(states[:, :0], emb=temb)
    states = states + project(attended) * gate[:, None]
    normed = norm(states) * (1 + scale[:, None]) + shift[:, None]
    changed: torch.Tensor = states + gate_feed_forward[:, None] * feed_forward(normed)
    return changed


def use_chunks(transformer: HunyuanVideo15Transformer3DModel, attend: Attend, chunk: int = CHUNK) -> None:
    """Let each block of `transformer` compute in chunks, with `attend` for its attention."""
    for block in transformer.transformer_blocks:
        block.forward = ChunkedBlock(block, attend, chunk)


def chunked_blocks(transformer: HunyuanVideo15Transformer3DModel) -> Iterator[ChunkedBlock]:
    """What `use_chunks` has put there, whatever hooks are around it by now: those of step caching and of streaming."""
    for block in transformer.transformer_blocks:
        forward = inspect.unwrap(block.forward)
        assert isinstance(forward, ChunkedBlock)  # noqa: S101
        yield forward
