"""The outbox of the bucket: ended jobs whose objects do not agree with their end yet.

The transaction that ends a job without a video puts it in, so a server that is killed, or a bucket that is away, delays
the change in the bucket and never loses it. `bucket_due_at` is when the job is due; None is the normal state.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, Update, case, null, or_, select, update

from contract.log_fields import bound
from shim.queue.base import QueueUnavailableError, TaskObjects
from shim.queue.database import Database
from shim.queue.job import JobState
from shim.queue.reader import snapshot
from shim.queue.schema import jobs
from storage.errors import StorageError

#: Seconds for which the server that works a job off keeps the others from it. Longer than its requests can take.
_CLAIM: Final = 180.0
#: Seconds until the next try after the bucket has failed.
_RETRY: Final = 5.0
#: The most jobs that one call works off.
_LIMIT: Final = 100
#: Seconds that a retried job waits for the server that works it off.
_REOPEN_WAIT: Final = 10.0

log = logging.getLogger(__name__)


def put_in_outbox(now: float, *which: ColumnElement[bool]) -> Update:
    """Makes the ended jobs that `which` selects due now, or as soon as the server that works one off is done."""
    due = jobs.c.bucket_due_at
    return (
        update(jobs)
        .where(jobs.c.state.not_in((JobState.QUEUED, JobState.RUNNING)), *which)
        .values(bucket_due_at=case((due > now, due + 0.001), else_=now))
    )


@dataclass(frozen=True)
class Outbox:
    """Works the outbox off. Any number of servers may."""

    database: Database
    objects: TaskObjects

    async def work_off(self) -> None:
        """Makes the bucket agree with every job that is due. Stops at the first failure of the bucket."""
        for _ in range(_LIMIT):
            job = await self._claim_next()
            if job is None:
                return
            with bound(task_id=job.task_id):
                try:
                    await self.objects.settle(snapshot(job, self.database.clock()))
                except StorageError as exc:
                    log.warning("cannot store how this task ended, retrying in %.0f s: %s", _RETRY, exc)
                    await self._release(job, self.database.clock() + _RETRY)
                    return
                await self._release(job, None)

    async def reopen(self, task_id: str) -> None:
        """Deletes the tombstone of a failed job. `SqlQueue.retry` must follow within three minutes.

        Raises:
            QueueUnavailableError: another server has worked on the job's objects for 10 s.
            StorageError: the bucket is unavailable.
        """
        deadline = time.monotonic() + _REOPEN_WAIT
        while True:
            async with self.database.write() as connection:
                now = self.database.clock()
                free = or_(jobs.c.bucket_due_at.is_(None), jobs.c.bucket_due_at <= now)
                claimed = await connection.execute(
                    update(jobs).where(_is_failed(task_id), free).values(bucket_due_at=now + _CLAIM)
                )
                failed = await connection.scalar(select(jobs.c.seq).where(_is_failed(task_id)))
            if failed is None:
                return
            if claimed.rowcount:
                break
            if time.monotonic() > deadline:
                raise QueueUnavailableError("The end of this task is being stored; try again in some seconds")
            await asyncio.sleep(0.1)
        await self.objects.reopen(task_id)

    async def _claim_next(self) -> Row[Any] | None:
        now = self.database.clock()
        due = select(jobs.c.task_id).where(jobs.c.bucket_due_at <= now).order_by(jobs.c.bucket_due_at).limit(1)
        return await self.database.claim_next(due, {"bucket_due_at": now + _CLAIM})

    async def _release(self, job: Row[Any], due_at: float | None) -> None:
        """The job leaves the outbox, or is due again: at `due_at`, or now if it was put in again meanwhile."""
        claim, due = job.bucket_due_at, jobs.c.bucket_due_at
        left = null() if due_at is None else due_at
        async with self.database.write() as connection:
            await connection.execute(
                update(jobs)
                .where(jobs.c.task_id == job.task_id, due >= claim, due < claim + 1)
                .values(bucket_due_at=case((due == claim, left), else_=self.database.clock()))
            )


def _is_failed(task_id: str) -> ColumnElement[bool]:
    return (jobs.c.task_id == task_id) & (jobs.c.state == JobState.FAILED)
