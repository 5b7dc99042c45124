"""The transformer's repeated block, computed in chunks of tokens, and compiled on a GPU.

Everything but attention computes each token alone. The part before attention (norm, projection, rotation) and the part
after it (projection, norm, feed-forward, both residuals) are therefore two functions, called for `chunk` tokens at a
time: at 1080p each of their full-size temporaries would take 1 to 8 GB. The loops over chunks stay in Python. Thus a
compiled function sees tokens as one dynamic dimension, and one compilation serves every size and length of video.

Source of the arithmetic: diffusers, models/transformers/transformer_hunyuan_video15.py.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.embeddings import apply_rotary_emb

from handler.video_model.memory import CHUNK

#: Cosines and sines of the positions, each (tokens, head size).
Rotation = tuple[torch.Tensor, torch.Tensor]

#: What LoRA adapters add to a linear layer: `up @ down @ x`, with shapes (out, rank) and (rank, in).
LowRank = tuple[torch.Tensor, torch.Tensor]

#: The linear layers of a block.
LINEAR_LAYERS: Final = (
    *("norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"),
    *("norm1_context.linear", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff_context.net.0.proj", "ff_context.net.2"),
)


class Attend(Protocol):
    """Attention over (1, tokens, heads, head size): latent tokens first, then `text` text tokens."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, text: int) -> torch.Tensor:
        """Returns the attended tokens in the query's shape."""


class ChunkedBlock:
    """Replaces `forward` of a `HunyuanVideo15TransformerBlock`. The batch must be 1, and all text tokens valid."""

    def __init__(self, block: Any, attend: Attend, chunk: int = CHUNK) -> None:
        self._block = block
        self.attend = attend
        #: By the layer's name in the block; None without LoRA adapters.
        self.low_rank: Mapping[str, LowRank] | None = None
        self._chunk = chunk
        self.set_functions(before_attention, after_attention)

    def set_functions(self, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Sets `before_attention` and `after_attention`, compiled or not."""
        self._before, self._after = before, after

    @property
    def is_compiled(self) -> bool:
        """Whether its functions are compiled."""
        return self._before is not before_attention

    def __call__(
        self,
        hidden_states: torch.Tensor,  # (1, latent tokens, D)
        encoder_hidden_states: torch.Tensor,  # (1, text tokens, D)
        temb: torch.Tensor,
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002 - diffusers passes it
        freqs_cis: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns latent and text tokens in the shapes of the inputs."""
        block, attn, low_rank = self._block, self._block.attn, self.low_rank
        tokens, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        chunks = [slice(begin, min(begin + self._chunk, tokens)) for begin in range(0, tokens, self._chunk)]
        # 1. Query, key and value of all tokens: (1, latent + text tokens, heads, head size) each.
        joint = [hidden_states.new_empty(1, tokens + text, attn.heads, attn.inner_dim // attn.heads) for _ in range(3)]
        for chunk in chunks:
            rotation = None if freqs_cis is None else (freqs_cis[0][chunk].detach(), freqs_cis[1][chunk].detach())
            part = _part(hidden_states, chunk)
            _write(joint, chunk, self._before(block, part, temb, rotation, low_rank, text=False))
        own = self._before(block, encoder_hidden_states, temb, None, low_rank, text=True)
        _write(joint, slice(tokens, None), own)
        # 2. Attention over all tokens.
        attended = self.attend(*joint, text=text).flatten(2)  # (1, latent + text tokens, D)
        del joint
        # 3. Projection, feed-forward and residuals.
        latent = torch.empty_like(hidden_states)
        for chunk in chunks:
            states, attended_part = _part(hidden_states, chunk), _part(attended, chunk)
            latent[:, chunk] = self._after(block, states, attended_part, temb, low_rank, text=False)
        attended_text = _part(attended, slice(tokens, None))
        return latent, self._after(block, encoder_hidden_states, attended_text, temb, low_rank, text=True)


def _part(states: torch.Tensor, chunk: slice) -> torch.Tensor:
    """Some tokens of (1, tokens, D), as a view that a compiled function accepts like a whole tensor.

    Indexing `[0]` and `[None]` gives every chunk the same strides. `detach` hides its base from the compiler's guards.
    """
    return states[0, chunk][None].detach()


def _write(joint: list[torch.Tensor], chunk: slice, parts: tuple[torch.Tensor, ...]) -> None:
    for whole, part in zip(joint, parts, strict=True):
        whole[:, chunk] = part


def before_attention(
    block: Any,
    states: torch.Tensor,
    temb: torch.Tensor,
    rotation: Rotation | None,
    low_rank: Mapping[str, LowRank] | None = None,
    *,
    text: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of some tokens, each (1, tokens, heads, head size)."""
    attn = block.attn
    if text:
        norm, modulation = block.norm1_context, "norm1_context.linear"
        layers = {
            "attn.add_q_proj": attn.add_q_proj,
            "attn.add_k_proj": attn.add_k_proj,
            "attn.add_v_proj": attn.add_v_proj,
        }
        norm_query, norm_key = attn.norm_added_q, attn.norm_added_k
    else:
        norm, modulation = block.norm1, "norm1.linear"
        layers = {"attn.to_q": attn.to_q, "attn.to_k": attn.to_k, "attn.to_v": attn.to_v}
        norm_query, norm_key = attn.norm_q, attn.norm_k
    shift, scale, *_ = _linear(norm.linear, norm.silu(temb), low_rank, modulation).chunk(6, dim=1)
    normed = norm.norm(states) * (1 + scale[:, None]) + shift[:, None]
    query, key, value = (
        _linear(layer, normed, low_rank, name).unflatten(2, (attn.heads, -1)) for name, layer in layers.items()
    )
    query, key = norm_query(query), norm_key(key)
    if rotation is not None:
        query, key = (apply_rotary_emb(part, rotation, sequence_dim=1) for part in (query, key))
    return query, key, value


def after_attention(
    block: Any,
    states: torch.Tensor,
    attended: torch.Tensor,
    temb: torch.Tensor,
    low_rank: Mapping[str, LowRank] | None = None,
    *,
    text: bool,
) -> torch.Tensor:
    """The block's output for some tokens: (1, tokens, D)."""
    if text:
        first, modulation = block.norm1_context, "norm1_context.linear"
        project, projection = block.attn.to_add_out, "attn.to_add_out"
        norm, feed_forward, name = block.norm2_context, block.ff_context, "ff_context"
    else:
        first, modulation = block.norm1, "norm1.linear"
        project, projection = block.attn.to_out[0], "attn.to_out.0"
        norm, feed_forward, name = block.norm2, block.ff, "ff"
    modulated = _linear(first.linear, first.silu(temb), low_rank, modulation)
    _, _, gate, shift, scale, gate_feed_forward = modulated.chunk(6, dim=1)
    states = states + _linear(project, attended, low_rank, projection) * gate[:, None]
    normed = norm(states) * (1 + scale[:, None]) + shift[:, None]
    widen, _, narrow = feed_forward.net
    wide = widen.gelu(_linear(widen.proj, normed, low_rank, f"{name}.net.0.proj"))
    changed: torch.Tensor = states + gate_feed_forward[:, None] * _linear(narrow, wide, low_rank, f"{name}.net.2")
    return changed


def _linear(layer: Any, inputs: torch.Tensor, low_rank: Mapping[str, LowRank] | None, name: str) -> Any:
    """The layer's output, with what `low_rank` adds to the layer called `name`."""
    outputs = layer(inputs)
    if low_rank is not None and name in low_rank:
        down, up = low_rank[name]
        # In place: another tensor of a chunk's size would raise the peak of memory.
        outputs.view(-1, outputs.shape[-1]).addmm_(F.linear(inputs, down).flatten(0, -2), up.t())
    return outputs


def use_chunks(transformer: HunyuanVideo15Transformer3DModel, attend: Attend, chunk: int = CHUNK) -> None:
    """Makes each block of `transformer` compute in chunks, with `attend` as its attention."""
    # The embedder gives a transposed view. A copy in the first block would keep both alive for as long as it computes.
    transformer.x_embedder.register_forward_hook(lambda _, __, tokens: tokens.contiguous())
    for block in transformer.transformer_blocks:
        block.forward = ChunkedBlock(block, attend, chunk)


def chunked_blocks(transformer: HunyuanVideo15Transformer3DModel) -> Iterator[ChunkedBlock]:
    """The `ChunkedBlock` of each block, under the hooks that step caching and streaming may have added."""
    for block in transformer.transformer_blocks:
        forward = inspect.unwrap(block.forward)
        assert isinstance(forward, ChunkedBlock)  # noqa: S101
        yield forward
