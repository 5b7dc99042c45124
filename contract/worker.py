"""A worker's state, its reports to the server, and its exit codes."""

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from contract.job import Resolution
from contract.offer import SamplingLimits

#: How many GPUs may render one video together: halves of them share its passes, and its attention heads divide evenly.
GPUS_PER_JOB: Final = (1, 2, 4, 8)


class WorkerExit(IntEnum):
    """Exit codes of `python -m handler`.

    A supervisor may restart the worker after any of them except BAD_SETTINGS, which persists until a setting changes.
    RENDER_STUCK: a render made no progress and did not end when it was stopped; its task needs another worker.
    RANK_LOST: one of the processes that share a render has ended.
    """

    STOPPED = 0
    TEST_JOB_FAILED = 1
    BAD_SETTINGS = 2
    NO_MODEL_OR_BUCKET = 3
    RENDER_STUCK = 4
    RANK_LOST = 5


class WorkerState(StrEnum):
    """State of a worker process. FAILED: its model can't be loaded, its bucket denies access, or its
    render made no progress and is being stopped. A FAILED worker does not keep the lease of its job.

    A STOPPING worker finishes its current job and takes no other. A STOPPED worker holds no job.
    """

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Gpu(BaseModel):
    """One GPU as its worker sees it. Memory in bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    memory_total: int
    memory_free: int


class RenderEstimate(BaseModel):
    """Seconds that a worker expects one kind of job to take, before it has rendered any."""

    model_config = ConfigDict(frozen=True)

    model: str
    resolution: Resolution
    duration: int
    seconds: float


class WorkerReport(BaseModel):
    """What a worker reports to the server, which answers /health from it without seeing the GPU."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    state: WorkerState
    model: str
    gpu: Gpu | None = None
    models: tuple[str, ...] = Field(default=(), description="The `model` values it can render; empty means any.")
    takes_images: bool = Field(default=True, description="Whether the worker has image-to-video weights.")
    limits: tuple[SamplingLimits, ...] = Field(default=(), description="What requests may not change.")
    loras: tuple[str, ...] = Field(default=(), description="Names of the LoRA adapters that it has.")
    estimates: tuple[RenderEstimate, ...] = Field(
        default=(), description="Calculated render seconds for the worker's GPU; empty if its speed is unknown."
    )
    attention: str | None = None
    error: str | None = None
    load_seconds: Mapping[str, float] | None = Field(default=None, description="Seconds of each phase of a cold start.")
