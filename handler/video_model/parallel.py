"""A render that several processes share, each with a GPU of its own. They run the same code over the same numbers.

Only the transformers' passes are shared. Two passes of a step, with the prompt and with the negative prompt, are
computed at the same time by one half of the ranks each. In a pass, every rank has a part of the latent tokens and all
text tokens. Before attention the ranks exchange tokens for heads, so that each attends with some of the heads over all
tokens, and after it they change back (DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509). Everything between two
passes, sampling included, is computed by every rank, so that all of them have the same latents at every step.

diffusers' context parallelism (`enable_parallelism`) does the same for models that have a plan for it, which this one
does not, and for numbers of tokens that the ranks divide evenly, which latents of a video rarely are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from diffusers import HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel
from torch import nn
from torch.distributed import FileStore  # type: ignore[attr-defined] # not exported

from handler.video_model.base import ModelLoadError
from handler.video_model.blocks import Attend, Rotation, chunked_blocks

#: The passes of a guided step: with the prompt, and with the negative prompt.
_PASSES: Final = 2
#: A rank may wait this long for another: the watchdog of the worker ends a render that hangs long before.
_TIMEOUT: Final = timedelta(hours=6)


@dataclass(frozen=True)
class Group:
    """Ranks that exchange tensors. `rank` is this process's position among them."""

    process_group: Any
    ranks: tuple[int, ...]
    rank: int

    @classmethod
    def among(cls, parts: Sequence[Sequence[int]], own: int) -> Group:
        """Makes a group of each part, as every rank must in the same order. Returns the one that has rank `own`."""
        made = {tuple(ranks): dist.new_group(list(ranks), timeout=_TIMEOUT) for ranks in parts}
        ranks = next(ranks for ranks in made if own in ranks)
        return cls(made[ranks], ranks, ranks.index(own))

    @property
    def size(self) -> int:
        """Of the group."""
        return len(self.ranks)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Fills `tensor` with that of the rank at position `source`."""
        dist.broadcast(tensor, self.ranks[source], group=self.process_group)


@dataclass(frozen=True)
class Groups:
    """All ranks; the half that computes the same pass as this one; and this one's counterpart in the other half."""

    everyone: Group
    half: Group
    pair: Group


class Parallel:
    """This process's part of a render. `rank` counts from 0 to `size` - 1; `size` is 1, 2, 4 or 8.

    Until `join`, and after `leave`, it computes everything alone.
    """

    def __init__(self, rank: int, size: int, directory: Path, *, backend: str) -> None:
        self.rank, self.size, self.backend = rank, size, backend
        self._directory = directory
        self._groups: Groups | None = None
        self._attempt = 0
        #: The ranks that share the tokens of the current pass, and how many tokens each has; None if there is no other.
        self._sharing: Group | None = None
        self._tokens: list[int] = []

    def join(self, attempt: int) -> None:
        """Connects the ranks, unless this attempt has, and waits until each has called this with the same number."""
        if self._groups is not None and attempt == self._attempt:
            return
        self.leave()
        self._attempt = attempt
        store = FileStore(str(self._directory / f"ranks-{attempt}"), self.size)
        dist.init_process_group(self.backend, store=store, rank=self.rank, world_size=self.size, timeout=_TIMEOUT)
        everyone, half = range(self.size), self.size // _PASSES
        parts = [everyone], [everyone[:half], everyone[half:]], [everyone[first::half] for first in range(half)]
        self._groups = Groups(*(Group.among(each, self.rank) for each in parts))
        self.share_with(self._groups.everyone)

    def leave(self) -> None:
        """Disconnects this rank. The others' calls that wait for it fail."""
        self._groups = self._sharing = None
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_joined(self) -> bool:
        """Whether the ranks are connected."""
        return self._groups is not None

    def abort(self) -> None:
        """Ends a call that waits for another rank, from another thread. Gloo's calls fail when that rank leaves."""
        if self.backend == dist.Backend.NCCL and dist.is_initialized():
            dist.distributed_c10d._abort_process_group()

    # The tokens of a pass

    def share(self, transformer: HunyuanVideo15Transformer3DModel) -> None:
        """Makes the transformer compute this rank's tokens, and return those of all.

        Call after everything else that changes attention, and before anything that adds hooks to one of its layers.

        Raises:
            ModelLoadError: the ranks cannot share the transformer's heads.
        """
        heads = transformer.config.num_attention_heads
        if heads % self.size:
            raise ModelLoadError(f"HUNYUAN_GPUS_PER_JOB: {self.size} GPUs cannot share {heads} attention heads evenly")
        transformer.rope.register_forward_hook(self._own_positions)
        transformer.x_embedder.register_forward_hook(self._own_tokens)
        transformer.proj_out.register_forward_hook(self._all_tokens)
        for block in chunked_blocks(transformer):
            block.attend = _Ulysses(block.attend, self)

    @property
    def tokens(self) -> TokenExchange | None:
        """How to exchange the tokens of the current pass; None if this rank has all of them."""
        sharing = self._sharing
        return None if sharing is None else TokenExchange(sharing, self._tokens)

    def share_with(self, group: Group) -> None:
        """From the next pass on, shares its tokens with these ranks."""
        self._sharing = group if group.size > 1 else None

    def _own_positions(self, _: nn.Module, __: Any, rotation: Rotation) -> Rotation:
        if self._sharing is None:
            return rotation
        own = _part(len(rotation[0]), self._sharing)
        return rotation[0][own], rotation[1][own]

    def _own_tokens(self, _: nn.Module, __: Any, tokens: torch.Tensor) -> torch.Tensor:
        """(1, all tokens, D) to (1, own tokens, D)."""
        if self._sharing is None:
            return tokens
        self._tokens = token_counts(tokens.shape[1], self._sharing.size)
        return tokens[:, _part(tokens.shape[1], self._sharing)].clone()  # a view would keep all of them in memory

    def _all_tokens(self, _: nn.Module, __: Any, own: torch.Tensor) -> torch.Tensor:
        """(1, own tokens, D) to (1, all tokens, D)."""
        sharing = self._sharing
        if sharing is None:
            return own
        parts = [own.new_empty(1, count, own.shape[2]) for count in self._tokens]
        parts[sharing.rank] = own.contiguous()
        for source, part in enumerate(parts):
            sharing.broadcast(part, source)
        return torch.cat(parts, dim=1)

    # The passes of a step

    @contextmanager
    def guidance(self, pipeline: HunyuanVideo15Pipeline) -> Iterator[None]:
        """Makes each half of the ranks compute one of a guided step's two passes inside the block."""
        if self._groups is None:
            yield
            return
        transformer = pipeline.transformer
        compute = transformer.forward
        transformer.forward = _GuidedStep(self, self._groups, pipeline, compute)
        try:
            yield
        finally:
            transformer.forward = compute
            if self._groups is not None:
                self.share_with(self._groups.everyone)


class _GuidedStep:
    """Replaces `forward` of a pipeline's transformer."""

    def __init__(
        self, parallel: Parallel, groups: Groups, pipeline: HunyuanVideo15Pipeline, compute: Callable[..., Any]
    ) -> None:
        self._parallel, self._groups, self._pipeline, self._compute = parallel, groups, pipeline, compute
        self._velocities: list[torch.Tensor] = []

    def __call__(self, *, hidden_states: torch.Tensor, **named: Any) -> tuple[torch.Tensor, ...]:
        """The velocity, (1, C, T, H, W). That of a pass which the other half computes is filled in after the last."""
        groups = self._groups
        if self._pipeline.guider.num_conditions < _PASSES:
            self._parallel.share_with(groups.everyone)
            velocities: tuple[torch.Tensor, ...] = self._compute(hidden_states=hidden_states, **named)
            return velocities
        self._parallel.share_with(groups.half)
        if len(self._velocities) == groups.pair.rank:
            velocity = self._compute(hidden_states=hidden_states, **named)[0].contiguous()
        else:
            velocity = torch.empty_like(hidden_states[:, : self._pipeline.transformer.config.out_channels])
        self._velocities.append(velocity)
        if len(self._velocities) == _PASSES:
            for source, each in enumerate(self._velocities):
                groups.pair.broadcast(each, source)
            self._velocities.clear()
        return (velocity,)


class _Ulysses:
    """Attention over the tokens of all ranks, with this rank's heads."""

    def __init__(self, attend: Attend, parallel: Parallel) -> None:
        self._attend = attend
        self._parallel = parallel

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, text: int) -> torch.Tensor:
        """See `Attend`."""
        exchange = self._parallel.tokens
        if exchange is None:
            return self._attend(query, key, value, text=text)
        attended = self._attend(*(exchange.to_heads(part, text) for part in (query, key, value)), text=text)
        return exchange.to_tokens(attended)


@dataclass(frozen=True)
class TokenExchange:
    """Exchanges this rank's tokens with all heads for all tokens with this rank's heads, and back.

    `counts` are the latent tokens of each rank. Text tokens, which every rank has, come last.
    """

    group: Group
    counts: Sequence[int]

    def to_heads(self, own: torch.Tensor, text: int) -> torch.Tensor:
        """(1, own latent + text tokens, heads, head size) to (1, all latent + text tokens, own heads, head size)."""
        ranks, tokens = self.group.size, own.shape[1] - text
        by_rank = own[0].view(own.shape[1], ranks, -1, own.shape[3])  # (own tokens, ranks, own heads, head size)
        sent = by_rank[:tokens].transpose(0, 1).flatten(0, 1)  # (ranks * own latent tokens, own heads, head size)
        received = own.new_empty(sum(self.counts) + text, *sent.shape[1:])
        self._exchange(received[: sum(self.counts)], self.counts, sent, [tokens] * ranks)
        received[sum(self.counts) :] = by_rank[tokens:, self.group.rank]
        return received[None]

    def to_tokens(self, attended: torch.Tensor) -> torch.Tensor:
        """(1, all latent + text tokens, own heads, head size) to (1, own latent + text tokens, heads, head size)."""
        ranks, tokens = self.group.size, self.counts[self.group.rank]
        latent = sum(self.counts)
        received = attended.new_empty(ranks * tokens, *attended.shape[2:])
        self._exchange(received, [tokens] * ranks, attended[0, :latent].contiguous(), self.counts)
        own = attended[0, latent:].contiguous()
        parts = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(parts, own, group=self.group.process_group)
        by_rank = torch.cat([received.view(ranks, tokens, *received.shape[1:]), torch.stack(parts)], dim=1)
        return by_rank.transpose(0, 1).flatten(1, 2)[None]

    def _exchange(
        self, received: torch.Tensor, received_counts: Sequence[int], sent: torch.Tensor, sent_counts: Sequence[int]
    ) -> None:
        dist.all_to_all_single(received, sent, list(received_counts), list(sent_counts), group=self.group.process_group)


def token_counts(tokens: int, ranks: int) -> list[int]:
    """The number of tokens of each rank: as even as possible."""
    edges = [tokens * rank // ranks for rank in range(ranks + 1)]
    return [end - begin for begin, end in pairwise(edges)]


def _part(tokens: int, group: Group) -> slice:
    """The tokens of this rank."""
    counts = token_counts(tokens, group.size)
    begin = sum(counts[: group.rank])
    return slice(begin, begin + counts[group.rank])
