"""Tasks: what the REST API calls jobs. The queue has the recent ones, the bucket every finished video."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import anyio.to_thread

from contract.job import JobInput
from contract.log_fields import bind
from contract.result import JobResult, Manifest, Stage
from shim.estimates import estimated_time
from shim.queue.base import Idempotency, JobQueue, JobSnapshot, JobState, QueueUnavailableError, render_kind
from storage import layout
from storage.bucket import Bucket
from storage.errors import StorageError
from storage.videos import Videos

log = logging.getLogger(__name__)


class TaskNotFoundError(LookupError):
    """Neither the queue nor the bucket has a task with that id."""


@dataclass(frozen=True)
class Accepted:
    """A queued task. `estimated_time` is in seconds."""

    task_id: str
    estimated_time: int


class StoredVideos:
    """`storage.videos.Videos` for coroutines: each call runs in a thread."""

    def __init__(self, bucket: Bucket) -> None:
        self._videos = Videos(bucket)

    async def find(self, task_id: str) -> Manifest | None:
        return await anyio.to_thread.run_sync(self._videos.find, task_id)

    async def find_result(self, task_id: str) -> JobResult | None:
        return await anyio.to_thread.run_sync(self._videos.find_result, task_id)

    async def discard(self, task_id: str) -> None:
        """Deletes a cancelled task's objects; logs a warning if the bucket is unavailable."""
        try:
            await anyio.to_thread.run_sync(self._videos.discard, task_id)
        except StorageError as exc:
            log.warning("cannot delete the cancelled task's objects, delete them from the bucket by hand: %s", exc)


class Tasks:
    """Submits, finds and cancels tasks. Keeps no state: the queue and the bucket do."""

    def __init__(self, queue: JobQueue, videos: StoredVideos) -> None:
        self._queue = queue
        self._videos = videos

    async def submit(
        self, job_input: JobInput, idempotency_key: str | None = None, check: Callable[[], None] | None = None
    ) -> Accepted:
        """Queues a job, unless an earlier request had the same key, and estimates when it is done.

        Raises what `JobQueue.submit` and `check` raise, which is called before a job is queued.
        """
        idempotency = Idempotency.of(idempotency_key, job_input) if idempotency_key is not None else None
        submission = await self._queue.submit(job_input, idempotency, check)
        bind(task_id=submission.task_id)
        log.info("accepted: %s, %s, %d s", *render_kind(job_input), extra={"prompt": job_input.prompt})
        return Accepted(submission.task_id, estimated_time(job_input, submission.backlog, submission.render_times))

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
            await self._videos.discard(task_id)
        return job

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
        manifest = await self._videos.find(task_id)
        if manifest is None:
            return None
        return JobSnapshot(task_id, JobState.COMPLETED, progress=100, stage=Stage.STORING, result=manifest)
