"""Converts checkpoints from the original layout, which Tencent publishes, to diffusers' layout.

Source of the original names: hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py and its modules in
https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5. Source of the mapping, the splits and the swap: diffusers,
scripts/convert_hunyuan_video1_5_to_diffusers.py. The conversion changes no value and drops no tensor.
"""

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

from contract.errors import first_of
from handler.video_model.catalog import CHECKPOINTS, Checkpoint, known_name
from handler.video_model.upsamplers import load_upsampler
from handler.weights.errors import ConvertError, UnknownNameError, one_line
from handler.weights.layout import CONFIG_FILE, INDEX_FILES, TRANSFORMER, UPSAMPLER, shards

State = Mapping[str, torch.Tensor]

#: A module's name in the original to its name in diffusers. With several names, they split its rows evenly.
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
#: Lists of blocks: name in the original, name in diffusers, modules of each block.
_BLOCK_LISTS: Final = (
    (_REFINER, "context_embedder.token_refiner.refiner_blocks", _REFINER_BLOCK),
    (_DOUBLE, "transformer_blocks", _DOUBLE_BLOCK),
)
#: The original has shift before scale here, diffusers scale before shift.
SWAPPED: Final = "final_layer.adaLN_modulation.1"
#: All other modules have a bias.
_WEIGHT_ONLY: Final = ("_q_norm", "_k_norm", "cond_type_embedding")
#: Every checkpoint has this key. A prefix before it is a prefix of all names.
_FIRST_KEY: Final = "img_in.proj.weight"

#: The part of the configuration that cannot be read from the shapes.
_CONFIG: Final[Mapping[str, object]] = {"qk_norm": "rms_norm", "rope_theta": 256.0, "task_type": "t2v"}
_ROPE_AXES: Final = (16, 56, 56)

_WEIGHTS_FILE: Final = "diffusion_pytorch_model.safetensors"
#: Keys that an error names before it only counts them.
_SHOWN_KEYS: Final = 4


def convert_transformer(state: State) -> dict[str, torch.Tensor]:
    """The state dict of a `HunyuanVideo15Transformer3DModel` from that of an original DiT.

    Removes a prefix that all names share (`model.`, `diffusion_model.`). Reads the number of blocks, and whether it is
    a meanflow model, from the names. Returns views of the given tensors where possible, so that a `state` that reads
    lazily from disk takes no memory.

    Raises:
        ConvertError: names the unknown and the missing keys.
    """
    prefix = _prefix(state)
    names = [name.removeprefix(prefix) for name in state]
    targets = _targets(names)
    unknown = [name for name in state if not name.startswith(prefix) or name.removeprefix(prefix) not in targets]
    missing = [prefix + name for name in targets if prefix + name not in state]
    if unknown or missing:
        wrong = [
            f"{what} {first_of(keys, _SHOWN_KEYS)}"
            for what, keys in (("unknown", unknown), ("missing", missing))
            if keys
        ]
        raise ConvertError(f"not a HunyuanVideo-1.5 transformer in the original layout: {'; '.join(wrong)}")
    converted: dict[str, torch.Tensor] = {}
    for name, becomes in targets.items():
        tensor = state[prefix + name]
        if name.startswith(SWAPPED):
            tensor = swap_halves(tensor)
        converted.update(zip(becomes, tensor.tensor_split(len(becomes)), strict=True))
    return converted


def swap_halves(rows: torch.Tensor) -> torch.Tensor:
    """The rows of a module whose halves diffusers has in the other order: the module `SWAPPED`."""
    return torch.cat(rows.tensor_split(2)[::-1])


def transformer_config(state: State, name: str, rope_axes: tuple[int, ...] = _ROPE_AXES) -> dict[str, object]:
    """Arguments of `HunyuanVideo15Transformer3DModel` for an original DiT. Reads all sizes from its tensors' shapes.

    `state` is as for `convert_transformer`; `name` is the checkpoint's name in the catalog.

    Raises:
        ConvertError: a tensor has the wrong number of dimensions, or `rope_axes` do not fit the heads.
    """
    prefix = _prefix(state)

    def shape(key: str, rank: int) -> tuple[int, ...]:
        found = tuple(state[prefix + key].shape)
        if len(found) != rank or 0 in found:
            raise ConvertError(f"{prefix}{key} has shape {found}, but needs {rank} dimensions")
        return found

    inner, in_channels, patch_size_t, patch_size, _ = shape(_FIRST_KEY, 5)
    (head_dim,) = shape(f"{_DOUBLE}.0.img_attn_q_norm.weight", 1)
    if sum(rope_axes) != head_dim:
        raise ConvertError(f"heads of {head_dim} channels need a rope_dim_list with that sum in {CONFIG_FILE}")
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
        "target_size": _checkpoint(name).base_size,
        "use_meanflow": _is_meanflow(names),
    }


def checkpoint_name(source: Path, target: Path) -> str:
    """The checkpoint's name in the catalog, from the name of the target or of the source.

    Raises:
        UnknownNameError: neither name ends like a checkpoint's.
    """
    name = known_name(target.name) or known_name(source.name)
    if name is None:
        raise UnknownNameError("Cannot tell the checkpoint from the directory name; pass --name")
    return name


def convert_checkpoint(source: Path, target: Path, name: str) -> None:
    """Writes `target`/transformer, and `target`/upsampler for super-resolution, from an original checkpoint.

    `source` is a file, a directory with one file or its shards and with `config.json`, or the root of the original
    repository. The upsampler is read from where that repository has it: `upsampler/NAME` beside `transformer/NAME`.
    `name` is the checkpoint's name in the catalog.

    All or nothing: `target` appears when it is complete and checked. The weights are written from mapped memory, so a
    checkpoint may be larger than the machine's memory.

    Raises:
        ConvertError: `target` exists, or `source` is not this checkpoint.
        OSError: a file cannot be read or written.
    """
    # 1. Check the name and the target.
    checkpoint = _checkpoint(name)
    if target.exists():
        raise ConvertError(f"{target} already exists; move it away or name another target")
    # 2. Find the checkpoint in a repository.
    inside = source / TRANSFORMER / name
    source = inside if inside.is_dir() else source
    directory = source if source.is_dir() else source.parent
    # 3. Write a directory beside the target and rename it.
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        partial.mkdir(parents=True)
        meanflow = _write_transformer(source, partial / TRANSFORMER, name)
        if checkpoint.is_super_resolution:
            if not meanflow:
                raise ConvertError(f"{source} is not a meanflow model, as {name} must be: time_r_in is missing")
            _copy_upsampler(directory.parent.parent / UPSAMPLER / directory.name, partial / UPSAMPLER)
        partial.rename(target)
    except SafetensorError as exc:
        raise ConvertError(f"{source}: {exc}") from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checkpoint(name: str) -> Checkpoint:
    if name not in CHECKPOINTS:
        raise ConvertError(f"no checkpoint is called {name}; known names are {', '.join(CHECKPOINTS)}")
    return CHECKPOINTS[name]


def _prefix(state: State) -> str:
    return next((name.removesuffix(_FIRST_KEY) for name in state if name.endswith(_FIRST_KEY)), "")


def _is_meanflow(names: list[str]) -> bool:
    return any(name.startswith("time_r_in.") for name in names)


def _depth(names: list[str], blocks: str) -> int:
    """The number of blocks, at least one, so that an absent list counts as missing keys."""
    numbered = re.compile(re.escape(blocks) + r"\.(\d+)\.")
    return len({match[1] for name in names if (match := numbered.match(name))}) or 1


def module_names(blocks: int, refiner_blocks: int, *, meanflow: bool) -> dict[str, tuple[str, ...]]:
    """Each module of the original with its name in diffusers. With several names, they split its rows evenly."""
    modules = {**_MODULES, **(_MEANFLOW if meanflow else {})}
    for (original, becomes, inside), depth in zip(_BLOCK_LISTS, (refiner_blocks, blocks), strict=True):
        for index in range(depth):
            for module, parts in inside.items():
                modules[f"{original}.{index}.{module}"] = tuple(f"{becomes}.{index}.{part}" for part in parts)
    return modules


def _targets(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Each name that the original must have, with its names in diffusers."""
    modules = module_names(_depth(names, _DOUBLE), _depth(names, _REFINER), meanflow=_is_meanflow(names))
    return {
        f"{module}.{parameter}": tuple(f"{part}.{parameter}" for part in parts)
        for module, parts in modules.items()
        for parameter in (("weight",) if module.endswith(_WEIGHT_ONLY) else ("weight", "bias"))
    }


def _write_transformer(source: Path, target: Path, name: str) -> bool:
    """Converts and checks the transformer. Returns whether it is a meanflow model."""
    config_file = (source if source.is_dir() else source.parent) / CONFIG_FILE
    with _open(source) as state:
        converted = convert_transformer(state)
        config = transformer_config(state, name, _rope_axes(config_file))
        model = _check_shapes(converted, config, source)
        model.save_config(target)
        _write_weights(converted, target)
    return bool(config["use_meanflow"])


def _check_shapes(converted: State, config: dict[str, object], source: Path) -> HunyuanVideo15Transformer3DModel:
    with torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel(**config)
    try:
        model.load_state_dict(converted, strict=True, assign=True)
    except RuntimeError as exc:
        lines = str(exc).splitlines()
        reason = lines[min(1, len(lines) - 1)].strip()
        raise ConvertError(f"{source} has the shapes of another model: {reason}") from exc
    return model


def _write_weights(converted: dict[str, torch.Tensor], target: Path) -> None:
    path = target / _WEIGHTS_FILE
    try:
        save_file(converted, path, metadata={"format": "pt"})
    except SafetensorError as exc:  # also where the disk is full, instead of OSError
        raise ConvertError(f"{path} cannot be written: {exc}") from exc
    # safetensors gives the file to its owner alone, but the worker may be another user.
    path.chmod((target / CONFIG_FILE).stat().st_mode)


def _rope_axes(config_file: Path) -> tuple[int, ...]:
    """`rope_dim_list` from the original's configuration, or the published default."""
    if not config_file.exists():
        return _ROPE_AXES
    try:
        axes = json.loads(config_file.read_text()).get("rope_dim_list", _ROPE_AXES)
        return tuple(int(axis) for axis in axes)
    except (ValueError, TypeError, AttributeError) as exc:
        raise ConvertError(f"{config_file} is not a configuration: {exc}") from exc


class _LazyState(Mapping[str, torch.Tensor]):
    """The tensors of several files. Each is mapped into memory on access."""

    def __init__(self, files: Mapping[Path, safe_open]) -> None:
        self._files: dict[str, safe_open] = {}
        for path, file in files.items():
            for name in file.keys():  # type: ignore[no-untyped-call] # noqa: SIM118 - not a mapping
                if name in self._files:
                    raise ConvertError(f"{path} has {name}, and another file has it too")
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
    """The file itself; of a directory the shards that its index names, or all files if it has no index."""
    if not source.is_dir():
        return [source]
    indices = sorted(source.glob(INDEX_FILES))
    if len(indices) > 1:
        names = first_of([index.name for index in indices], _SHOWN_KEYS)
        raise ConvertError(f"{source} holds several checkpoints: {names}; name one file")
    files = shards(indices[0]) if indices else sorted(source.glob("*.safetensors"))
    if not files:
        raise ConvertError(f"{source} has no *.safetensors")
    return files


def _copy_upsampler(source: Path, target: Path) -> None:
    """Copies the upsampler, whose names diffusers' layout keeps, and checks that it loads."""
    target.mkdir()
    for path in (source / CONFIG_FILE, *sorted(source.glob("*.safetensors"))):
        shutil.copyfile(path, target / path.name)
    try:
        load_upsampler(target)
    except (ValueError, TypeError, KeyError, RuntimeError) as exc:
        raise ConvertError(f"{source} is not an upsampler: {one_line(exc)}") from exc
