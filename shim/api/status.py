"""A task's status as every face of the server shows it."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from contract.errors import ErrorCode
from contract.job import Resolution
from contract.result import Stage
from shim.queue.clock import moment
from shim.queue.estimates import remaining_time
from shim.queue.job import JobSnapshot, WebhookState

_Webhook = Annotated[
    WebhookState | None,
    Field(exclude_if=lambda state: state is None, description="Absent unless the task has a webhook."),
]


class ProcessingStatus(BaseModel):
    """A waiting or running task."""

    task_id: str
    status: Literal["processing"] = "processing"
    progress: int = Field(ge=0, le=99, description="Percent; never decreases.")
    elapsed_time: int = Field(description="Seconds since the task was accepted.")
    stage: Stage
    queue_position: int | None = Field(description="1 for the next task to start; null for a running one.")
    started_at: datetime | None = Field(description="When a worker took the task; null for a waiting one.")
    remaining_time: int | None = Field(description="Seconds until the video is expected; null if that cannot be said.")
    preview_url: str | None = Field(
        default=None,
        exclude_if=lambda url: url is None,
        description="A JPEG of what is seen so far; a new address for each new one. Absent if there is none.",
    )
    webhook: _Webhook = None


class CompletedStatus(BaseModel):
    """A completed task, whose video is ready."""

    task_id: str
    status: Literal["completed"] = "completed"
    video_url: str
    duration: int = Field(description="Seconds.")
    resolution: Resolution
    file_size: int = Field(description="Bytes.")
    poster_url: str = Field(description="The middle frame, a JPEG.")
    prompt: str
    model: str = Field(description="The model that rendered.")
    seed: int = Field(description="The same request with this seed gives the same video.")
    created_at: datetime = Field(description="When the video was made.")
    timings: Mapping[str, float] = Field(description="Seconds spent in each stage, and `total`.")
    warnings: tuple[str, ...] = Field(
        default=(),
        exclude_if=lambda warnings: not warnings,
        description="What could not be done for the request. Absent if there is nothing.",
    )
    webhook: _Webhook = None


class FailedStatus(BaseModel):
    """A task that ended without a video."""

    task_id: str
    status: Literal["failed"] = "failed"
    error: str
    error_code: ErrorCode
    webhook: _Webhook = None


Status = ProcessingStatus | CompletedStatus | FailedStatus


def status_of(job: JobSnapshot, server_url: str) -> Status:
    """What GET /status answers for the job. `server_url` has no slash at its end."""
    if job.result is not None:
        made, address = job.result, f"{server_url}/videos/{job.task_id}"
        return CompletedStatus(
            task_id=job.task_id,
            video_url=f"{address}.mp4",
            duration=made.input.duration,
            resolution=made.input.resolution,
            file_size=made.file_size,
            poster_url=f"{address}.jpg",
            prompt=made.input.prompt,
            model=made.model,
            seed=made.seed,
            created_at=made.created_at,
            timings=made.timings,
            warnings=made.warnings,
            webhook=job.webhook,
        )
    if job.failure is not None:
        return FailedStatus(
            task_id=job.task_id, error=job.failure.error, error_code=job.failure.error_code, webhook=job.webhook
        )
    preview_url = f"{server_url}/tasks/{job.task_id}/preview.jpg?n={job.preview}"
    return ProcessingStatus(
        task_id=job.task_id,
        progress=min(job.progress, 99),
        elapsed_time=int(job.elapsed_time),
        stage=job.stage,
        queue_position=job.queue_position,
        started_at=moment(job.started_at) if job.started_at is not None else None,
        remaining_time=remaining_time(job),
        preview_url=preview_url if job.preview is not None else None,
        webhook=job.webhook,
    )
