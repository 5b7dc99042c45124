"""Tasks: what the REST API calls jobs. The queue has the recent ones, the bucket a verdict of every ended one."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final

import anyio.to_thread

from contract import tracing
from contract.errors import VIDEO_DELETED, ErrorCode, JobFailure
from contract.job import InvalidInputError, JobInput, QueuedInput
from contract.log_fields import bind
from contract.result import JobResult, Manifest, Stage, Tombstone, Verdict
from shim.queue.base import Idempotency, JobQueue, QueueUnavailableError, Submission, render_kind
from shim.queue.estimates import estimated_time
from shim.queue.job import JobSnapshot, JobState
from shim.rewrite import Rewriter
from storage import layout
from storage.bucket import Bucket, ObjectInfo
from storage.errors import StorageError
from storage.images import Images
from storage.videos import Videos

_NO_REWRITER: Final = JobFailure(
    error="enhance_prompt: this server rewrites no prompts, HUNYUAN_REWRITE_BASE_URL is not set; leave the field out",
    error_code=ErrorCode.INVALID_REQUEST,
)

#: `JobQueue.submit` with the client and the webhook of a request.
_Submit = Callable[[JobInput, Idempotency | None, Callable[[], None] | None], Awaitable[Submission]]

log = logging.getLogger(__name__)


class _AcceptableError(Exception):
    """The request is new and nothing speaks against it. Raised by a `check` in place of queueing it."""


class TaskNotFoundError(LookupError):
    """Neither the queue nor the bucket has a task with that id."""


class NoVideoError(Exception):
    """The task has no video: it is not finished, or it failed."""


class VideoDeletedError(NoVideoError):
    """The task's video was deleted."""


class NotRetryableError(Exception):
    """The task cannot be queued again; the message says why."""


def finished_video(job: JobSnapshot) -> Manifest:
    """The manifest of a completed task. Raises NoVideoError or VideoDeletedError."""
    if job.result is not None:
        return job.result
    if job.failure is None:
        raise NoVideoError(f"The video is not ready: {job.progress} % done")
    if job.failure.error_code is ErrorCode.VIDEO_DELETED:
        raise VideoDeletedError(job.failure.error)
    raise NoVideoError(f"The task failed, there is no video: {job.failure.error}")


@dataclass(frozen=True)
class Accepted:
    """A queued task. `estimated_time` is in seconds."""

    task_id: str
    estimated_time: int


class StoredVideos:
    """`storage.videos.Videos` for coroutines: each call runs in a thread."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._videos = Videos(bucket)

    async def find_result(self, task_id: str) -> JobResult | None:
        return await anyio.to_thread.run_sync(self._videos.find_result, task_id)

    async def find_verdict(self, task_id: str) -> Verdict | None:
        return await anyio.to_thread.run_sync(self._videos.find_verdict, task_id)

    async def settle(self, job: JobSnapshot) -> None:
        """Makes the bucket agree with an ended job: its verdict, and no objects of other attempts."""
        if job.result is not None:
            await anyio.to_thread.run_sync(self._videos.keep_only, job.result)
        elif job.failure == VIDEO_DELETED:
            await self.discard(job.task_id)
        elif job.failure is not None and job.state is not JobState.COMPLETED:
            tombstone = Tombstone.of(job.task_id, job.failure, cancelled=job.state is JobState.CANCELLED)
            await anyio.to_thread.run_sync(self._videos.bury, tombstone)

    async def reopen(self, task_id: str) -> None:
        """Deletes the tombstone of a failed job that will be rendered again."""
        await anyio.to_thread.run_sync(self._videos.reopen, task_id)

    async def list_objects(self, start_after: str, limit: int) -> Sequence[ObjectInfo]:
        """The next objects of tasks, in the order of their keys."""
        listing = partial(self._bucket.list_objects, layout.PREFIX, start_after=start_after, limit=limit)
        return await anyio.to_thread.run_sync(listing)

    async def discard(self, task_id: str) -> None:
        """Deletes all of a task's objects."""
        await anyio.to_thread.run_sync(self._videos.discard, task_id)

    async def delete(self, key: str) -> None:
        await anyio.to_thread.run_sync(self._bucket.delete, key)


class StoredImages:
    """`storage.images.Images` for coroutines: each call runs in a thread."""

    def __init__(self, bucket: Bucket) -> None:
        self._images = Images(bucket)

    async def put(self, body: bytes, content_type: str) -> tuple[str, datetime]:
        return await anyio.to_thread.run_sync(partial(self._images.put, body, content_type=content_type))

    async def is_available(self, image_id: str) -> bool:
        return await anyio.to_thread.run_sync(self._images.is_available, image_id)

    async def delete_expired(self) -> bool:
        return await anyio.to_thread.run_sync(self._images.delete_expired)


class Tasks:
    """Submits, finds and cancels tasks. Keeps no state: the queue and the bucket do."""

    def __init__(
        self,
        queue: JobQueue,
        videos: StoredVideos,
        images: StoredImages | None = None,
        rewriter: Rewriter | None = None,
    ) -> None:
        self._queue = queue
        self._videos = videos
        self._images = images
        self._rewriter = rewriter

    async def submit(
        self,
        job_input: JobInput,
        idempotency_key: str | None = None,
        check: Callable[[], None] | None = None,
        *,
        client: str = "",
        webhook_url: str | None = None,
    ) -> Accepted:
        """Queues a job, unless an earlier request had the same key, and estimates when it is done.

        `client` is the name of the API key of the request, empty on a server without keys. `webhook_url` gets a POST
        when the task has ended.

        Raises what `JobQueue.submit` and `check` raise, which is called before a job is queued; InvalidInputError for
        a prompt that this server can't enhance, and for an uploaded image that expired or never existed.
        """
        await self._check_upload(job_input.upload_id)
        idempotency = None
        if idempotency_key is not None:
            idempotency = Idempotency.of(idempotency_key, job_input, webhook_url)
        submit = self._submit_rewritten if job_input.enhance_prompt else self._submit
        send = partial(self._queue.submit, client=client, webhook_url=webhook_url)
        with tracing.span("submit"):
            submission = await submit(send, job_input, idempotency, check)
        bind(task_id=submission.task_id)
        log.info("accepted: %s, %s, %d s", *render_kind(job_input), extra={"prompt": job_input.prompt})
        return Accepted(submission.task_id, estimated_time(job_input, submission.backlog, submission.render_times))

    async def _check_upload(self, image_id: str | None) -> None:
        if image_id is None or self._images is None or await self._images.is_available(image_id):
            return
        text = "image: this uploaded image has expired or was never stored; upload it again"
        raise InvalidInputError(JobFailure(error=text, error_code=ErrorCode.INVALID_REQUEST))

    async def _submit(
        self, send: _Submit, job_input: JobInput, idempotency: Idempotency | None, check: Callable[[], None] | None
    ) -> Submission:
        """Queues the job; its spans will belong to the trace of this request."""
        if (traceparent := tracing.traceparent()) is not None:
            job_input = QueuedInput.of(job_input, traceparent=traceparent)
        return await send(job_input, idempotency, check)

    async def _submit_rewritten(
        self, send: _Submit, job_input: JobInput, idempotency: Idempotency | None, check: Callable[[], None] | None
    ) -> Submission:
        """Queues the job with a rewritten prompt. No transaction is open while the rewriter works.

        A repeated request, and one that is refused, costs no rewriting. The job keeps the key of the request itself.
        """
        if self._rewriter is None:
            raise InvalidInputError(_NO_REWRITER)

        def stop_before_queueing() -> None:
            if check is not None:
                check()
            raise _AcceptableError

        try:
            return await send(job_input, idempotency, stop_before_queueing)
        except _AcceptableError:
            queued = await self._rewriter.rewrite(job_input)
        return await self._submit(send, queued, idempotency, None)

    async def cancel(self, task_id: str) -> JobSnapshot:
        """Cancels a waiting or running task and deletes its objects. A finished task stays unchanged.

        Raises:
            TaskNotFoundError: neither the queue nor the bucket has it.
            QueueUnavailableError, StorageError: the queue or the bucket is unavailable.
        """
        if not layout.is_task_id(task_id):
            raise TaskNotFoundError(task_id)
        bind(task_id=task_id)
        job = await self._queue.cancel(task_id)
        if job is None:
            return await self.find(task_id)
        if job.state is JobState.CANCELLED:
            await self._bury(job)
        return job

    async def retry(self, task_id: str, check: Callable[[], None] | None = None) -> JobSnapshot:
        """Queues a failed task again, under its id. A waiting or running one stays as it is: the request may be a
        repetition. `check` is called before the task is queued, and may raise.

        Raises:
            NotRetryableError: the task is completed or cancelled, or the queue has deleted it.
            TaskNotFoundError: neither the queue nor the bucket has it.
            ModelNotLoadedError, QueueFullError: as for a new task.
            QueueUnavailableError, StorageError: the queue or the bucket is unavailable.
        """
        job = await self.find(task_id)
        if job.state is JobState.FAILED:
            await self._queue.check_ready()
            if check is not None:
                check()
            if await self._queue.retry(task_id, self._videos):
                log.info("queued again by a client")
            elif (await self.find(task_id)).state is JobState.FAILED:
                raise NotRetryableError("The queue has deleted this task; submit it again")
            return await self.find(task_id)
        if job.state.is_terminal:
            what = "was cancelled" if job.state is JobState.CANCELLED else "is completed"
            raise NotRetryableError(f"Only a failed task can be retried, and this one {what}; submit it again")
        return job

    async def _bury(self, job: JobSnapshot) -> None:
        """Stores that the task was cancelled, so that its worker stops. The outbox does so again until it succeeds."""
        try:
            await self._videos.settle(job)
        except StorageError as exc:
            log.warning("cannot store yet that this task was cancelled, its objects remain until then: %s", exc)

    async def delete_video(self, task_id: str) -> None:
        """Deletes a completed task's video, poster and manifest. The task's failure is VIDEO_DELETED from then on.

        While the bucket is unavailable, the objects of a task that the queue still has are deleted later.

        Raises:
            NoVideoError: the task is not finished, failed, or its video was deleted before.
            TaskNotFoundError: neither the queue nor the bucket has it.
            QueueUnavailableError, StorageError: the queue or the bucket is unavailable.
        """
        finished_video(await self.find(task_id))
        in_queue = await self._queue.delete_video(task_id)
        try:
            await self._videos.discard(task_id)
        except StorageError as exc:
            if not in_queue:
                raise
            log.warning("cannot delete the objects of this task's video yet, retrying: %s", exc)
        log.info("the video is deleted")

    async def find(self, task_id: str) -> JobSnapshot:
        """The task as it is now, from the queue, or from the bucket if the queue has deleted it.

        Without the queue the bucket is not read: a video may be stored whose task is not completed yet.

        Raises:
            TaskNotFoundError: neither the queue nor the bucket has it.
            QueueUnavailableError, StorageError: the queue or the bucket is unavailable.
        """
        if not layout.is_task_id(task_id):
            raise TaskNotFoundError(task_id)
        bind(task_id=task_id)
        job = await self._queue.get(task_id) or await self._stored(task_id)
        if job is None:
            raise TaskNotFoundError(task_id)
        return job

    async def find_video(self, task_id: str) -> JobSnapshot:
        """Like `find`, but finds a stored video while the queue is unavailable, too."""
        try:
            return await self.find(task_id)
        except QueueUnavailableError:
            job = await self._stored(task_id)
            if job is None:
                raise
            return job

    async def _stored(self, task_id: str) -> JobSnapshot | None:
        verdict = await self._videos.find_verdict(task_id)
        match verdict:
            case None:
                return None
            case Manifest():
                return JobSnapshot(task_id, JobState.COMPLETED, progress=100, stage=Stage.STORING, result=verdict)
            case Tombstone():
                return JobSnapshot(task_id, JobState(verdict.status), failure=verdict.failure)
