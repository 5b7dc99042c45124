"""Checkpoints of the original layout, as Tencent publishes them, to what `loader.py` reads: diffusers' layout.

Names on the left of the tables: hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py and its modules in
https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5. Which becomes which, and what is split or swapped: diffusers,
scripts/convert_hunyuan_video1_5_to_diffusers.py. No value is changed, and no tensor is dropped.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from handler.video_model.base import ModelError
from handler.video_model.catalog import CHECKPOINTS
from handler.video_model.super_resolution import load_upsampler

State = Mapping[str, torch.Tensor]

#: What a module of the original is called in diffusers. Several names: its rows are split evenly among them.
_MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "img_in.proj": ("x_embedder.proj",),
    "time_in.mlp.0": ("time_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_embed.timestep_embedder.linear_2",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
    "byt5_in.layernorm": ("context_embedder_2.norm",),
    "byt5_in.fc1": ("context_embedder_2.linear_1",),
    "byt5_in.fc2": ("context_embedder_2.linear_2",),
    "byt5_in.fc3": ("context_embedder_2.linear_3",),
    "vision_in.proj.0": ("image_embedder.norm_in",),
    "vision_in.proj.1": ("image_embedder.linear_1",),
    "vision_in.proj.3": ("image_embedder.linear_2",),
    "vision_in.proj.4": ("image_embedder.norm_out",),
    "cond_type_embedding": ("cond_type_embed",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_MEANFLOW: Final[Mapping[str, tuple[str, ...]]] = {
    "time_r_in.mlp.0": ("time_embed.timestep_embedder_r.linear_1",),
    "time_r_in.mlp.2": ("time_embed.timestep_embedder_r.linear_2",),
}
_REFINER_BLOCK: Final[Mapping[str, tuple[str, ...]]] = {
    "norm1": ("norm1",),
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": ("attn.to_out.0",),
    "norm2": ("norm2",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}
_DOUBLE_BLOCK: Final[Mapping[str, tuple[str, ...]]] = {
    "img_mod.linear": ("norm1.linear",),
    "img_attn_q": ("attn.to_q",),
    "img_attn_k": ("attn.to_k",),
    "img_attn_v": ("attn.to_v",),
    "img_attn_q_norm": ("attn.norm_q",),
    "img_attn_k_norm": ("attn.norm_k",),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mod.linear": ("norm1_context.linear",),
    "txt_attn_q": ("attn.add_q_proj",),
    "txt_attn_k": ("attn.add_k_proj",),
    "txt_attn_v": ("attn.add_v_proj",),
    "txt_attn_q_norm": ("attn.norm_added_q",),
    "txt_attn_k_norm": ("attn.norm_added_k",),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
}
_REFINER: Final = "txt_in.individual_token_refiner.blocks"
_DOUBLE: Final = "double_blocks"
#: A list of blocks: its name in the original, its name in diffusers, and what is in each block.
_BLOCK_LISTS: Final = (
    (_REFINER, "context_embedder.token_refiner.refiner_blocks", _REFINER_BLOCK),
    (_DOUBLE, "transformer_blocks", _DOUBLE_BLOCK),
)
#: The original has shift before scale here, diffusers scale before shift.
_SWAPPED: Final = "final_layer.adaLN_modulation.1."
#: All other modules have a bias.
_WEIGHT_ONLY: Final = ("_q_norm", "_k_norm", "cond_type_embedding")
#: There in each checkpoint: whatever stands before it stands before all names.
_FIRST_KEY: Final = "img_in.proj.weight"

#: What no tensor's shape tells of the configuration.
_CONFIG: Final[Mapping[str, object]] = {"qk_norm": "rms_norm", "rope_theta": 256.0, "task_type": "t2v"}
_ROPE_AXES: Final = (16, 56, 56)

_TRANSFORMER: Final = "transformer"
_UPSAMPLER: Final = "upsampler"
_CONFIG_FILE: Final = "config.json"
_WEIGHTS_FILE: Final = "diffusion_pytorch_model.safetensors"
_SHOWN: Final = 4


class ConvertError(ModelError):
    """The checkpoint can't be converted; the message says what is wrong with it."""


def convert_transformer(state: State) -> dict[str, torch.Tensor]:
    """The state dict of a `HunyuanVideo15Transformer3DModel` from that of an original DiT.

    A prefix that all of the names share (`model.`, `diffusion_model.`) is taken off. The number of blocks, and whether
    it is a meanflow model, are read from the names. The tensors are views of those given wherever they can be, so that
    a `state` that reads lazily from disk costs no memory.

    Raises:
        ConvertError: naming the keys that are not the original's, and those that are missing.
    """
    prefix = _prefix(state)
    names = [name.removeprefix(prefix) for name in state]
    targets = _targets(names)
    unknown = [name for name in state if not name.startswith(prefix) or name.removeprefix(prefix) not in targets]
    missing = [prefix + name for name in targets if prefix + name not in state]
    if unknown or missing:
        wrong = [f"{what} {_some(keys)}" for what, keys in (("unknown", unknown), ("missing", missing)) if keys]
        raise ConvertError(f"no HunyuanVideo-1.5 transformer of the original layout: {'; '.join(wrong)}")
    converted: dict[str, torch.Tensor] = {}
    for name, becomes in targets.items():
        tensor = state[prefix + name]
        if name.startswith(_SWAPPED):
            shift, scale = tensor.tensor_split(2)
            tensor = torch.cat([scale, shift])
        converted.update(zip(becomes, tensor.tensor_split(len(becomes)), strict=True))
    return converted


def transformer_config(state: State, name: str, rope_axes: tuple[int, ...] = _ROPE_AXES) -> dict[str, object]:
    """Arguments of `HunyuanVideo15Transformer3DModel` for an original DiT, all sizes from its tensors' shapes.

    `state` is one that `convert_transformer` takes; `name` is its name in the catalog.

    Raises:
        ConvertError: the shapes make no transformer.
    """
    prefix = _prefix(state)

    def shape(key: str, rank: int) -> tuple[int, ...]:
        found = tuple(state[prefix + key].shape)
        if len(found) != rank or 0 in found:
            raise ConvertError(f"{prefix}{key} has shape {found}, {rank} dimensions are needed")
        return found

    inner, in_channels, patch_size_t, patch_size, _ = shape(_FIRST_KEY, 5)
    (head_dim,) = shape(f"{_DOUBLE}.0.img_attn_q_norm.weight", 1)
    if sum(rope_axes) != head_dim:
        raise ConvertError(f"heads of {head_dim} channels need a rope_dim_list of that sum in {_CONFIG_FILE}")
    names = [key.removeprefix(prefix) for key in state]
    return {
        **_CONFIG,
        "in_channels": in_channels,
        "out_channels": shape("final_layer.linear.weight", 2)[0] // (patch_size_t * patch_size**2),
        "num_attention_heads": inner // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": _depth(names, _DOUBLE),
        "num_refiner_layers": _depth(names, _REFINER),
        "mlp_ratio": shape(f"{_DOUBLE}.0.img_mlp.fc1.weight", 2)[0] / inner,
        "patch_size": patch_size,
        "patch_size_t": patch_size_t,
        "text_embed_dim": shape("txt_in.input_embedder.weight", 2)[1],
        "text_embed_2_dim": shape("byt5_in.fc1.weight", 2)[1],
        "image_embed_dim": shape("vision_in.proj.1.weight", 2)[1],
        "rope_axes_dim": rope_axes,
        "target_size": _base_size(name),
        "use_meanflow": _is_meanflow(names),
    }


def convert_checkpoint(source: Path, target: Path, name: str) -> None:
    """Write `target`/transformer, and `target`/upsampler for super-resolution, from an original checkpoint.

    `source` is a file, a directory of one with its shards and `config.json`, or the root of the original repository.
    An upsampler is where that repository has it: `upsampler/NAME` beside `transformer/NAME`. `name` is the
    checkpoint's name in the catalog.

    All or nothing: `target` appears when everything is in it and was checked. The weights are written from mapped
    memory, so a checkpoint may be larger than the machine's memory.

    Raises:
        ConvertError: `target` is there already, or the checkpoint is none, or another one.
        OSError: a file can't be read or written.
    """
    _base_size(name)
    if target.exists():
        raise ConvertError(f"{target} is there already")
    inside = source / _TRANSFORMER / name
    source = inside if inside.is_dir() else source
    directory = source if source.is_dir() else source.parent
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        partial.mkdir(parents=True)
        meanflow = _write_transformer(source, partial / _TRANSFORMER, name)
        if has_upsampler(name):
            if not meanflow:
                raise ConvertError(f"{source} is no meanflow model, as {name} must be: time_r_in is missing")
            _copy_upsampler(directory.parent.parent / _UPSAMPLER / directory.name, partial / _UPSAMPLER)
        partial.rename(target)
    except SafetensorError as exc:
        raise ConvertError(f"{source}: {exc}") from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def has_upsampler(name: str) -> bool:
    """Whether a checkpoint is a super-resolution stage."""
    return name.endswith("_sr_distilled")


def _base_size(name: str) -> int:
    if name not in CHECKPOINTS:
        raise ConvertError(f"no checkpoint is called {name}; known are {', '.join(CHECKPOINTS)}")
    return CHECKPOINTS[name].base_size


def _prefix(state: State) -> str:
    return next((name.removesuffix(_FIRST_KEY) for name in state if name.endswith(_FIRST_KEY)), "")


def _is_meanflow(names: list[str]) -> bool:
    return any(name.startswith("time_r_in.") for name in names)


def _depth(names: list[str], blocks: str) -> int:
    """How many blocks there are; one at least, so that a list that is missing is missed."""
    numbered = re.compile(re.escape(blocks) + r"\.(\d+)\.")
    return len({match[1] for name in names if (match := numbered.match(name))}) or 1


def _targets(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Each name that the original must have, given which blocks are there, and what becomes of it."""
    modules = {**_MODULES, **(_MEANFLOW if _is_meanflow(names) else {})}
    for blocks, becomes, inside in _BLOCK_LISTS:
        for index in range(_depth(names, blocks)):
            for module, parts in inside.items():
                modules[f"{blocks}.{index}.{module}"] = tuple(f"{becomes}.{index}.{part}" for part in parts)
    return {
        f"{module}.{parameter}": tuple(f"{part}.{parameter}" for part in parts)
        for module, parts in modules.items()
        for parameter in (("weight",) if module.endswith(_WEIGHT_ONLY) else ("weight", "bias"))
    }


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _write_transformer(source: Path, target: Path, name: str) -> bool:
    """Whether it is a meanflow model."""
    config_file = (source if source.is_dir() else source.parent) / _CONFIG_FILE
    with _open(source) as state:
        converted = convert_transformer(state)
        config = transformer_config(state, name, _rope_axes(config_file))
        with torch.device("meta"):
            model = HunyuanVideo15Transformer3DModel(**config)
        try:
            model.load_state_dict(converted, strict=True, assign=True)
        except RuntimeError as exc:
            lines = str(exc).splitlines()
            raise ConvertError(f"{source} is of another shape: {lines[min(1, len(lines) - 1)].strip()}") from exc
        model.save_config(target)
        try:
            save_file(converted, target / _WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as exc:  # no OSError, though the disk may be full
            raise ConvertError(f"{target / _WEIGHTS_FILE} can't be written: {exc}") from exc
        # safetensors makes it its owner's alone; the worker may be another user.
        (target / _WEIGHTS_FILE).chmod((target / _CONFIG_FILE).stat().st_mode)
    return bool(config["use_meanflow"])


def _rope_axes(config_file: Path) -> tuple[int, ...]:
    """`rope_dim_list` of the original's configuration, where there is one."""
    if not config_file.exists():
        return _ROPE_AXES
    try:
        axes = json.loads(config_file.read_text()).get("rope_dim_list", _ROPE_AXES)
        return tuple(int(axis) for axis in axes)
    except (ValueError, TypeError, AttributeError) as exc:
        raise ConvertError(f"{config_file} is no configuration: {exc}") from exc


class _LazyState(Mapping[str, torch.Tensor]):
    """The tensors of some files, mapped into memory one by one as they are asked for."""

    def __init__(self, files: Mapping[Path, safe_open]) -> None:
        self._files: dict[str, safe_open] = {}
        for path, file in files.items():
            for name in file.keys():  # type: ignore[no-untyped-call] # noqa: SIM118 - it is no mapping
                if name in self._files:
                    raise ConvertError(f"{path} has {name}, and another file has it, too")
                self._files[name] = file

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@contextmanager
def _open(source: Path) -> Iterator[State]:
    with ExitStack() as stack:
        yield _LazyState({path: stack.enter_context(safe_open(path, framework="pt")) for path in _files(source)})


def _files(source: Path) -> list[Path]:
    """The file; of a directory those that its index names, or all where it has none."""
    if not source.is_dir():
        return [source]
    indices = sorted(source.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ConvertError(f"{source} holds several checkpoints: {_some([index.name for index in indices])}")
    files = sorted(source.glob("*.safetensors"))
    if indices:
        try:
            files = [source / file for file in sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))]
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ConvertError(f"{indices[0]} is no index of shards") from exc
    if not files:
        raise ConvertError(f"{source} holds no *.safetensors")
    return files


def _copy_upsampler(source: Path, target: Path) -> None:
    """As it is, its names being those of our modules, once it has shown that it loads."""
    target.mkdir()
    for path in (source / _CONFIG_FILE, *sorted(source.glob("*.safetensors"))):
        shutil.copyfile(path, target / path.name)
    try:
        load_upsampler(target)
    except (ValueError, TypeError, KeyError, RuntimeError) as exc:
        raise ConvertError(f"{source} is no upsampler: {' '.join(str(exc).split())}") from exc
