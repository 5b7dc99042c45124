"""GET /tasks, GET /tasks/{task_id} with its preview, and POST /tasks/{task_id}/retry."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from contract.errors import ErrorCode
from contract.result import Manifest, Stage
from shim.api.dependencies import GetServices, key_name, public_url, take_rate_token
from shim.api.documented import error_responses
from shim.api.status import CompletedStatus, FailedStatus, ProcessingStatus, Status, status_of
from shim.errors import ApiError, ServerErrorCode
from shim.queue.clock import moment
from shim.queue.job import JobEvent, JobRecord, JobSnapshot, JobState, JobStatus

_DEFAULT_LIMIT: Final = 20
_MAX_LIMIT: Final = 100
_NUMBER: Final = re.compile(r"[0-9]{1,18}")

router = APIRouter()


class TaskList(BaseModel):
    """A page of tasks, newest first."""

    tasks: list[Status] = Field(description="Each as GET /status/{task_id} shows it.")
    next_cursor: str | None = Field(description="`cursor` of the next page; null after the last task.")


class StageTime(BaseModel):
    """A stage that a task has reached."""

    stage: Stage
    attempt: int
    started_at: datetime
    seconds: float | None = Field(description="null for a stage that has not ended.")


class TaskEvent(BaseModel):
    """A state or a stage that a task has reached."""

    number: int
    at: datetime
    status: JobStatus
    stage: Stage
    progress: int
    attempt: int
    worker: str | None
    error: str | None
    error_code: ErrorCode | None


class RenderSettings(BaseModel):
    """What a render used."""

    width: int
    height: int
    rendered_size: tuple[int, int] | None
    num_frames: int
    fps: int
    attention: str
    approximations: tuple[str, ...]
    version: str


class Details(BaseModel):
    """What the server knows of a task besides its status."""

    submitted_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    worker: str | None = Field(description="The worker that has, or had, the task.")
    attempts: int | None = Field(description="How often a worker has taken the task.")
    lost_attempts: int | None = Field(description="Renders that workers began and lost (HUNYUAN_MAX_ATTEMPTS).")
    input: dict[str, Any] | None = Field(description="The request, without an image that came as data.")
    settings: RenderSettings | None = Field(description="What the render used; null before it is complete.")
    stages: list[StageTime]
    events: list[TaskEvent] = Field(description="At most the last 200. Empty in front of RunPod.")


class ProcessingTask(Details, ProcessingStatus):
    """A waiting or running task."""


class CompletedTask(Details, CompletedStatus):
    """A completed task."""


class FailedTask(Details, FailedStatus):
    """A task that ended without a video."""


_DETAILED: Final[Mapping[type[BaseModel], Any]] = {
    ProcessingStatus: ProcessingTask,
    CompletedStatus: CompletedTask,
    FailedStatus: FailedTask,
}


def _parameter(name: str, description: str, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": schema}


@router.get(
    "/tasks",
    operation_id="list_tasks",
    responses=error_responses(400, 401, 500, 501, 503),
    openapi_extra={
        "parameters": [
            _parameter("status", "Only tasks with this status.", {"type": "string", "enum": list(JobStatus)}),
            _parameter(
                "limit",
                "Tasks of a page.",
                {"type": "integer", "minimum": 1, "maximum": _MAX_LIMIT, "default": _DEFAULT_LIMIT},
            ),
            _parameter(
                "cursor", "`next_cursor` of the page before.", {"type": "string", "pattern": f"^{_NUMBER.pattern}$"}
            ),
        ]
    },
)
async def list_tasks(request: Request, services: GetServices) -> TaskList:
    """List tasks, newest first. On a server with API keys, each key sees the tasks that it submitted."""
    asked = request.query_params
    page = await services.queue.list_jobs(
        key_name(request),
        status=_status(asked.get("status")),
        cursor=_number("cursor", asked["cursor"]) if "cursor" in asked else None,
        limit=_limit(asked.get("limit", str(_DEFAULT_LIMIT))),
    )
    return TaskList(
        tasks=[status_of(job, public_url(request, services)) for job in page.jobs],
        next_cursor=str(page.next_cursor) if page.next_cursor is not None else None,
    )


def _status(text: str | None) -> JobStatus | None:
    if text is not None and text not in list(JobStatus):
        known = ", ".join(f'"{status}"' for status in JobStatus)
        raise ApiError(ErrorCode.INVALID_REQUEST, f"status must be one of {known}")
    return JobStatus(text) if text is not None else None


def _limit(text: str) -> int:
    limit = _number("limit", text)
    if not 1 <= limit <= _MAX_LIMIT:
        raise ApiError(ErrorCode.INVALID_REQUEST, f"limit must be an integer from 1 to {_MAX_LIMIT}")
    return limit


def _number(name: str, text: str) -> int:
    if not _NUMBER.fullmatch(text):
        what = "the next_cursor of a page" if name == "cursor" else f"an integer from 1 to {_MAX_LIMIT}"
        raise ApiError(ErrorCode.INVALID_REQUEST, f"{name} must be {what}")
    return int(text)


@router.get(
    "/tasks/{task_id:path}/preview.jpg",
    operation_id="get_preview",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {}}, "description": "The preview."},
        **error_responses(401, 404, 500, 503),
    },
)
async def preview(task_id: str, services: GetServices) -> Response:
    """See what a running task's video shows so far: a JPEG of at most 24 KiB of its middle frame, without detail.

    There is a new one about every second while the task is denoised. The last one stays until the task ends; then the
    poster shows the same frame.
    """
    job = await services.tasks.find(task_id)
    jpeg = await services.queue.preview(task_id) if job.preview is not None else None
    if jpeg is None:
        ended = "The task has ended: only a running task has a preview"
        why = ended if job.state.is_terminal else f"There is no preview yet: the stage is {job.stage}"
        raise ApiError(ServerErrorCode.NO_PREVIEW, why)
    return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "no-store"})


@router.get("/tasks/{task_id:path}", operation_id="get_task", responses=error_responses(401, 404, 500, 503))
async def task(task_id: str, request: Request, services: GetServices) -> ProcessingTask | CompletedTask | FailedTask:
    """Show everything about a task: its status, request, attempts, stages and events."""
    job = await services.tasks.find(task_id)
    record = await services.queue.record(task_id)
    status = status_of(job, public_url(request, services))
    detailed: ProcessingTask | CompletedTask | FailedTask = _DETAILED[type(status)](
        **{**_details(job, record), **dict(status)}
    )
    return detailed


@router.post(
    "/tasks/{task_id:path}/retry",
    operation_id="retry_task",
    status_code=202,
    responses=error_responses(401, 404, 409, 429, 500, 503),
)
async def retry(task_id: str, request: Request, services: GetServices) -> Status:
    """Queue a failed task again, under the same id. A task that waits or runs already stays as it is."""
    job = await services.tasks.retry(task_id, partial(take_rate_token, request))
    return status_of(job, public_url(request, services))


def _details(job: JobSnapshot, record: JobRecord | None) -> dict[str, Any]:
    """The fields of `Details`. Without a record, the queue keeps none or has deleted the job."""
    kept: dict[str, Any] = vars(record) if record is not None else {}
    times = {"submitted_at": kept.get("submitted_at"), "finished_at": kept.get("finished_at")}
    times["started_at"] = kept.get("started_at", job.started_at)
    return {
        **{name: moment(seconds) if seconds is not None else None for name, seconds in times.items()},
        **{name: kept.get(name) for name in ("attempts", "lost_attempts")},
        "worker": kept.get("worker_id"),
        "input": _shown_input(record, job.result),
        "settings": job.result.model_dump(include=set(RenderSettings.model_fields)) if job.result else None,
        "stages": _stages(kept.get("events", ())),
        "events": [_event(one) for one in kept.get("events", ())],
    }


def _shown_input(record: JobRecord | None, made: Manifest | None) -> dict[str, Any] | None:
    """RunPod's API takes any input, so it may be no object. Who knows the id of an uploaded image may use it."""
    given = record.input if record is not None else made.input.wire() if made is not None else None
    if not isinstance(given, dict):
        return None
    shown = {name: value for name, value in given.items() if name != "traceparent"}
    if not str(shown.get("image", "http")).startswith("http"):
        del shown["image"]
    return shown


def _event(one: JobEvent) -> TaskEvent:
    return TaskEvent(
        number=one.number,
        at=moment(one.at),
        status=_STATUS_OF.get(one.state, JobStatus.FAILED) if one.failure is None else JobStatus.FAILED,
        stage=one.stage,
        progress=one.progress,
        attempt=one.attempts,
        worker=one.worker_id,
        error=one.failure.error if one.failure else None,
        error_code=one.failure.error_code if one.failure else None,
    )


_STATUS_OF: Final = {
    JobState.QUEUED: JobStatus.PROCESSING,
    JobState.RUNNING: JobStatus.PROCESSING,
    JobState.COMPLETED: JobStatus.COMPLETED,
}


def _stages(events: Sequence[JobEvent]) -> list[StageTime]:
    """The stages with their lengths. Each lasts until the next event."""
    ends = [*(one.at for one in events[1:]), None]
    return [
        StageTime(
            stage=one.stage,
            attempt=one.attempts,
            started_at=moment(one.at),
            seconds=round(end - one.at, 3) if end is not None else None,
        )
        for one, end in zip(events, ends, strict=False)
        if not one.state.is_terminal
    ]
