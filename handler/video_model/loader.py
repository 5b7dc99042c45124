"""Checkpoints to ready model: which are there, their dtype and device, the attention kernel, offloading."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
import transformers
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from safetensors import SafetensorError
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from contract.job import DEFAULT_MODEL, DEMO_MODEL, Profile, Resolution
from handler.settings import WorkerSettings
from handler.video_model import demo
from handler.video_model.approximations import approximate
from handler.video_model.attention import choose_backend, use_fast_causal_mask, use_mask_free_attention
from handler.video_model.base import ModelLoadError, VideoModel
from handler.video_model.catalog import (
    CHECKPOINTS,
    IMAGE_BASES,
    ROUTES,
    Checkpoint,
    Route,
    Sampling,
    known_name,
    needed,
    offered,
)
from handler.video_model.compilation import compile_blocks
from handler.video_model.generate import Base, PipelineModel, Upscaler
from handler.video_model.memory import Budget, Placement
from handler.video_model.placement import Parts, put_on_gpu
from handler.video_model.super_resolution import SuperResolution, load_upsampler

_INDEX: Final = "model_index.json"
_PIPELINE_CLASS: Final = "HunyuanVideo15Pipeline"
#: What goes wrong inside the libraries where files are missing, cut short, or of another model.
_LOAD_ERRORS: Final = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)

log = logging.getLogger(__name__)


def load_model(settings: WorkerSettings) -> VideoModel:
    """The model that HUNYUAN_MODEL_PATH names, on the GPU if there is one, ready to render.

    Raises:
        ModelLoadError: it is not there, or is no text-to-video checkpoint in diffusers' layout.
    """
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.model_path == DEMO_MODEL:
        device = "cpu"  # it is smaller than what a GPU takes to wake up
        parts = _single(demo.CHECKPOINT, demo.build_pipeline())
    else:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        try:
            parts = _from_path(settings, dtype)
        except _LOAD_ERRORS as exc:
            first_line = str(exc).strip().partition("\n")[0]
            raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {settings.model_path} can't be loaded: {first_line}") from exc
    if not parts.image_routes:
        # Only images are encoded; at real size it takes 0.8 GB.
        next(iter(parts.bases.values())).pipeline.vae.encoder = None
    read = time.monotonic()
    backend = choose_backend(device, flash=settings.enable_flash_attn, sage=settings.enable_sage_attn)
    for transformer in parts.transformers:
        use_mask_free_attention(transformer, backend)
    approximate(
        parts.transformers,
        settings.approximations,
        many_steps=parts.many_step_transformers,
        upscalers=parts.upscaler_transformers,
    )
    use_fast_causal_mask(next(iter(parts.bases.values())).pipeline.vae)
    memory = None
    if device == "cuda":
        memory = put_on_gpu(parts, settings)
    elif settings.offload_cpu:
        log.warning("HUNYUAN_OFFLOAD_CPU: there is no GPU to offload from")
    placed = time.monotonic()
    seconds = {"checkpoints": read - started, "placement": placed - read}
    if compiles(settings, device, memory):
        compile_blocks(parts.transformers, settings.cache_dir)
        seconds["compilation"] = time.monotonic() - placed
    log.info("model %s on %s, attention by %s", parts.name, device, backend)
    return PipelineModel(
        name=parts.name,
        bases=parts.bases,
        routes=parts.routes,
        image_routes=parts.image_routes,
        upscalers=parts.upscalers,
        attention=backend,
        memory=memory,
        approximations=settings.approximations,
        load_seconds=seconds,
    )


def compiles(settings: WorkerSettings, device: str, memory: Budget | None) -> bool:
    """Whether blocks are compiled: where they stay on a GPU, unless a setting says otherwise."""
    streamed = memory is not None and memory.plan.transformers is Placement.STREAMED
    if settings.compile and streamed:
        log.warning("HUNYUAN_COMPILE: the transformers are streamed, which does not go with it; doing without")
    return not streamed and (device == "cuda" if settings.compile is None else settings.compile)


def _from_path(settings: WorkerSettings, dtype: torch.dtype) -> Parts:
    """A family of checkpoints, if the directory holds what a profile needs; else the one checkpoint that it holds."""
    directory = _directory(settings.model_path)
    if directory is None:
        return _one_checkpoint(settings.model_path, settings, dtype)
    if (directory / _INDEX).exists():
        return _one_checkpoint(str(directory), settings, dtype)
    present = {
        name: path
        for path in sorted(directory.iterdir())
        if (path / "transformer").is_dir() and (name := known_name(path.name)) is not None
    }
    profiles = offered(present)
    _tell(profiles, present)
    if profiles:
        return _family(settings.profile, profiles, present, dtype)
    found = [path.parent for path in sorted(directory.glob(f"*/{_INDEX}"))]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or f"no {_INDEX} in it or one level below"
        raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {directory} must hold a profile's checkpoints, or just one: {names}")
    return _one_checkpoint(str(found[0]), settings, dtype)


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


def _tell(profiles: list[Profile], present: Mapping[str, Path]) -> None:
    """What is there, what is missing, and how to get it."""
    for profile in Profile:
        missing = sorted(needed(profile) - set(present))
        if profile in profiles:
            log.info("profile %s: ready", profile)
        elif present:
            advice = f"hunyuan download-weights {profile} --to {next(iter(present.values())).parent}"
            log.info("profile %s: missing %s; get it with `%s`", profile, ", ".join(missing), advice)


def _one_checkpoint(source: str, settings: WorkerSettings, dtype: torch.dtype) -> Parts:
    """One checkpoint, whose videos are scaled to the size that was asked for."""
    index = Path(source) / _INDEX
    if index.exists():
        kind = json.loads(index.read_text()).get("_class_name")
        if kind != _PIPELINE_CLASS:
            raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {source} is a {kind}, a {_PIPELINE_CLASS} is needed")
    pipeline = HunyuanVideo15Pipeline.from_pretrained(source, cache_dir=settings.cache_dir, dtype=dtype)
    pipeline.vae.enable_tiling()
    name = source.rstrip("/").rpartition("/")[2]
    known = CHECKPOINTS.get(known_name(name) or "")
    # A name that tells nothing: 50 steps, with the shift and the guidance that the checkpoint brings.
    sampling = known.sampling if known is not None else Sampling()
    log.warning("%s alone: its videos are scaled to the size asked for, not super-resolved", name)
    return _single(Checkpoint(name, pipeline.transformer.config.target_size, sampling), pipeline)


def _single(checkpoint: Checkpoint, pipeline: HunyuanVideo15Pipeline) -> Parts:
    route = Route(checkpoint.name)
    routes = {(DEFAULT_MODEL, resolution): route for resolution in Resolution}
    return Parts(checkpoint.name, {checkpoint.name: Base(checkpoint, pipeline)}, routes, {})


def _family(
    preferred: Profile | None, profiles: list[Profile], present: Mapping[str, Path], dtype: torch.dtype
) -> Parts:
    """Every profile whose checkpoints are there, over one pair of text encoders and one VAE."""
    if preferred is not None and preferred not in profiles:
        missing = ", ".join(sorted(needed(preferred) - set(present)))
        raise ModelLoadError(f"HUNYUAN_PROFILE: {preferred} lacks {missing} in HUNYUAN_MODEL_PATH")
    default = preferred or profiles[0]
    models = {DEFAULT_MODEL: default} | {profile.model: profile for profile in profiles}
    routes = {(model, size): ROUTES[profile, size] for model, profile in models.items() for size in Resolution}
    from_image = [profile for profile in profiles if IMAGE_BASES[profile] in present]
    image_routes = (
        {
            (model, size): replace(ROUTES[actual, size], base=IMAGE_BASES[actual])
            for model, profile in models.items()
            for actual in [profile if profile in from_image else from_image[0]]
            for size in Resolution
        }
        if from_image
        else {}
    )
    names = {name for route in (*routes.values(), *image_routes.values()) for name in route.checkpoints}
    whole = next((path for path in present.values() if (path / _INDEX).exists()), None)
    if whole is None:
        raise ModelLoadError("HUNYUAN_MODEL_PATH: none of its checkpoints brings the text encoders and the VAE")
    shared = HunyuanVideo15Pipeline.from_pretrained(whole, transformer=None, dtype=dtype)
    shared.vae.enable_tiling()
    loaded = {name: _transformer(present[name], dtype) for name in sorted(names)}
    text_bases = {route.base for route in routes.values()}
    image_bases = {route.base for route in image_routes.values()}
    base_names = text_bases | image_bases
    bases = {name: Base(CHECKPOINTS[name], _with_transformer(shared, loaded[name])) for name in sorted(text_bases)}
    for name in sorted(image_bases):
        pipeline = _image_pipeline(shared, loaded[name], present[name], dtype)
        bases[name] = Base(CHECKPOINTS[name], pipeline)
    upscalers = {name: _upscaler(CHECKPOINTS[name], loaded[name], present[name]) for name in sorted(names - base_names)}
    return Parts(f"{DEFAULT_MODEL}-{default}", bases, routes, upscalers, image_routes)


def _transformer(directory: Path, dtype: torch.dtype) -> HunyuanVideo15Transformer3DModel:
    return HunyuanVideo15Transformer3DModel.from_pretrained(directory / "transformer", dtype=dtype)


def _with_transformer(
    shared: HunyuanVideo15Pipeline, transformer: HunyuanVideo15Transformer3DModel
) -> HunyuanVideo15Pipeline:
    return HunyuanVideo15Pipeline(**{**shared.components, **_own(transformer)})


def _own(transformer: HunyuanVideo15Transformer3DModel) -> dict[str, Any]:
    """What each base has for itself: shift and guidance are set from its checkpoint later."""
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "guider": ClassifierFreeGuidance(),
    }


def _image_pipeline(
    shared: HunyuanVideo15Pipeline,
    transformer: HunyuanVideo15Transformer3DModel,
    directory: Path,
    dtype: torch.dtype,
) -> HunyuanVideo15Pipeline:
    from diffusers import HunyuanVideo15ImageToVideoPipeline  # here: its module speaks up where torchvision is absent

    vision = {
        "image_encoder": SiglipVisionModel.from_pretrained(directory / "image_encoder", dtype=dtype),
        "feature_extractor": SiglipImageProcessorPil.from_pretrained(directory / "feature_extractor"),
    }
    return HunyuanVideo15ImageToVideoPipeline(**{**shared.components, **_own(transformer), **vision})


def _upscaler(checkpoint: Checkpoint, transformer: HunyuanVideo15Transformer3DModel, directory: Path) -> Upscaler:
    stage = SuperResolution(
        transformer=transformer,
        upsampler=load_upsampler(directory / "upsampler"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=checkpoint.sampling.shift or 1.0),
        sampling=checkpoint.sampling,
    )
    return Upscaler(checkpoint, stage)
