"""The worker's settings. Those of its bucket are in `storage.settings`."""

import os
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo
from pydantic_settings import NoDecode

from contract.job import Profile
from contract.log_fields import LogOptions
from contract.settings import split_commas
from contract.tracing import TraceOptions
from contract.worker import GPUS_PER_JOB


class Approximation(StrEnum):
    """Options that make renders faster or smaller, at the price of slightly different videos."""

    FP8_WEIGHTS = "fp8-weights"
    FIRST_BLOCK_CACHE = "first-block-cache"
    TAYLORSEER = "taylorseer"
    MAGCACHE = "magcache"
    TEACACHE = "teacache"
    SR_WINDOW_ATTENTION = "sr-window-attention"


#: Approximations that skip steps. Each replaces the others.
_STEP_CACHES: Final = (
    Approximation.FIRST_BLOCK_CACHE,
    Approximation.TAYLORSEER,
    Approximation.MAGCACHE,
    Approximation.TEACACHE,
)


#: Those that compare tokens of which each of several GPUs has other ones: they would skip different steps.
_ONE_GPU: Final = (Approximation.FIRST_BLOCK_CACHE, Approximation.TEACACHE)


def _gpus(value: int, info: ValidationInfo) -> int:
    if value not in GPUS_PER_JOB:
        raise ValueError("must be 1, 2, 4 or 8")
    named = [each for each in _ONE_GPU if each in info.data.get("approximations", ())]
    if value > 1 and named:
        raise ValueError(f"must be 1 with HUNYUAN_APPROXIMATIONS={named[0]}, or name another approximation")
    return value


def _one_step_cache(value: tuple[Approximation, ...]) -> tuple[Approximation, ...]:
    named = [each for each in _STEP_CACHES if each in value]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} exclude each other; name one of them")
    return value


#: RunPod's reference to a secret, which it replaces by the secret's value. It documents that for pods only.
#: Source: https://docs.runpod.io/pods/templates/secrets.
_REFERENCE: Final = re.compile(r"\{\{\s*\w+\s*\}\}")
_OURS: Final = ("BUCKET_", "HUNYUAN_", "HF_")


def unresolved_references() -> Iterator[str]:
    """A sentence for each of our variables whose value holds a reference that the platform has not replaced."""
    for name, value in sorted(os.environ.items()):
        if name.startswith(_OURS) and "{{" in value:
            found = _REFERENCE.search(value)
            text = found[0] if found is not None else "{{"
            yield f"{name}: its value is the literal text {text}, which RunPod has not replaced; set the value itself"


def environment_of_rank(rank: int) -> dict[str, str]:
    """Of the process that computes on the GPU number `rank` of those that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return {**os.environ, "CUDA_VISIBLE_DEVICES": visible.split(",")[rank] if "," in visible else str(rank)}


class WorkerSettings(LogOptions, TraceOptions):
    """Settings of `python -m handler`, except those of its bucket.

    Raises:
        pydantic.ValidationError: naming each environment variable that is missing or wrong.
    """

    model_path: str = Field(
        default="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        validation_alias="HUNYUAN_MODEL_PATH",
        description="Directory of a checkpoint in diffusers' layout or of several checkpoints, a hub id, or `demo`.",
    )
    profile: Profile | None = Field(
        default=None,
        validation_alias="HUNYUAN_PROFILE",
        description="Profile that the model `HunyuanVideo-1.5` uses: `turbo`, `fast`, `balanced` or `quality`. "
        "Default: the fastest profile whose weights are present.",
    )
    cache_dir: Path | None = Field(
        default=None,
        validation_alias="HUNYUAN_CACHE_DIR",
        description="Directory for checkpoints from the hub and for compiled kernels. Default: the libraries' own.",
    )
    enable_flash_attn: bool = Field(
        default=True,
        validation_alias="HUNYUAN_ENABLE_FLASH_ATTN",
        description="Use flash-attn if a trial call works on this GPU, otherwise PyTorch's fastest attention kernel.",
    )
    enable_sage_attn: bool | None = Field(
        default=None,
        validation_alias="HUNYUAN_ENABLE_SAGE_ATTN",
        description="Use sageattention (8-bit, approximate; 2.1.1 or newer) in preference to flash-attn, if a trial "
        "call works on this GPU. Default: if the model `HunyuanVideo-1.5` is profile `turbo`.",
    )
    compile: bool | None = Field(
        default=None,
        validation_alias="HUNYUAN_COMPILE",
        description="Compile the transformers' blocks at the start, `true` or `false`. Default: if they fit the GPU.",
    )
    previews: bool = Field(
        default=True,
        validation_alias="HUNYUAN_PREVIEWS",
        description="Whether `GET /tasks/{id}/preview.jpg` shows the picture while it is denoised.",
    )
    approximations: Annotated[
        tuple[Approximation, ...], NoDecode, BeforeValidator(split_commas), AfterValidator(_one_step_cache)
    ] = Field(
        default=(),
        validation_alias="HUNYUAN_APPROXIMATIONS",
        description="Any of `fp8-weights` (half the memory), `sr-window-attention` (super-resolution looks 4 latent "
        "frames back and ahead), and one that skips steps: `first-block-cache`, `taylorseer`, `magcache` (480p_i2v "
        "only) or `teacache` (checkpoints that are not distilled only), separated by commas. Manifests name them.",
    )
    gpus_per_job: Annotated[int, AfterValidator(_gpus)] = Field(
        default=1,
        validation_alias="HUNYUAN_GPUS_PER_JOB",
        description="GPUs of this machine that render one video together: 1, 2, 4 or 8. Each holds the whole model.",
    )
    lora_dir: Path | None = Field(
        default=None,
        validation_alias="HUNYUAN_LORA_DIR",
        description="Directory with LoRA adapters. A request may name every `NAME.safetensors` directly in it, and new "
        "files need no restart.",
    )
    offload_cpu: bool = Field(
        default=False,
        validation_alias="HUNYUAN_OFFLOAD_CPU",
        description="Stream the model from host memory block by block even if the GPU can hold it.",
    )
    vram_limit: float | None = Field(
        default=None,
        gt=0,
        validation_alias="HUNYUAN_VRAM_LIMIT",
        description="GPU memory in GB that the worker may use. Default: all that is free when it starts.",
    )
    gpu_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        validation_alias="HUNYUAN_GPU_SHARE",
        description="Share of its peak that the GPU reaches, for estimated times; `make bench-gpu` measures it. "
        "Default: 0.6, and 0.5 on an L40S or a B200.",
    )
    c2pa_certificate: Path | None = Field(
        default=None,
        validation_alias="HUNYUAN_C2PA_CERTIFICATE",
        description="PEM file with a certificate for Content Credentials and its chain. Every video is then signed as "
        "generated by AI. Needs the extra `c2pa` and HUNYUAN_C2PA_KEY.",
    )
    c2pa_key: Path | None = Field(
        default=None,
        validation_alias="HUNYUAN_C2PA_KEY",
        description="PEM file with the private key of HUNYUAN_C2PA_CERTIFICATE, for ES256.",
    )
    work_dir: Path | None = Field(
        default=None,
        validation_alias="HUNYUAN_WORK_DIR",
        description="Directory for a video until it is stored. Default: the system's directory for temporary files.",
    )
    store_patience: float = Field(
        default=600.0,
        ge=0,
        validation_alias="HUNYUAN_STORE_PATIENCE",
        description="Seconds to retry storing a finished video while the bucket fails.",
    )
    stall_timeout: float | None = Field(
        default=None,
        gt=0,
        validation_alias="HUNYUAN_STALL_TIMEOUT",
        description="Seconds without progress (a step of the model, an encoded frame, a stored byte) after which a "
        "render is stopped and its task is queued again. Default: 300; longer for a step of a large video, because one "
        "step at 1080p can take many minutes.",
    )
    render_timeout: float | None = Field(
        default=None,
        gt=0,
        validation_alias="HUNYUAN_RENDER_TIMEOUT",
        description="Seconds after which a render is stopped and its task is queued again, even if it makes progress. "
        "Default: ten times what is calculated for this GPU, or what the slowest supported GPU needs.",
    )
    init_timeout: float = Field(
        default=420.0,
        gt=0,
        validation_alias="RUNPOD_INIT_TIMEOUT",
        description="Seconds after which RunPod gives up a worker that still loads. On RunPod, the worker warns if its "
        "load took more than half of them. `hunyuan deploy` sets 1800.",
    )
    report_url: str | None = Field(
        default=None,
        validation_alias="HUNYUAN_WORKER_REPORT_URL",
        description="URL for the worker's reports; `$RUNPOD_POD_ID` stands for its id. Set by `hunyuan serve`.",
    )
    worker_id: str | None = Field(
        default=None, validation_alias="RUNPOD_POD_ID", description="The worker's id. Set by the platform."
    )
    platform_key: SecretStr | None = Field(
        default=None,
        validation_alias="RUNPOD_AI_API_KEY",
        description="The worker's key for its platform. Set by the platform. Never logged.",
    )
    job_url: str | None = Field(
        default=None,
        validation_alias="RUNPOD_WEBHOOK_GET_JOB",
        description="URL of job-take. Set by the platform; without it the worker runs one test job.",
    )
