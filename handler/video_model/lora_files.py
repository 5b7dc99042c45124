"""LoRA adapters on disk: which there are, and what each adds to a transformer's linear layers.

Three namings of layers are read. diffusers and PEFT write diffusers' names with `lora_A` and `lora_B`. musubi-tuner
(https://github.com/kohya-ss/musubi-tuner, networks/lora_hv_1_5.py) writes the original's names with underscores after
`lora_unet_`, with `lora_down`, `lora_up` and `alpha`; its convert_lora.py writes them with dots after
`diffusion_model.`. diffusion-pipe (https://github.com/tdrussell/diffusion-pipe, models/hunyuan_video_15.py) trains
ComfyUI's modules, whose names are a third: `double_blocks.0.img_attn.qkv` is three layers of diffusers.
"""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from contract.errors import first_of
from contract.lora import is_adapter_name
from handler.video_model.approximations import Fp8Linear
from handler.video_model.base import AdapterError
from handler.weights.convert import SWAPPED, module_names, swap_halves

_SUFFIX: Final = ".safetensors"
#: Bytes of adapters that stay in memory: the last ones used.
CACHED_BYTES: Final = 1_000_000_000
#: Bytes of the largest file that is read. An adapter of rank 128 for every layer has 2.8 GB in float32.
_LARGEST: Final = 3_000_000_000
#: Keys that an error names before it only counts them.
_SHOWN: Final = 3

#: A module and its part: the matrix down, the matrix up, or alpha.
_KEY: Final = re.compile(
    r"(?P<module>.+)\.(?:lora_(?:(?P<down>A|down)|(?P<up>B|up))(?:\.default)?\.weight|(?P<alpha>alpha))"
)
_PREFIX: Final = re.compile(r"^(?:(?:base_model\.model|diffusion_model|transformer|model)\.)+")
#: Before a name whose dots are underscores.
_FLAT_PREFIX: Final = re.compile(r"^lora_(?:unet|transformer)_")
#: The end of a module's name in the original, and in ComfyUI. Its qkv is one module.
_COMFYUI: Final[Mapping[str, str]] = {
    "_attn_proj": "_attn.proj",
    "_attn_qkv": "_attn.qkv",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "_mod.linear": "_mod.lin",
}


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a linear layer: `factor * up @ down @ x`, with shapes (out, rank) and (rank, in)."""

    down: torch.Tensor
    up: torch.Tensor
    factor: float


#: By the layer's name in diffusers' transformer.
Adapter = Mapping[str, Update]


@dataclass(frozen=True)
class _File:
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    stamp: tuple[int, int]  # modification time in ns, and bytes


class LoraFiles:
    """The adapters of HUNYUAN_LORA_DIR; of None, there are none."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._cache: OrderedDict[str, _File] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """Names of the files that requests may name now. A link that leads out of the directory is not among them."""
        if self._directory is None:
            return []
        own = Path(os.path.realpath(self._directory))  # `Path.resolve` raises on a loop of links
        try:
            paths = [path for path in self._directory.glob(f"*{_SUFFIX}") if is_adapter_name(path.stem)]
        except OSError:  # the directory is on a network file system that is away
            return []
        return sorted(path.stem for path in paths if Path(os.path.realpath(path)).parent == own and path.is_file())

    def read(self, name: str, transformer: HunyuanVideo15Transformer3DModel) -> Adapter:
        """The adapter for `transformer`.

        Raises:
            AdapterError: it does not exist, is not a LoRA adapter in safetensors, or is one of another model.
        """
        if name not in self.names or self._directory is None:
            raise AdapterError(f'loras: there is no adapter "{name}" any more')
        try:
            return _adapter(self._file(name, self._directory / f"{name}{_SUFFIX}"), transformer)
        except OSError as exc:
            raise AdapterError(f'loras: the adapter "{name}" cannot be read: {exc.strerror}') from exc
        except SafetensorError as exc:
            raise AdapterError(f'loras: the adapter "{name}" is not a complete safetensors file') from exc
        except _WrongFileError as exc:
            raise AdapterError(f'loras: the adapter "{name}" {exc}') from exc

    def _file(self, name: str, path: Path) -> _File:
        """The file, from the cache if it has not changed."""
        status = path.stat()
        stamp = status.st_mtime_ns, status.st_size
        cached = self._cache.pop(name, None)
        if cached is None or cached.stamp != stamp:
            if status.st_size > _LARGEST:
                raise _WrongFileError(f"has {status.st_size / 1e9:.1f} GB, more than a LoRA adapter has")
            # Not mapped into memory: a file that is truncated later would end the process.
            data = path.read_bytes()
            cached = _File(load(data), _metadata(data), stamp)
        self._cache[name] = cached
        while sum(file.stamp[1] for file in self._cache.values()) > CACHED_BYTES:
            self._cache.popitem(last=False)
        return cached


class _WrongFileError(Exception):
    """The file cannot be used; the message follows the adapter's name."""


def _metadata(data: bytes) -> Mapping[str, str]:
    """What a safetensors file says about itself. `data` has been loaded already, so its header is valid."""
    length = int.from_bytes(data[:8], "little")
    found: Mapping[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return found


def linear_layers(transformer: HunyuanVideo15Transformer3DModel) -> dict[str, torch.Size]:
    """Each linear layer's name and (out, in)."""
    return {
        name: module.weight.shape
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear | Fp8Linear)
    }


def _adapter(file: _File, transformer: HunyuanVideo15Transformer3DModel) -> Adapter:
    # 1. Group the file's tensors by the module that they belong to.
    modules: dict[str, dict[str, torch.Tensor]] = {}
    strange = []
    for key, tensor in file.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            strange.append(key)
        else:
            part = next(part for part in ("down", "up", "alpha") if match[part])
            modules.setdefault(match["module"], {})[part] = tensor
    if strange or not modules:
        raise _WrongFileError(
            f"has weights that are not of a LoRA: {first_of(strange, _SHOWN)}" if strange else "is empty"
        )
    # 2. Find the layers of each.
    known = _known_modules(transformer)
    layers = linear_layers(transformer)
    targets = {module: known.get(_plain(module), ()) for module in modules}
    if strange := [module for module, names in targets.items() if not names or not layers.keys() >= set(names)]:
        raise _WrongFileError(f"is of another model, this one has no linear layer {first_of(strange, _SHOWN)}")
    # 3. Split what belongs to several layers.
    alpha_of = _Alphas(file.metadata)
    adapter: dict[str, Update] = {}
    for module, parts in modules.items():
        for name, update in _updates(module, parts, targets[module], alpha_of):
            if name in adapter:
                raise _WrongFileError(f"has two updates for {name}")
            _check_shape(name, update, layers[name])
            adapter[name] = update
    return adapter


def _updates(
    module: str, parts: Mapping[str, torch.Tensor], names: tuple[str, ...], alpha_of: "_Alphas"
) -> Iterator[tuple[str, Update]]:
    """What the module adds to each of its layers."""
    if not {"down", "up"} <= parts.keys():
        raise _WrongFileError(f"lacks one of the two matrices of {module}")
    down, up, alpha = parts["down"], parts["up"], parts.get("alpha")
    rank = down.shape[0] if down.ndim else 0
    is_pair = (
        down.ndim == up.ndim == 2 and rank == up.shape[1] > 0 and down.is_floating_point() and up.is_floating_point()
    )
    if not is_pair or (alpha is not None and alpha.numel() != 1):
        raise _WrongFileError(f"has matrices of {tuple(down.shape)} and {tuple(up.shape)} for {module}")
    factor = float(alpha) / rank if alpha is not None else alpha_of.factor(_plain(module), rank)
    if _plain(module) in (SWAPPED, _flat(SWAPPED)):
        up = swap_halves(up)
    for name, rows in zip(names, up.tensor_split(len(names)), strict=True):
        yield name, Update(down, rows, factor)


def _check_shape(name: str, update: Update, shape: torch.Size) -> None:
    found = update.up.shape[0], update.down.shape[1]
    if found != tuple(shape):
        raise _WrongFileError(f"is of another model: {name} has the shape {tuple(shape)}, the adapter's is {found}")


class _Alphas:
    """The `lora_alpha` of PEFT's configuration, which diffusers stores in the metadata. Without it, alpha is the rank.

    Source: diffusers, loaders/lora_base.py (LORA_ADAPTER_METADATA_KEY) and PEFT, tuners/lora/config.py.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            config: Mapping[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            plain = {name.removeprefix("transformer."): value for name, value in config.items()}
            if plain.get("use_dora"):
                raise _WrongFileError("is a DoRA adapter, which is not supported")
            self._alpha: float | None = float(plain["lora_alpha"]) if "lora_alpha" in plain else None
            self._pattern = {str(name): float(alpha) for name, alpha in (plain.get("alpha_pattern") or {}).items()}
            self._power = 0.5 if plain.get("use_rslora") else 1.0
        except (ValueError, TypeError, AttributeError) as exc:
            raise _WrongFileError("has metadata that is not a configuration of PEFT") from exc

    def factor(self, module: str, rank: int) -> float:
        """Alpha over rank, or over its root."""
        named = (alpha for name, alpha in self._pattern.items() if f".{module}".endswith(f".{name}"))
        alpha = next(named, self._alpha)
        return 1.0 if alpha is None else float(alpha / rank**self._power)


def _known_modules(transformer: HunyuanVideo15Transformer3DModel) -> dict[str, tuple[str, ...]]:
    """Every name that a file may have for a module, with the names of its layers in diffusers."""
    config = transformer.config
    original = module_names(config.num_layers, config.num_refiner_layers, meanflow=config.use_meanflow)
    known = {name: (name,) for name in linear_layers(transformer)} | original
    for name, layers in original.items():
        for ours, theirs in _COMFYUI.items():
            if name.endswith(ours):
                known[name.removesuffix(ours) + theirs] = layers
        if name.endswith("_attn_q"):
            keys, values = (original[name.removesuffix("q") + part] for part in "kv")
            known[name.removesuffix("_q") + ".qkv"] = known[name.removesuffix("_q") + "_qkv"] = layers + keys + values
    return known | {_flat(name): layers for name, layers in known.items()}


def _plain(module: str) -> str:
    return _FLAT_PREFIX.sub("", _PREFIX.sub("", module))


def _flat(name: str) -> str:
    return name.replace(".", "_")
