"""The documented API, and GET /ready for load balancers. shim.api.videos has the downloads."""

import asyncio
import logging
from functools import partial
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field

from contract.errors import ErrorCode
from contract.job import JobInput, Resolution, parse_input
from contract.result import Stage
from contract.worker import Gpu, WorkerState
from shim.api.dependencies import (
    GetServices,
    Services,
    client,
    is_anonymous,
    key_name,
    public_url,
    services_of,
    take_rate_token,
)
from shim.api.polled import PolledRoute, json_response
from shim.errors import ApiError, ErrorBody, ServerErrorCode
from shim.http.body import limited_body
from shim.queue.base import JobSnapshot, ModelNotLoadedError, QueueSummary, Workers

_MAX_BODY: Final = 64 * 1024
_MAX_IDEMPOTENCY_KEY: Final = 255
_GIB: Final = 1024**3
#: Seconds that /health waits for the queue: less than a probe waits.
_HEALTH_SECONDS: Final = 3.0

log = logging.getLogger(__name__)
router = APIRouter()
#: The routes that clients poll. The app tries them first: each route that is tried takes time.
polled_router = APIRouter()

#: OpenAPI's links from an accepted task to the routes that take its id, for generated clients.
_LINKS: Final = {
    "status": {"operationId": "get_status", "parameters": {"task_id": "$response.body#/task_id"}},
    "cancel": {"operationId": "cancel_task", "parameters": {"task_id": "$response.body#/task_id"}},
    "video": {"operationId": "get_video", "parameters": {"file_name": "{$response.body#/task_id}.mp4"}},
}


class GenerateResponse(BaseModel):
    """The queued task."""

    task_id: str
    status: Literal["processing"] = "processing"
    estimated_time: int = Field(description="Seconds until the video is expected.")


class ProcessingStatus(BaseModel):
    """A waiting or running task."""

    task_id: str
    status: Literal["processing"] = "processing"
    progress: int = Field(ge=0, le=99, description="Percent; never decreases.")
    elapsed_time: int = Field(description="Seconds since the task was accepted.")
    stage: Stage
    queue_position: int | None = Field(description="1 for the next task to start; null for a running one.")


class CompletedStatus(BaseModel):
    """A completed task, whose video is ready."""

    task_id: str
    status: Literal["completed"] = "completed"
    video_url: str
    duration: int = Field(description="Seconds.")
    resolution: Resolution
    file_size: int = Field(description="Bytes.")


class FailedStatus(BaseModel):
    """A task that ended without a video."""

    task_id: str
    status: Literal["failed"] = "failed"
    error: str
    error_code: ErrorCode


Status = ProcessingStatus | CompletedStatus | FailedStatus


class QueueHealth(BaseModel):
    """The number of waiting and running tasks."""

    waiting: int
    running: int


class WorkersHealth(BaseModel):
    """The number of workers in each state."""

    ready: int
    loading: int
    failed: int


class Health(BaseModel):
    """The server, its workers and its GPU."""

    status: Literal["healthy", "degraded"] = Field(
        description='"degraded" while the queue is unavailable or a disk is full.'
    )
    problems: list[str] = Field(description="What to repair; empty on a healthy server.")
    model_loaded: bool
    gpu_available: bool
    vram_free: str = Field(
        description='Free memory of the GPU that has most of it, as "18.5 GB"; "0.0 GB" without a GPU.'
    )
    version: str
    model: str | None = Field(description="The model that the workers have loaded.")
    models: list[str] = Field(description="The valid values of `model`; empty if the workers do not report them.")
    attention: str | None = Field(description="The attention kernel that the workers use.")
    load_seconds: dict[str, float] | None = Field(description="Seconds of each phase of a worker's start.")
    workers: WorkersHealth
    queue: QueueHealth


class Ready(BaseModel):
    """The server accepts tasks."""

    status: Literal["ready"] = "ready"


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for the error statuses of a route."""
    return {status: {"model": ErrorBody} for status in statuses}


async def body_of_job(request: Request) -> bytes:
    """The request's body, at most 64 KiB.

    Raises:
        ApiError: INVALID_REQUEST for another Content-Type than JSON, REQUEST_TOO_LARGE for a larger body.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(ErrorCode.INVALID_REQUEST, "Content-Type must be application/json")
    return await limited_body(request, _MAX_BODY)


async def within_rate_limit(request: Request) -> None:
    """Take a rate token. A request with an Idempotency-Key takes it later, unless it repeats an earlier one."""
    if "idempotency-key" not in request.headers:
        take_rate_token(request)


async def idempotency_key(request: Request) -> str | None:
    """The request's Idempotency-Key, if it has one, prefixed with the name of its API key: two clients never collide.

    Raises:
        ApiError: INVALID_REQUEST for an empty one or one that is too long.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key.strip()) <= _MAX_IDEMPOTENCY_KEY:
        raise ApiError(ErrorCode.INVALID_REQUEST, f"Idempotency-Key must have 1-{_MAX_IDEMPOTENCY_KEY} characters")
    name = getattr(request.state, "client", None)
    return f"{name}:{key}" if key is not None and name is not None else key


def input_schema() -> dict[str, Any]:
    """JobInput's JSON schema without references: OpenAPI and the page would look for them elsewhere."""
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
                "description": "Any text. A request that is sent again with the same key returns the same task.",
                "schema": {"type": "string", "minLength": 1, "maxLength": _MAX_IDEMPOTENCY_KEY},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": input_schema()}},
        },
    },
)
async def generate(
    request: Request,
    body: Annotated[bytes, Depends(body_of_job)],
    services: GetServices,
    key: Annotated[str | None, Depends(idempotency_key)],
) -> GenerateResponse:
    """Generate a video from a text prompt."""
    new_task = partial(take_rate_token, request) if key is not None else None
    accepted = await services.tasks.submit(parse_input(body), key, new_task, client=key_name(request))
    log.info("accepted from %s", client(request))
    return GenerateResponse(task_id=accepted.task_id, estimated_time=accepted.estimated_time)


async def status(task_id: str, request: Request) -> Response:
    """Check the status of a video generation task."""
    services = services_of(request)
    return json_response(_status(await services.tasks.find(task_id), request, services))


polled_router.add_api_route(
    "/status/{task_id:path}",
    status,
    operation_id="get_status",
    response_model=Status,
    responses=error_responses(401, 404, 500, 503),
    route_class_override=PolledRoute,
)


@router.delete("/tasks/{task_id:path}", operation_id="cancel_task", responses=error_responses(401, 404, 500, 503))
async def cancel(task_id: str, request: Request, services: GetServices) -> Status:
    """Cancel a waiting or running task and return its new status. A finished task does not change."""
    return _status(await services.tasks.cancel(task_id), request, services)


def _status(job: JobSnapshot, request: Request, services: Services) -> Status:
    if job.result is not None:
        return CompletedStatus(
            task_id=job.task_id,
            video_url=f"{public_url(request, services)}/videos/{job.task_id}.mp4",
            duration=job.result.input.duration,
            resolution=job.result.input.resolution,
            file_size=job.result.file_size,
        )
    if job.failure is not None:
        return FailedStatus(task_id=job.task_id, error=job.failure.error, error_code=job.failure.error_code)
    return ProcessingStatus(
        task_id=job.task_id,
        progress=min(job.progress, 99),
        elapsed_time=int(job.elapsed_time),
        stage=job.stage,
        queue_position=job.queue_position,
    )


async def health(request: Request) -> Response:
    """Check the API server, its workers and its GPU. Always 200 while the server runs."""
    return json_response(await _health(services_of(request)))


polled_router.add_api_route(
    "/health", health, response_model=Health, responses=error_responses(500), route_class_override=PolledRoute
)


async def _health(services: Services) -> Health:
    problems = services.metrics.disk_problems()
    try:
        async with asyncio.timeout(_HEALTH_SECONDS):
            summary = await services.queue.summary()
    except Exception as exc:  # noqa: BLE001 - orchestrators kill a server whose /health is an error, whatever the cause
        log.warning("/health is degraded, the queue can't be read: %s: %s", type(exc).__name__, exc)
        problems.append("the job queue is unavailable")
        summary = QueueSummary(waiting=0, running=0, workers=Workers(ready=0, loading=0, failed=0))
    workers = summary.workers
    loaded = next((report for report in workers.reports if report.state is WorkerState.READY), None)
    gpus = await services.gpus.read() or [report.gpu for report in workers.reports if report.gpu is not None]
    return Health(
        status="degraded" if problems else "healthy",
        problems=problems,
        model_loaded=workers.ready > 0,
        gpu_available=bool(gpus),
        vram_free=_vram_free(gpus),
        version=services.version,
        model=loaded.model if loaded else None,
        models=list(workers.models),
        attention=loaded.attention if loaded else None,
        load_seconds=dict(loaded.load_seconds or {}) if loaded else None,
        workers=WorkersHealth(ready=workers.ready, loading=workers.loading, failed=workers.failed),
        queue=QueueHealth(waiting=summary.waiting, running=summary.running),
    )


def _vram_free(gpus: list[Gpu]) -> str:
    most = max((gpu.memory_free for gpu in gpus), default=0)
    return f"{most / _GIB:.1f} GB"


@router.get("/ready", responses=error_responses(500, 503))
async def ready(request: Request, services: GetServices) -> Ready:
    """Check that the server accepts tasks and that its bucket answers: 200 or 503."""
    try:
        await services.readiness.check()
    except ModelNotLoadedError as exc:
        if is_anonymous(request):  # the reason may contain file names
            raise ApiError(ServerErrorCode.MODEL_NOT_LOADED, "No worker has the model loaded") from exc
        raise
    return Ready()
