"""LoRA adapters in a render: what they add is computed beside each layer, and the weights stay as they are.

The field's way is PEFT, behind diffusers' `load_lora_adapter`. It replaces the layers by modules of its own. Here that
would compile the blocks again for each set of adapters, copy all streamed weights again before and after each job, and
fail for layers in 8 bits. Weights with the adapters merged into them would lose most of a small update in 16 bits, and
need a copy of all weights to get the old ones back. So the layers of the blocks take the matrices as arguments of
`blocks.py`, where a compiled function sees their rank as one dynamic dimension; the few other layers get a hook.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from diffusers import HunyuanVideo15Transformer3DModel

from contract.lora import Lora
from handler.video_model.blocks import LINEAR_LAYERS, LowRank, chunked_blocks
from handler.video_model.lora_files import Adapter, LoraFiles, linear_layers

#: PyTorch compiles dimensions of 0 and 1 as constants.
_SMALLEST_RANK: Final = 2

#: By the layer's name in the transformer.
Updates = Mapping[str, LowRank]


def read_updates(loras: Sequence[Lora], files: LoraFiles, transformer: HunyuanVideo15Transformer3DModel) -> Updates:
    """What a request's adapters add to the transformer. Raises AdapterError if one of them cannot be used."""
    return combined([(files.read(lora.name, transformer), lora.scale) for lora in loras], transformer)


def combined(adapters: Sequence[tuple[Adapter, float]], transformer: HunyuanVideo15Transformer3DModel) -> Updates:
    """The sum of the adapters, each times its scale, in the dtype of the transformer and in host memory.

    Compiled blocks get matrices of one rank for all of their layers, filled up with zeros. All sets of adapters then
    share one compilation.
    """
    if not adapters:
        return {}
    updates: dict[str, LowRank] = {}
    for name in {name: None for adapter, _ in adapters for name in adapter}:
        parts = [(adapter[name], scale) for adapter, scale in adapters if name in adapter]
        down = torch.cat([part.down.float() for part, _ in parts])
        up = torch.cat([part.up.float() * (part.factor * scale) for part, scale in parts], dim=1)
        updates[name] = down.to(transformer.dtype), up.to(transformer.dtype)
    if next(chunked_blocks(transformer)).is_compiled:
        rank = max(len(down) for down, _ in updates.values())
        return {**updates, **_filled(updates, max(rank, _SMALLEST_RANK), transformer)}
    return updates


def empty_updates(rank: int, transformer: HunyuanVideo15Transformer3DModel) -> Updates:
    """Updates of this rank for all layers of the blocks, which change nothing."""
    return _filled({}, rank, transformer)


def _filled(updates: Updates, rank: int, transformer: HunyuanVideo15Transformer3DModel) -> Updates:
    """An update of `rank` for each layer of the blocks."""
    filled: dict[str, LowRank] = {}
    for name, (rows, columns) in linear_layers(transformer).items():
        if name.startswith("transformer_blocks."):
            down = torch.zeros(rank, columns, dtype=transformer.dtype)
            up = torch.zeros(rows, rank, dtype=transformer.dtype)
            if name in updates:
                own_down, own_up = updates[name]
                down[: len(own_down)], up[:, : len(own_down)] = own_down, own_up
            filled[name] = down, up
    return filled


def bytes_of(updates: Updates) -> int:
    """Of their matrices."""
    return sum(matrix.numel() * matrix.element_size() for pair in updates.values() for matrix in pair)


@contextmanager
def applied(updates: Updates, transformer: HunyuanVideo15Transformer3DModel, device: torch.device) -> Iterator[None]:
    """Adds the updates to the outputs of the transformer's layers inside the block. They are on `device` meanwhile."""
    if not updates:
        yield
        return
    moved = {name: (down.to(device), up.to(device)) for name, (down, up) in updates.items()}
    in_blocks = set()
    handles = []
    try:
        for index, block in enumerate(chunked_blocks(transformer)):
            names = {layer: f"transformer_blocks.{index}.{layer}" for layer in LINEAR_LAYERS}
            in_blocks |= set(names.values())
            block.low_rank = {layer: moved[name] for layer, name in names.items() if name in moved}
        for name in moved.keys() - in_blocks:
            layer = transformer.get_submodule(name)
            handles.append(layer.register_forward_hook(_Add(moved[name]), prepend=True))  # before a cast of the output
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in chunked_blocks(transformer):
            block.low_rank = None


class _Add:
    """A forward hook that adds an update."""

    def __init__(self, update: LowRank) -> None:
        self._down, self._up = update

    def __call__(self, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + F.linear(F.linear(inputs[0].to(self._down.dtype), self._down), self._up)
