"""What a worker reports of itself, and what its exit codes mean."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum

from pydantic import BaseModel, ConfigDict, Field


class WorkerExit(IntEnum):
    """Exit codes of `python -m handler`.

    A supervisor may start the worker again after any of them but BAD_SETTINGS, which only a change of settings mends.
    """

    STOPPED = 0
    TEST_JOB_FAILED = 1
    BAD_SETTINGS = 2
    NO_MODEL_OR_BUCKET = 3


class WorkerState(StrEnum):
    """Where a worker process is in its life. A load that failed stays observable.

    One that is STOPPING finishes what it renders and takes no more; one that has STOPPED renders nothing.
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


class WorkerReport(BaseModel):
    """What a worker says of itself, so that the shim can answer /health for a GPU it does not see."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    state: WorkerState
    model: str
    gpu: Gpu | None = None
    models: tuple[str, ...] = Field(default=(), description="The `model` values it can render; empty: any.")
    takes_images: bool = Field(default=True, description="Whether it has image-to-video weights.")
    attention: str | None = None
    error: str | None = None
    load_seconds: Mapping[str, float] | None = Field(default=None, description="Seconds of each phase of the start.")
