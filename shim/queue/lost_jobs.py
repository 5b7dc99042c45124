"""What becomes of a running job whose worker is lost: completed from the bucket, queued again, or failed."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, select, update

from contract.errors import ErrorCode, JobFailure
from contract.log_fields import bound
from shim.queue.base import FindResult, JobObserver, JobState
from shim.queue.database import Database, fetch_all
from shim.queue.schema import jobs
from storage.errors import StorageError

#: Stores a job's output: worker_id, task_id, output.
Complete = Callable[[str, str, Any], Awaitable[bool]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LostJobs:
    """Recovers lost jobs. A job fails after `max_attempts`, unless the bucket has its result."""

    database: Database
    find_result: FindResult
    complete: Complete
    max_attempts: int
    observer: JobObserver

    async def recover(self, which: ColumnElement[bool], *, count_attempt: bool = True) -> None:
        """Recovers the running jobs that `which` selects. `count_attempt=False` leaves their attempts uncounted."""
        async with self.database.read() as connection:
            lost = await fetch_all(connection, select(jobs).where(jobs.c.state == JobState.RUNNING, which))
        for job in lost:
            with bound(task_id=job.task_id, worker_id=job.worker_id):
                await self._recover(job, which, count_attempt)

    async def _recover(self, job: Row[Any], which: ColumnElement[bool], count_attempt: bool) -> None:
        must_fail = count_attempt and job.attempts >= self.max_attempts
        try:
            result = await self.find_result(job.task_id)
        except StorageError as exc:
            log.warning("cannot tell whether the lost task is complete, the bucket is unavailable: %s", exc)
            if must_fail:
                return  # its video may be complete: the next sweep looks again
            result = None  # the next worker looks for the manifest before it renders
        if result is not None:
            log.info("the result of worker %s was lost; its manifest is in the bucket", job.worker_id)
            await self.complete(job.worker_id, job.task_id, result.model_dump(mode="json"))
        elif must_fail:
            await self._fail(job, which)
        else:
            await self._requeue(job, which, count_attempt)

    async def _fail(self, job: Row[Any], which: ColumnElement[bool]) -> None:
        error = f"The worker was lost {job.attempts} times while it rendered this task"
        failure = JobFailure(error=error, error_code=ErrorCode.GENERATION_FAILED)
        async with self.database.write(notify=True) as connection:
            failed = await self.database.end_jobs(connection, JobState.FAILED, *_unchanged(job), which, failure=failure)
        if failed:
            log.error(
                "failed with %s, given up after %d attempts (HUNYUAN_MAX_ATTEMPTS): each worker was lost, see its log",
                failure.error_code,
                job.attempts,
            )
            self.observer.ended(JobState.FAILED, failure=failure)

    async def _requeue(self, job: Row[Any], which: ColumnElement[bool], count_attempt: bool) -> None:
        attempts = jobs.c.attempts if count_attempt else jobs.c.attempts - 1
        async with self.database.write(notify=True) as connection:
            requeued = await connection.execute(
                update(jobs)
                .where(*_unchanged(job), which)
                .values(state=JobState.QUEUED, worker_id=None, lease_expires_at=None, attempts=attempts)
            )
        if requeued.rowcount:
            log.warning("worker %s was lost, the task is queued again", job.worker_id)
            if count_attempt:
                self.observer.requeued()


def running_on(worker_id: str) -> tuple[ColumnElement[bool], ...]:
    """Selects the jobs that run on that worker."""
    return jobs.c.state == JobState.RUNNING, jobs.c.worker_id == worker_id


def _unchanged(job: Row[Any]) -> tuple[ColumnElement[bool], ...]:
    """Selects the job unless another call has ended, requeued or taken it since it was read."""
    return *running_on(job.worker_id), jobs.c.task_id == job.task_id, jobs.c.attempts == job.attempts
