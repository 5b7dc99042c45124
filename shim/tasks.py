"""Tasks: what the REST API calls a job. The queue knows it while it lives, the bucket for as long as it is kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import anyio.to_thread

from contract.job import KNOWN_MODELS, JobInput, check_offered
from contract.log_fields import bind
from contract.result import JobResult, Manifest, Stage
from shim.estimates import estimated_time
from shim.queue.base import Idempotency, Job, JobQueue, JobState, QueueUnavailableError
from storage import layout
from storage.bucket import Bucket
from storage.errors import StorageError
from storage.videos import Videos

log = logging.getLogger(__name__)


class TaskNotFoundError(LookupError):
    """No task has that id."""


@dataclass(frozen=True)
class Accepted:
    """A task that was queued. `estimated_time` in seconds."""

    task_id: str
    estimated_time: int


class StoredVideos:
    """`storage.videos` for coroutines: each call runs in a thread."""

    def __init__(self, bucket: Bucket) -> None:
        self._videos = Videos(bucket)

    async def find(self, task_id: str) -> Manifest | None:
        return await anyio.to_thread.run_sync(self._videos.find, task_id)

    async def find_result(self, task_id: str) -> JobResult | None:
        return await anyio.to_thread.run_sync(self._videos.find_result, task_id)

    async def discard(self, task_id: str) -> None:
        """Deletes what a cancelled task left. A bucket that does not answer keeps it: a warning says so."""
        try:
            await anyio.to_thread.run_sync(self._videos.discard, task_id)
        except StorageError as exc:
            log.warning("the objects of the cancelled task stay in the bucket: %s", exc, extra={"task_id": task_id})


class Tasks:
    """Submit, look up and cancel look up tasks over a queue and a bucket; the truth stays with those two."""

    def __init__(self, queue: JobQueue, videos: StoredVideos) -> None:
        self._queue = queue
        self._videos = videos

    async def submit(self, job_input: JobInput, idempotency_key: str | None = None) -> Accepted:
        """Queue a job, unless it was queued under the same key before, and say when it will be done.

        Raises what `JobQueue.submit` raises, and:

        Raises:
            InvalidInputError: no worker has the weights for what was asked for.
        """
        workers = await self._queue.workers()
        check_offered(job_input, workers.models or KNOWN_MODELS, takes_images=workers.takes_images)
        backlog = await self._queue.backlog()
        observed = await self._queue.render_times()
        idempotency = Idempotency.of(idempotency_key, job_input) if idempotency_key is not None else None
        job = await self._queue.submit(job_input, idempotency)
        bind(task_id=job.task_id)
        kind = job_input.model, job_input.resolution, job_input.duration
        log.info("%s: accepted: %s, %s, %d s", job.task_id, *kind, extra={"prompt": job_input.prompt})
        return Accepted(job.task_id, estimated_time(job_input, backlog, observed))

    async def cancel(self, task_id: str) -> Job:
        """Stop a waiting or running task and remove what it left in the bucket; a finished one stays as it is.

        Raises:
            TaskNotFoundError: nobody knows it.
            QueueUnavailableError, StorageError: whoever may know it can't be asked.
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

    async def find(self, task_id: str) -> Job:
        """The task as of now. A finished one that the queue has forgotten is in the bucket.

        While the queue can't be asked nobody knows whether it has ended: a video may be stored, and its task not yet
        be completed.

        Raises:
            TaskNotFoundError: nobody knows it.
            QueueUnavailableError, StorageError: whoever may know it can't be asked.
        """
        if not layout.is_task_id(task_id):
            raise TaskNotFoundError(task_id)
        bind(task_id=task_id)
        job = await self._queue.get(task_id) or await self._stored(task_id)
        if job is None:
            raise TaskNotFoundError(task_id)
        return job

    async def find_video(self, task_id: str) -> Job:
        """As `find`; but what is in the bucket is served while the queue can't be asked, too."""
        try:
            return await self.find(task_id)
        except QueueUnavailableError:
            job = await self._stored(task_id)
            if job is None:
                raise
            return job

    async def _stored(self, task_id: str) -> Job | None:
        manifest = await self._videos.find(task_id)
        if manifest is None:
            return None
        return Job(task_id, JobState.COMPLETED, progress=100, stage=Stage.STORING, result=manifest)
