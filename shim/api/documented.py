"""The documented API: POST /generate, GET /status/{task_id}, GET /health; and GET /ready for load balancers."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from contract.errors import ErrorCode
from contract.job import JobInput, Resolution, parse_input
from contract.result import Stage
from contract.worker import Gpu, WorkerState
from shim.api.dependencies import Services, client, is_anonymous, public_url, services, within_rate_limit
from shim.errors import ApiError, ErrorBody, ServerErrorCode
from shim.gpu import local_gpus
from shim.queue.base import JobSnapshot, ModelNotLoadedError, QueueUnavailableError, Workers

MAX_BODY: Final = 64 * 1024
_DRAINED_BODY: Final = 1024 * 1024
_MAX_IDEMPOTENCY_KEY: Final = 255
_GIB: Final = 1024**3

log = logging.getLogger(__name__)
router = APIRouter()


#: What can be asked of an accepted task: OpenAPI's links, for clients that are generated or that explore.
_LINKS: Final = {
    "status": {"operationId": "get_status", "parameters": {"task_id": "$response.body#/task_id"}},
    "cancel": {"operationId": "cancel_task", "parameters": {"task_id": "$response.body#/task_id"}},
    "video": {"operationId": "get_video", "parameters": {"file_name": "{$response.body#/task_id}.mp4"}},
}


class GenerateResponse(BaseModel):
    """The task that was queued."""

    task_id: str
    status: Literal["processing"] = "processing"
    estimated_time: int = Field(description="Seconds until the video is expected.")


class ProcessingStatus(BaseModel):
    """A task that waits or runs."""

    task_id: str
    status: Literal["processing"] = "processing"
    progress: int = Field(ge=0, le=99, description="Percent; never falls.")
    elapsed_time: int = Field(description="Seconds since the task was accepted.")
    stage: Stage
    queue_position: int | None = Field(description="1 for the next task to start; null once it runs.")


class CompletedStatus(BaseModel):
    """A task whose video is ready."""

    task_id: str
    status: Literal["completed"] = "completed"
    video_url: str
    duration: int = Field(description="Seconds.")
    resolution: Resolution
    file_size: int = Field(description="Bytes.")


class FailedStatus(BaseModel):
    """A task that ended with no video."""

    task_id: str
    status: Literal["failed"] = "failed"
    error: str
    error_code: ErrorCode


class QueueFigures(BaseModel):
    """How many tasks wait and run."""

    waiting: int
    running: int


class WorkerFigures(BaseModel):
    """How many workers there are in each state."""

    ready: int
    loading: int
    failed: int


class Health(BaseModel):
    """The server, its workers and its GPU."""

    status: Literal["healthy", "degraded"] = Field(description='"degraded" while the queue can\'t be asked.')
    model_loaded: bool
    gpu_available: bool
    vram_free: str = Field(description='Of the GPU that has most free, as "18.5 GB"; "0.0 GB" without one.')
    version: str
    model: str | None = Field(description="The model that workers have loaded.")
    models: list[str] = Field(description="The `model` values that can be asked for; empty where workers do not tell.")
    attention: str | None = Field(description="The attention kernel in use.")
    load_seconds: dict[str, float] | None = Field(description="Seconds of each phase of the worker's start.")
    workers: WorkerFigures
    queue: QueueFigures


class Ready(BaseModel):
    """The server takes tasks."""

    status: Literal["ready"] = "ready"


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for the error statuses of a route."""
    return {status: {"model": ErrorBody} for status in statuses}


async def limited_body(request: Request) -> bytes:
    """The request's body, at most 64 KiB of it in memory.

    Raises:
        ApiError: INVALID_REQUEST for a body that is not declared to be JSON, REQUEST_TOO_LARGE for a larger one.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(ErrorCode.INVALID_REQUEST, "Content-Type must be application/json")
    body = bytearray()
    size = 0
    # A client that is still sending would not see the answer: what is somewhat too large is read to its end.
    async for chunk in request.stream():
        size += len(chunk)
        if size > _DRAINED_BODY:
            break
        if size <= MAX_BODY:
            body += chunk
    if size > MAX_BODY:
        raise ApiError(ServerErrorCode.REQUEST_TOO_LARGE, f"the body is larger than {MAX_BODY // 1024} KiB")
    return bytes(body)


def idempotency_key(request: Request) -> str | None:
    """The request's Idempotency-Key, if it has one; each API key has a space of its own for them.

    Raises:
        ApiError: INVALID_REQUEST for one that is empty or too long.
    """
    given = request.headers.get("idempotency-key")
    if given is not None and not 1 <= len(given.strip()) <= _MAX_IDEMPOTENCY_KEY:
        raise ApiError(ErrorCode.INVALID_REQUEST, f"Idempotency-Key takes 1-{_MAX_IDEMPOTENCY_KEY} characters")
    name = getattr(request.state, "client", None)
    return f"{name}:{given}" if given is not None and name is not None else given


def _body_schema() -> dict[str, Any]:
    """JobInput's JSON schema with its definitions in place: by reference, OpenAPI would look for them elsewhere."""
    schema = JobInput.model_json_schema()
    definitions = schema.pop("$defs")
    for name, field in schema["properties"].items():
        if "$ref" in field:
            schema["properties"][name] = {**definitions[field.pop("$ref").rpartition("/")[2]], **field}
    return schema


@router.post(
    "/generate",
    status_code=202,
    dependencies=[Depends(within_rate_limit)],
    responses={202: {"links": _LINKS}, **error_responses(400, 401, 408, 409, 413, 429, 500, 503)},
    openapi_extra={
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "Any text of your own. The same request with the same key gives the same task again.",
                "schema": {"type": "string", "minLength": 1, "maxLength": _MAX_IDEMPOTENCY_KEY},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _body_schema()}},
        },
    },
)
async def generate(
    request: Request,
    body: Annotated[bytes, Depends(limited_body)],
    use: Annotated[Services, Depends(services)],
    key: Annotated[str | None, Depends(idempotency_key)],
) -> GenerateResponse:
    """Generate a video from a text prompt."""
    accepted = await use.tasks.submit(parse_input(body), key)
    log.info("%s: accepted from %s", accepted.task_id, client(request))
    return GenerateResponse(task_id=accepted.task_id, estimated_time=accepted.estimated_time)


@router.get("/status/{task_id:path}", operation_id="get_status", responses=error_responses(401, 404, 500, 503))
async def status(
    task_id: str, request: Request, use: Annotated[Services, Depends(services)]
) -> ProcessingStatus | CompletedStatus | FailedStatus:
    """Check the status of a video generation task."""
    return _status(await use.tasks.find(task_id), request, use)


@router.delete("/tasks/{task_id:path}", operation_id="cancel_task", responses=error_responses(401, 404, 500, 503))
async def cancel(
    task_id: str, request: Request, use: Annotated[Services, Depends(services)]
) -> ProcessingStatus | CompletedStatus | FailedStatus:
    """Cancel a task that waits or runs, and answer with its status from then on. A finished one stays as it is."""
    return _status(await use.tasks.cancel(task_id), request, use)


def _status(job: JobSnapshot, request: Request, use: Services) -> ProcessingStatus | CompletedStatus | FailedStatus:
    if job.result is not None:
        return CompletedStatus(
            task_id=job.task_id,
            video_url=f"{public_url(request, use)}/videos/{job.task_id}.mp4",
            duration=job.result.input.duration,
            resolution=job.result.input.resolution,
            file_size=job.result.file_size,
        )
    if job.failure is not None:
        return FailedStatus(task_id=job.task_id, error=job.failure.error, error_code=job.failure.error_code)
    return _processing(job)


def _processing(job: JobSnapshot) -> ProcessingStatus:
    return ProcessingStatus(
        task_id=job.task_id,
        progress=min(job.progress, 99),
        elapsed_time=int(job.elapsed_time),
        stage=job.stage,
        queue_position=job.queue_position,
    )


@router.get("/health", responses=error_responses(500))
async def health(use: Annotated[Services, Depends(services)]) -> Health:
    """Check if the API server is running, and what its workers and GPU are at. Always 200 while it runs."""
    try:
        workers = await use.queue.workers()
        backlog = await use.queue.backlog()
        queue = QueueFigures(waiting=len(backlog.waiting), running=len(backlog.running))
        state: Literal["healthy", "degraded"] = "healthy"
    except QueueUnavailableError:
        workers, queue, state = Workers(ready=0, loading=0, failed=0), QueueFigures(waiting=0, running=0), "degraded"
    loaded = next((report for report in workers.reports if report.state is WorkerState.READY), None)
    gpus = local_gpus() or [report.gpu for report in workers.reports if report.gpu is not None]
    return Health(
        status=state,
        model_loaded=workers.ready > 0,
        gpu_available=bool(gpus),
        vram_free=_vram_free(gpus),
        version=use.version,
        model=loaded.model if loaded else None,
        models=list(workers.models),
        attention=loaded.attention if loaded else None,
        load_seconds=dict(loaded.load_seconds or {}) if loaded else None,
        workers=WorkerFigures(ready=workers.ready, loading=workers.loading, failed=workers.failed),
        queue=queue,
    )


def _vram_free(gpus: list[Gpu]) -> str:
    most = max((gpu.memory_free for gpu in gpus), default=0)
    return f"{most / _GIB:.1f} GB"


@router.get("/ready", responses=error_responses(500, 503))
async def ready(request: Request, use: Annotated[Services, Depends(services)]) -> Ready:
    """Whether a task posted now would be taken and its video kept: 200 or 503."""
    try:
        await use.queue.check_ready()
    except ModelNotLoadedError as exc:
        if is_anonymous(request):  # the reason may name files
            raise ApiError(ServerErrorCode.MODEL_NOT_LOADED, "No worker has the model loaded") from exc
        raise
    await use.check_bucket()
    return Ready()
