"""From settings to a model that is ready to render: checkpoints, attention, placement, compilation."""

import logging
import time
from pathlib import Path
from typing import Final

import diffusers
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError

from contract.job import DEMO_MODEL, Profile
from handler.machine import is_writable
from handler.settings import Approximation, WorkerSettings
from handler.video_model import demo
from handler.video_model.approximations import approximate
from handler.video_model.attention import choose_backend, is_eight_bit, use_mask_free_attention
from handler.video_model.base import ModelLoadError, VideoModel
from handler.video_model.catalog import known_name
from handler.video_model.causal_decoder import use_frame_causal_attention
from handler.video_model.checkpoints import read_checkpoints, single_parts
from handler.video_model.compilation import compile_blocks, should_compile
from handler.video_model.cost import Speed, gpu_named
from handler.video_model.generate import PipelineModel
from handler.video_model.lora_files import LoraFiles
from handler.video_model.memory import Budget
from handler.video_model.parallel import Parallel
from handler.video_model.parts import Parts
from handler.video_model.placement import put_on_gpu
from handler.video_model.preview import Projection, projection_of
from handler.video_model.ranks import OtherRanks

#: What the libraries raise if files are absent, truncated, or of another model.
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

    With HUNYUAN_GPUS_PER_JOB above 1, starts a process for each other GPU, which loads it, too.

    Raises:
        ModelLoadError: it does not exist, or is not a text-to-video checkpoint in diffusers' layout; or there is no
            directory HUNYUAN_LORA_DIR.
    """
    if settings.gpus_per_job == 1:
        return _load(settings, None, None)
    ranks = OtherRanks(settings, backend=_backend(settings))
    try:
        model = _load(settings, ranks.parallel, ranks)
        ranks.wait_until_loaded()
    except BaseException:
        ranks.close()
        raise
    return model


def load_rank(settings: WorkerSettings, parallel: Parallel) -> PipelineModel:
    """The same for another rank than 0."""
    return _load(settings, parallel, None)


def _backend(settings: WorkerSettings) -> str:
    """With which torch.distributed connects the ranks. Raises ModelLoadError if there are too few GPUs."""
    if _device(settings) == "cpu":
        return str(dist.Backend.GLOO)
    found = torch.cuda.device_count()
    if found < settings.gpus_per_job:
        raise ModelLoadError(f"HUNYUAN_GPUS_PER_JOB is {settings.gpus_per_job}, but the worker has {found} GPUs")
    return str(dist.Backend.NCCL)


def _device(settings: WorkerSettings) -> str:
    """The demo model is too small for a GPU to help."""
    return "cuda" if torch.cuda.is_available() and settings.model_path != DEMO_MODEL else "cpu"


def _load(settings: WorkerSettings, parallel: Parallel | None, ranks: OtherRanks | None) -> PipelineModel:
    started = time.monotonic()
    if settings.lora_dir is not None and not settings.lora_dir.is_dir():
        raise ModelLoadError(f"HUNYUAN_LORA_DIR: {settings.lora_dir} is not a directory; create it or unset it")
    # 1. Read the checkpoints.
    device = _device(settings)
    parts = _read(settings, device)
    read = time.monotonic()
    # 2. Replace what is slow or large, and put each part where the memory plan says.
    attention, approximations = _adapt(parts, settings, device)
    if parallel is not None:
        _share(parts, parallel, device)
    memory = _place(parts, settings, device)
    placed = time.monotonic()
    seconds = {"checkpoints": read - started, "placement": placed - read}
    # 3. Compile, so that no job waits for the compiler.
    if should_compile(settings.compile, device, memory):
        compile_blocks(parts.transformers, _kernel_cache(settings.cache_dir), loras=settings.lora_dir is not None)
        seconds["compilation"] = time.monotonic() - placed
    log.info("loaded model %s on %s with attention kernel %s", parts.name, device, attention)
    model = PipelineModel(
        parts,
        attention=attention,
        memory=memory,
        speed=_speed(settings, device, attention),
        approximations=approximations,
        projection=_projection(settings, parts),
        loras=LoraFiles(settings.lora_dir),
        parallel=parallel,
        ranks=ranks,
    )
    # 4. Warm up: RunPod may stop this process before its first job, and continue it for that job.
    compiled = time.monotonic()
    model.warm_up()
    model.load_seconds = {**seconds, "warm-up": time.monotonic() - compiled}
    return model


def _kernel_cache(configured: Path | None) -> Path | None:
    """HUNYUAN_CACHE_DIR, unless it belongs to another user: then PyTorch's own directory."""
    return configured if configured is not None and is_writable(configured) else None


def _read(settings: WorkerSettings, device: str) -> Parts:
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if settings.model_path == DEMO_MODEL:
        return single_parts(demo.CHECKPOINT, demo.load_pipeline())
    try:
        return read_checkpoints(settings, torch.bfloat16 if device == "cuda" else torch.float32)
    except _LOAD_ERRORS as exc:
        first_line = str(exc).strip().partition("\n")[0]
        raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {settings.model_path} can't be loaded: {first_line}") from exc


def _adapt(parts: Parts, settings: WorkerSettings, device: str) -> tuple[str, list[Approximation]]:
    """Returns the name of the attention kernel, and the approximations in use."""
    if parts.image_routes:
        use_frame_causal_attention(parts.shared.vae.encoder)
    else:
        parts.shared.vae.encoder = None  # only images need it; 0.8 GB at real size
    sage = settings.enable_sage_attn
    if sage is None and parts.name != Profile.TURBO.model:  # 8-bit attention is a part of turbo alone
        sage = False
    backend = choose_backend(device, flash=settings.enable_flash_attn, sage=sage)
    for transformer in parts.transformers:
        use_mask_free_attention(transformer, backend)
    approximations = approximate(
        parts.transformers,
        settings.approximations,
        many_steps=parts.many_step_transformers,
        bases={known_name(name) or name: base.pipeline.transformer for name, base in parts.bases.items()},
        upscalers=parts.upscaler_transformers,
    )
    return backend, approximations


def _share(parts: Parts, parallel: Parallel, device: str) -> None:
    for transformer in parts.transformers:
        parallel.share(transformer)
    if device == "cpu":
        torch.set_num_threads(max(torch.get_num_threads() // parallel.size, 1))


def _speed(settings: WorkerSettings, device: str, attention: str) -> Speed | None:
    """What this GPU reaches; None if its data sheet is unknown."""
    gpu = gpu_named(torch.cuda.get_device_name()) if device == "cuda" else None
    return Speed.of(gpu, share=settings.gpu_share, eight_bit=is_eight_bit(attention)) if gpu is not None else None


def _projection(settings: WorkerSettings, parts: Parts) -> Projection | None:
    """What makes previews; None if HUNYUAN_PREVIEWS is false, or if none is known for this VAE."""
    if not settings.previews:
        return None
    if parts.name == DEMO_MODEL:
        return Projection.read(demo.PROJECTION)
    return projection_of(parts.shared.vae.config.latent_channels)


def _place(parts: Parts, settings: WorkerSettings, device: str) -> Budget | None:
    if device == "cuda":
        return put_on_gpu(parts, settings)
    if settings.offload_cpu:
        log.warning("HUNYUAN_OFFLOAD_CPU has no effect: the model is not on a GPU")
    return None
