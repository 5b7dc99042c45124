"""What becomes of a running job whose worker is lost: completed from the bucket, queued again, or failed.

An attempt is a render that a worker began and lost. A worker has begun a job when its first progress, or a ping that
names the job, has arrived.

| the worker was lost because | it had begun | an attempt is |
|---|---|---|
| its process exited by itself, as its supervisor saw (EXITED) | yes, or no: the job may kill it first | counted |
| its lease expired, or it asked for another job (SILENT) | yes | counted |
| | no: the delivery may not have reached it | not counted, see below |
| it was stopped, or its server ended and it with it (STOPPED) | yes or no | not counted |

A job fails when `max_attempts` are counted. So that no job holds up the queue for ever, it also fails after 10
deliveries in a row that nobody began, not counting those that ended with a server.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, Self

from sqlalchemy import ColumnElement, Row, select, update

from contract.errors import ErrorCode, JobFailure
from contract.log_fields import bound
from shim.queue.base import FindResult
from shim.queue.database import Database, fetch_all
from shim.queue.fair_order import FRONT
from shim.queue.history import NEXT_EVENT, add_events, drop_oldest_events
from shim.queue.job import JobState
from shim.queue.observer import JobObserver
from shim.queue.schema import jobs
from storage.errors import StorageError

#: Stores a job's output: worker_id, task_id, output.
Complete = Callable[[str, str, Any], Awaitable[bool]]
#: The most deliveries in a row that no worker begins.
_MAX_DELIVERIES_NOT_BEGUN: Final = 10

log = logging.getLogger(__name__)


class Loss(Enum):
    """How a worker was lost. The module's table says what follows."""

    EXITED = auto()
    SILENT = auto()
    STOPPED = auto()


@dataclass(frozen=True)
class _Counts:
    """The job's counters after a loss."""

    lost_attempts: int
    deliveries_not_begun: int

    @classmethod
    def after(cls, loss: Loss, job: Row[Any]) -> Self:
        has_begun = job.deliveries_not_begun == 0
        counts = loss is Loss.EXITED or (loss is Loss.SILENT and has_begun)
        not_begun = job.deliveries_not_begun if loss is Loss.SILENT else max(job.deliveries_not_begun - 1, 0)
        return cls(job.lost_attempts + counts, not_begun)


@dataclass(frozen=True)
class LostJobs:
    """Recovers lost jobs. A job fails after `max_attempts`, unless the bucket has its result."""

    database: Database
    find_result: FindResult
    complete: Complete
    max_attempts: int
    observer: JobObserver

    async def recover(self, which: ColumnElement[bool], loss: Loss) -> None:
        """Recovers the running jobs that `which` selects, whose workers were lost in the same way."""
        async with self.database.read() as connection:
            lost = await fetch_all(connection, select(jobs).where(jobs.c.state == JobState.RUNNING, which))
        for job in lost:
            with bound(task_id=job.task_id, worker_id=job.worker_id):
                await self._recover(job, which, loss)

    async def _recover(self, job: Row[Any], which: ColumnElement[bool], loss: Loss) -> None:
        counts = _Counts.after(loss, job)
        error = None if loss is Loss.STOPPED else self._reason_to_fail(counts)
        try:
            result = await self.find_result(job.task_id)
        except StorageError as exc:
            log.warning("cannot tell whether the lost task is complete, the bucket is unavailable: %s", exc)
            if error is not None:
                return  # its video may be complete: the next sweep looks again
            result = None  # the next worker looks for the manifest before it renders
        if result is not None:
            log.info("the result of worker %s was lost; its manifest is in the bucket", job.worker_id)
            await self.complete(job.worker_id, job.task_id, result.model_dump(mode="json"))
        elif error is not None:
            await self._fail(job, which, counts, error)
        else:
            await self._requeue(job, which, counts, is_counted=loss is not Loss.STOPPED)

    def _reason_to_fail(self, counts: _Counts) -> str | None:
        if counts.lost_attempts >= self.max_attempts:
            return f"The worker was lost {counts.lost_attempts} times while it rendered this task"
        if counts.deliveries_not_begun >= _MAX_DELIVERIES_NOT_BEGUN:
            return f"The task was delivered {counts.deliveries_not_begun} times and no worker began it"
        return None

    async def _fail(self, job: Row[Any], which: ColumnElement[bool], counts: _Counts, error: str) -> None:
        failure = JobFailure(error=error, error_code=ErrorCode.GENERATION_FAILED)
        async with self.database.write(notify=True) as connection:
            failed = await self.database.end_jobs(
                connection, JobState.FAILED, *_unchanged(job), which, failure=failure, **vars(counts)
            )
        if failed:
            log.error("failed with %s, HUNYUAN_MAX_ATTEMPTS: %s; see the workers' logs", failure.error_code, error)
            self.observer.ended(JobState.FAILED, failure=failure)

    async def _requeue(self, job: Row[Any], which: ColumnElement[bool], counts: _Counts, *, is_counted: bool) -> None:
        values = {"turn": FRONT, "worker_id": None, "lease_expires_at": None, "last_event": NEXT_EVENT, **vars(counts)}
        async with self.database.write(notify=True) as connection:
            requeued = await connection.execute(
                update(jobs).where(*_unchanged(job), which).values(state=JobState.QUEUED, **values)
            )
            if requeued.rowcount:
                await add_events(connection, self.database.clock(), jobs.c.seq == job.seq)
                await drop_oldest_events(connection, jobs.c.seq == job.seq)
        if requeued.rowcount:
            log.warning(
                "worker %s was lost, the task is queued again; lost attempts: %d", job.worker_id, counts.lost_attempts
            )
            if is_counted:
                self.observer.requeued()


def running_on(worker_id: str) -> tuple[ColumnElement[bool], ...]:
    """Selects the jobs that run on that worker."""
    return jobs.c.state == JobState.RUNNING, jobs.c.worker_id == worker_id


def _unchanged(job: Row[Any]) -> tuple[ColumnElement[bool], ...]:
    """Selects the job unless another call has ended, requeued or taken it since it was read."""
    return *running_on(job.worker_id), jobs.c.task_id == job.task_id, jobs.c.attempts == job.attempts
