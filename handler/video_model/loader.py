"""Checkpoint to ready model: where it is, its dtype and device, its attention kernel, its offloading."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Final

import diffusers
import torch
import transformers
from diffusers import HunyuanVideo15Pipeline

from handler.contract import DEMO_MODEL
from handler.settings import WorkerSettings
from handler.video_model import demo
from handler.video_model.attention import choose_backend, use_mask_free_attention
from handler.video_model.base import ModelLoadError, VideoModel
from handler.video_model.catalog import BASE_SIZES, SAMPLING, Sampling
from handler.video_model.generate import PipelineModel

_INDEX: Final = "model_index.json"
_PIPELINE_CLASS: Final = "HunyuanVideo15Pipeline"

log = logging.getLogger(__name__)


def load_model(settings: WorkerSettings) -> VideoModel:
    """The model that HUNYUAN_MODEL_PATH names, on the GPU if there is one, ready to render.

    Raises:
        ModelLoadError: it is not there, or is no text-to-video checkpoint in diffusers' layout.
    """
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.model_path == DEMO_MODEL:
        device = "cpu"  # it is smaller than what a GPU takes to wake up
        pipeline, name, size, sampling = demo.build_pipeline(), DEMO_MODEL, demo.SIZE, demo.SAMPLING
    else:
        pipeline, name = _from_checkpoint(settings, device)
        size, sampling = _base_size(pipeline), _sampling(name)
    backend = choose_backend(device, flash=settings.enable_flash_attn, sage=settings.enable_sage_attn)
    use_mask_free_attention(pipeline.transformer, backend)
    if device == "cuda" and settings.offload_cpu:
        pipeline.enable_model_cpu_offload()
    else:
        if settings.offload_cpu:
            log.warning("HUNYUAN_OFFLOAD_CPU: there is no GPU to offload from")
        pipeline.to(device)
    log.info("model %s on %s, attention by %s, %dx%d", name, device, backend, *size)
    return PipelineModel(pipeline, name=name, size=size, sampling=sampling)


def _from_checkpoint(settings: WorkerSettings, device: str) -> tuple[HunyuanVideo15Pipeline, str]:
    """The pipeline and the checkpoint's name."""
    source = _find(settings.model_path)
    try:
        pipeline = HunyuanVideo15Pipeline.from_pretrained(
            source,
            cache_dir=settings.cache_dir,
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as exc:
        first_line = str(exc).strip().partition("\n")[0]
        raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {settings.model_path} can't be loaded: {first_line}") from exc
    pipeline.vae.enable_tiling()
    return pipeline, str(source).rstrip("/").rpartition("/")[2]


def _find(model_path: str) -> str:
    """A directory that holds a checkpoint, or the hub id as it is.

    Raises:
        ModelLoadError: the directory holds none, or several.
    """
    directory = Path(model_path).expanduser()
    if not directory.exists() and model_path.count("/") == 1 and not model_path.startswith((".", "~", "/")):
        return model_path
    if not directory.is_dir():
        raise ModelLoadError(
            f"HUNYUAN_MODEL_PATH: {model_path} is no directory, no hub id (owner/name) and not `{DEMO_MODEL}`"
        )
    found = (
        [directory] if (directory / _INDEX).exists() else sorted(path.parent for path in directory.glob(f"*/{_INDEX}"))
    )
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or f"no {_INDEX} in it or one level below"
        raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {model_path} must hold one checkpoint in diffusers' layout: {names}")
    try:
        kind = json.loads((found[0] / _INDEX).read_text())["_class_name"]
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {found[0] / _INDEX} is no index of a checkpoint") from exc
    if kind != _PIPELINE_CLASS:
        raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {found[0]} is a {kind}, a {_PIPELINE_CLASS} is needed")
    return str(found[0])


def _base_size(pipeline: HunyuanVideo15Pipeline) -> tuple[int, int]:
    target_size = pipeline.transformer.config.target_size
    if target_size not in BASE_SIZES:
        raise ModelLoadError(
            f"HUNYUAN_MODEL_PATH: its transformer has target_size {target_size}, known are {sorted(BASE_SIZES)}"
        )
    return BASE_SIZES[target_size]


def _sampling(name: str) -> Sampling:
    """What is known of the checkpoint by its name; else 50 steps, with the shift and guidance that it brings."""
    for ending, sampling in SAMPLING.items():
        if name.endswith(ending):
            return sampling
    return Sampling()
