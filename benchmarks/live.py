"""Counts what a computation needs, on PyTorch's meta device: bytes alive at their peak, and floating-point operations.

Tensors on the meta device have shapes, dtypes and storages, but no data. The real code therefore runs at the real
dimensions within milliseconds, on any machine, and every tensor that it makes is counted from its creation until its
storage is freed, as CUDA's caching allocator would count it.

Not counted: workspaces of cuDNN, cuBLAS and attention kernels, and what the allocator loses to fragmentation.
`handler.video_model.memory.OVERHEAD` allows for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass
class Count:
    """Bytes of the tensors that were made and are alive, now and at the peak, and operations of two kinds."""

    alive: int = 0
    peak: int = 0
    attention: int = 0
    other: int = 0

    @property
    def operations(self) -> int:
        """Floating-point operations: a multiplication and an addition count as two."""
        return self.attention + self.other


@contextmanager
def counting() -> Iterator[Count]:
    """Counts what the block makes on the meta device. What existed before, such as weights, does not count."""
    count = Count()
    with _Dispatched(count), _Called(count):
        yield count


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call] # PyTorch leaves it untyped
    """Sees every operation of PyTorch, after composite ones are split."""

    def __init__(self, count: Count) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count = count
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        operations = flop_registry.get(func._overloadpacket)
        if operations is not None:
            self._count.other += operations(*args, **(kwargs or {}), out_val=made)
        if not func.is_view and not func._schema.is_mutable:
            for tensor in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                    self._track(tensor.untyped_storage())
        return made

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()

        def freed(_: object) -> None:
            self._count.alive -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self._count.alive += size
        self._count.peak = max(self._count.peak, self._count.alive)


class _Called(TorchFunctionMode):
    """Answers what the meta device cannot: the result of an attention kernel, and questions about values.

    Without a kernel, PyTorch would split attention into steps with tensors of S x S. Masks are taken as all true, since
    `use_mask_free_attention` cuts texts to their valid tokens.
    """

    def __init__(self, count: Count) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
            return self._attention(named["query"], named["key"], named["value"])
        if not args or not isinstance(args[0], torch.Tensor) or args[0].device.type != "meta":
            return func(*args, **(kwargs or {}))
        if func is torch.all:  # of an image's states: are they all zeros?
            return torch.tensor(args[0].numel() == 0)
        if func is torch.Tensor.all:  # of a tokenizer's mask: is there no padding?
            return torch.tensor(False)
        if func is torch.Tensor.__float__:  # of a comparison with a timestep
            return 1.0
        if func is torch.Tensor.sum and len(args) == 1 and not kwargs:  # of a mask: how many tokens are valid?
            return torch.tensor(args[0].numel())
        if func is torch.Tensor.__invert__:
            return torch.zeros(args[0].shape, dtype=torch.bool)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype is torch.bool:
            return args[0].clone() if args[1].device.type == "meta" else args[0].new_empty(0, *args[0].shape[1:])
        return func(*args, **(kwargs or {}))

    def _attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(batch, heads, S, head size) each. A fused kernel makes one tensor, with the query's strides."""
        self._count.attention += 2 * query.numel() * key.shape[-2] + 2 * query.shape[:-1].numel() * value.numel() // (
            value.shape[0] * value.shape[1]
        )
        return torch.empty_like(query)
