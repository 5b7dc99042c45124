"""Reads checkpoints from disk or the hub into `Parts`: a family for profiles, or one checkpoint alone."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from contract.job import DEFAULT_MODEL, DEMO_MODEL, Profile
from handler.settings import WorkerSettings
from handler.video_model import catalog
from handler.video_model.base import ModelLoadError
from handler.video_model.catalog import CHECKPOINTS, Checkpoint, Sampling, known_name, missing
from handler.video_model.parts import Base, Parts, Upscaler
from handler.video_model.super_resolution import SuperResolution
from handler.video_model.upsamplers import load_upsampler
from handler.weights.snapshots import caches, download_directory, find_snapshot

_INDEX: Final = "model_index.json"
_PIPELINE_CLASS: Final = "HunyuanVideo15Pipeline"

log = logging.getLogger(__name__)


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The VAE's dtype in a model of `dtype`: float16 in place of bfloat16, which has three bits less for a number.

    Source: https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5, hyvideo/pipelines/hunyuan_video_pipeline.py.
    """
    return torch.float16 if dtype is torch.bfloat16 else dtype


def read_checkpoints(settings: WorkerSettings, dtype: torch.dtype) -> Parts:
    """A family of checkpoints, if the directory has all that a profile needs; else its only checkpoint.

    Raises:
        ModelLoadError: HUNYUAN_MODEL_PATH names neither.
        Exception: an error of diffusers, transformers or safetensors about a file.
    """
    directory = _directory(settings.model_path)
    if directory is None:
        return _from_hub(settings, dtype)
    if (directory / _INDEX).exists():
        return _one_checkpoint(str(directory), directory.name, dtype)
    present = {
        name: path
        for path in sorted(directory.iterdir())
        if (path / "transformer").is_dir() and (name := known_name(path.name)) is not None
    }
    _log_profiles(directory, present)
    if profiles := catalog.offered(present):
        return _family(settings.profile, profiles, present, dtype)
    found = [path.parent for path in sorted(directory.glob(f"*/{_INDEX}"))]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or f"no {_INDEX} in it or one level below"
        raise ModelLoadError(
            f"HUNYUAN_MODEL_PATH: {directory} must have all checkpoints of a profile, or exactly one checkpoint; "
            f"found {names}"
        )
    return _one_checkpoint(str(found[0]), found[0].name, dtype)


def _from_hub(settings: WorkerSettings, dtype: torch.dtype) -> Parts:
    """A checkpoint of the hub: a complete copy on this machine, else a download."""
    repository, configured = settings.model_path, settings.cache_dir
    name = repository.rpartition("/")[2]
    snapshot = find_snapshot(repository, caches(configured))
    if snapshot is not None:
        log.info("%s: using the complete copy in %s; the hub is not asked", repository, snapshot)
        return _one_checkpoint(str(snapshot), name, dtype)
    target = download_directory(repository, configured)
    log.info("%s: no complete copy on this machine, downloading to %s", repository, target)
    wanted = configured or caches(None)[0]
    if target != wanted:
        log.warning("this user cannot write to %s (HUNYUAN_CACHE_DIR, HF_HUB_CACHE): each cold start downloads", wanted)
    return _one_checkpoint(repository, name, dtype, target)


def _dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of a pipeline's components, for `from_pretrained`."""
    return {"default": dtype, "vae": vae_dtype(dtype)}


def _directory(model_path: str) -> Path | None:
    """The directory that the path names; None if it is a hub id."""
    directory = Path(model_path).expanduser()
    if directory.is_dir():
        return directory
    if model_path.count("/") == 1 and not model_path.startswith((".", "~", "/")) and not directory.exists():
        return None
    raise ModelLoadError(
        f"HUNYUAN_MODEL_PATH: {model_path} is no directory, no hub id (owner/name) and not `{DEMO_MODEL}`"
    )


def _log_profiles(directory: Path, present: Mapping[str, Path]) -> None:
    for profile in Profile:
        absent = ", ".join(missing(profile, present))
        command = f"hunyuan download-weights {profile} --to {directory}"
        if not absent:
            log.info("profile %s: all checkpoints are present", profile)
        elif present:
            log.info("profile %s: missing %s; run `%s` to offer it", profile, absent, command)


def _one_checkpoint(source: str, name: str, dtype: torch.dtype, cache_dir: Path | None = None) -> Parts:
    """`source` is a directory, or a repository of the hub that is downloaded to `cache_dir`."""
    index = Path(source) / _INDEX
    if index.exists():
        found = json.loads(index.read_text()).get("_class_name")
        if found != _PIPELINE_CLASS:
            raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {source} is a {found}, but must be a {_PIPELINE_CLASS}")
    pipeline = HunyuanVideo15Pipeline.from_pretrained(source, cache_dir=cache_dir, dtype=_dtypes(dtype))
    pipeline.vae.enable_tiling()
    known = CHECKPOINTS.get(known_name(name) or "")
    # An unknown name: 50 steps, with the shift and the guidance of the checkpoint's own configuration.
    sampling = known.sampling if known is not None else Sampling()
    log.warning("%s has no super-resolution: its videos are scaled to the requested size", name)
    return single_parts(Checkpoint(name, pipeline.transformer.config.target_size, sampling), pipeline)


def single_parts(checkpoint: Checkpoint, pipeline: HunyuanVideo15Pipeline) -> Parts:
    """One checkpoint for every resolution."""
    bases = {checkpoint.name: Base(checkpoint, pipeline)}
    return Parts(checkpoint.name, bases, catalog.single_routes(checkpoint.name), {})


def _family(
    preferred: Profile | None, profiles: list[Profile], present: Mapping[str, Path], dtype: torch.dtype
) -> Parts:
    """Every profile whose checkpoints are present, with one pair of text encoders and one VAE."""
    # 1. The route of a video for each model and resolution.
    if preferred is not None and preferred not in profiles:
        absent = ", ".join(missing(preferred, present))
        raise ModelLoadError(
            f"HUNYUAN_PROFILE: {preferred} lacks {absent} in HUNYUAN_MODEL_PATH; download it or unset it"
        )
    default = preferred or profiles[0]
    models = {DEFAULT_MODEL: default} | {profile.model: profile for profile in profiles}
    from_text, from_image = catalog.text_routes(models), catalog.image_routes(models, present)
    # 2. The components that all bases share.
    shared = _shared_components(present, dtype)
    # 3. The bases and the super-resolution stages.
    bases = {
        name: Base(CHECKPOINTS[name], _text_pipeline(shared, present[name], dtype))
        for name in sorted({route.base for route in from_text.values()})
    }
    for name in sorted({route.base for route in from_image.values()}):
        bases[name] = Base(CHECKPOINTS[name], _image_pipeline(shared, present[name], dtype))
    stages = sorted({name for route in from_text.values() for name in route.super_resolution})
    upscalers = {name: _upscaler(CHECKPOINTS[name], present[name], dtype) for name in stages}
    return Parts(f"{DEFAULT_MODEL}-{default}", bases, from_text, upscalers, from_image)


def _shared_components(present: Mapping[str, Path], dtype: torch.dtype) -> dict[str, Any]:
    whole = next((path for path in present.values() if (path / _INDEX).exists()), None)
    if whole is None:
        raise ModelLoadError("HUNYUAN_MODEL_PATH: no checkpoint in it has text encoders and VAE; download one again")
    shared = HunyuanVideo15Pipeline.from_pretrained(whole, transformer=None, dtype=_dtypes(dtype))
    shared.vae.enable_tiling()
    components: dict[str, Any] = shared.components
    return components


def _own_components(directory: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What each base has for itself. `generate` sets shift and guidance from its checkpoint."""
    return {
        "transformer": _transformer(directory, dtype),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "guider": ClassifierFreeGuidance(),
    }


def _transformer(directory: Path, dtype: torch.dtype) -> HunyuanVideo15Transformer3DModel:
    return HunyuanVideo15Transformer3DModel.from_pretrained(directory / "transformer", dtype=dtype)


def _text_pipeline(shared: Mapping[str, Any], directory: Path, dtype: torch.dtype) -> HunyuanVideo15Pipeline:
    return HunyuanVideo15Pipeline(**{**shared, **_own_components(directory, dtype)})


def _image_pipeline(shared: Mapping[str, Any], directory: Path, dtype: torch.dtype) -> HunyuanVideo15Pipeline:
    from diffusers import HunyuanVideo15ImageToVideoPipeline  # late: its module warns if torchvision is absent

    vision = {
        "image_encoder": SiglipVisionModel.from_pretrained(directory / "image_encoder", dtype=dtype),
        "feature_extractor": SiglipImageProcessorPil.from_pretrained(directory / "feature_extractor"),
    }
    return HunyuanVideo15ImageToVideoPipeline(**{**shared, **_own_components(directory, dtype), **vision})


def _upscaler(checkpoint: Checkpoint, directory: Path, dtype: torch.dtype) -> Upscaler:
    stage = SuperResolution(
        transformer=_transformer(directory, dtype),
        upsampler=load_upsampler(directory / "upsampler"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=checkpoint.sampling.shift or 1.0),
        sampling=checkpoint.sampling,
    )
    return Upscaler(checkpoint, stage)
