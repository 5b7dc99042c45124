"""The videos API of OpenAI, so that its official client and what speaks like it work unchanged: /v1/videos, /v1/models.

The tasks are those of the documented API. Source of the wire format: https://github.com/openai/openai-python,
src/openai/types/video.py and src/openai/resources/videos.py.
"""

import time
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from contract.errors import ErrorCode
from contract.job import DEFAULT_MODEL, InvalidInputError, JobInput, QueuedInput, parse_input, parse_queued
from shim.api import videos
from shim.api.dependencies import GetServices, Services, key_name
from shim.api.documented import idempotency_key, submit, within_rate_limit
from shim.api.openai_request import asked_video
from shim.errors import ApiError, ServerErrorCode
from shim.queue.base import NotSupportedError
from shim.queue.job import JobSnapshot, JobState
from shim.tasks import finished_video

#: Milliseconds after which the client asks for a video again.
_POLL_AFTER: Final = "1000"
_EXTENSIONS: Final = {"video": "mp4", "thumbnail": "jpg"}
#: The client sends a request again if it has no answer. Within so many seconds that is the same video.
_RETRY_SECONDS: Final = 15.0
#: The client's newest tasks that a retry may be about.
_RETRIED: Final = 10
_STATUS: Final[Mapping[JobState, Literal["queued", "in_progress", "completed", "failed"]]] = {
    JobState.QUEUED: "queued",
    JobState.RUNNING: "in_progress",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "failed",
}

#: docs/openai.md describes these routes; the OpenAPI document has the documented API alone.
router = APIRouter(prefix="/v1", include_in_schema=False)


class VideoError(BaseModel):
    """Why a video failed. `code` is the documented error code, or "cancelled"."""

    code: str
    message: str


class Video(BaseModel):
    """A task as OpenAI's client reads it. Times are in seconds since the epoch."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str | None = None
    seconds: str
    size: str
    seed: int | None = None
    remixed_from_video_id: str | None = None
    error: VideoError | None = None


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """The answer to a DELETE."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Remix(BaseModel):
    """A new prompt for the settings and the seed of a completed video."""

    prompt: str


class Model(BaseModel):
    """A value of `model`."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "tencent"


class ModelList(BaseModel):
    """The models that this server renders with."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.post("/videos", dependencies=[Depends(within_rate_limit)])
async def create(
    request: Request,
    services: GetServices,
    job_input: Annotated[JobInput, Depends(asked_video)],
    key: Annotated[str | None, Depends(idempotency_key)],
) -> Video:
    """Generate a video. The body is a form or JSON: prompt, model, seconds, size, and every field of POST /generate."""
    earlier = await _retried(request, services, job_input)
    if earlier is not None:
        return _video(earlier, job_input)
    return await _submit(request, services, job_input, key)


@router.post("/videos/{video_id}/remix", dependencies=[Depends(within_rate_limit)])
async def remix(
    video_id: str,
    body: Remix,
    request: Request,
    services: GetServices,
    key: Annotated[str | None, Depends(idempotency_key)],
) -> Video:
    """Generate a video with the settings and the seed of a completed one, and another prompt."""
    manifest = finished_video(await services.tasks.find(video_id))
    asked = {**manifest.input.wire(), "prompt": body.prompt, "seed": manifest.seed}
    return await _submit(request, services, QueuedInput.of(parse_input(asked), remixed_from=video_id), key)


@router.get("/videos")
async def list_videos(
    request: Request,
    services: GetServices,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """The videos of this API key, newest first by default."""
    page = await services.queue.list_jobs(key_name(request), limit=limit, after=after, oldest_first=order == "asc")
    data = [_video(job, _readable(page.inputs[job.task_id])) for job in page.jobs]
    return VideoList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.next_cursor is not None,
    )


@router.get("/videos/{video_id}")
async def retrieve(video_id: str, services: GetServices, response: Response) -> Video:
    """A video. A failed one is an answer, too, and not an error of this request."""
    job = await services.tasks.find(video_id)
    if job.failure is not None and job.failure.error_code is ErrorCode.VIDEO_DELETED:
        finished_video(job)  # raises
    if not job.state.is_terminal:
        response.headers["openai-poll-after-ms"] = _POLL_AFTER
    record = await services.queue.record(video_id) if job.result is None else None
    return _video(job, _readable(record.input) if record is not None else None)


@router.delete("/videos/{video_id}")
async def delete(video_id: str, services: GetServices) -> VideoDeleted:
    """Delete a completed video, or cancel an unfinished one."""
    job = await services.tasks.cancel(video_id)
    if job.result is not None:
        await services.tasks.delete_video(video_id)
    return VideoDeleted(id=video_id)


@router.get("/videos/{video_id}/content", response_class=Response)
async def content(
    video_id: str,
    request: Request,
    services: GetServices,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
) -> Response:
    """The MP4, or as a JPEG its middle frame or sixteen frames."""
    if variant == "spritesheet":
        return await videos.sprite_sheet(video_id, request, services)
    return await videos.video(f"{video_id}.{_EXTENSIONS[variant]}", request, services)


@router.get("/models")
async def models(services: GetServices) -> ModelList:
    """The models that the workers render with."""
    return ModelList(data=[Model(id=name) for name in await _models(services)])


@router.get("/models/{model}")
async def model_named(model: str, services: GetServices) -> Model:
    """One model."""
    if model not in await _models(services):
        raise ApiError(ServerErrorCode.NOT_FOUND, f'there is no model "{model}"')
    return Model(id=model)


async def _models(services: Services) -> list[str]:
    return list((await services.queue.summary()).workers.models) or [DEFAULT_MODEL]


async def _submit(request: Request, services: Services, job_input: JobInput, key: str | None) -> Video:
    accepted = await submit(request, services, job_input, key)
    return _video(JobSnapshot(accepted.task_id, JobState.QUEUED, submitted_at=time.time()), job_input)


async def _retried(request: Request, services: Services, job_input: JobInput) -> JobSnapshot | None:
    """The task of the request that the client sends again, because it has not received the answer.

    OpenAI's client sends no idempotency key. It counts its attempts in a header.
    """
    if request.headers.get("x-stainless-retry-count", "0") == "0":
        return None
    try:
        page = await services.queue.list_jobs(key_name(request), limit=_RETRIED)
    except NotSupportedError:
        return None
    return next(
        (
            job
            for job in page.jobs
            if job.elapsed_time < _RETRY_SECONDS
            and (queued := _readable(page.inputs[job.task_id])) is not None
            and queued.request == job_input
        ),
        None,
    )


def _readable(queued: Any) -> QueuedInput | None:
    """The input as it was queued; None if it came by RunPod's API and is not valid."""
    try:
        return parse_queued(queued)
    except InvalidInputError:
        return None


def _video(job: JobSnapshot, job_input: JobInput | None) -> Video:
    """The task. Without an input (RunPod's queue hides it) the fields that repeat it are empty."""
    remixed_from = job_input.remixed_from if isinstance(job_input, QueuedInput) else None
    if job.result is not None:
        job_input, remixed_from = job.result.input, job.result.remixed_from
    created_at = job.submitted_at
    if created_at is None and job.result is not None:
        created_at = job.result.created_at.timestamp() - job.result.timings.get("total", 0.0)
    if created_at is None:
        created_at = time.time() - job.elapsed_time
    return Video(
        id=job.task_id,
        model=job_input.model if job_input is not None else DEFAULT_MODEL,
        status="failed" if job.failure is not None else _STATUS[job.state],
        progress=100 if job.result is not None else job.progress,
        created_at=int(created_at),
        completed_at=int(job.result.created_at.timestamp()) if job.result is not None else None,
        prompt=job_input.prompt if job_input is not None else None,
        seconds=str(job_input.duration) if job_input is not None else "",
        size="{}x{}".format(*job_input.size) if job_input is not None else "",
        seed=job.result.seed if job.result is not None else job_input.seed if job_input is not None else None,
        remixed_from_video_id=remixed_from,
        error=_error(job),
    )


def _error(job: JobSnapshot) -> VideoError | None:
    if job.failure is None:
        return None
    code = "cancelled" if job.state is JobState.CANCELLED else str(job.failure.error_code)
    return VideoError(code=code, message=job.failure.error)
