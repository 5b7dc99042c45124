"""The REST side of our own job queue, in a SQL database: SQLite on one machine, PostgreSQL for many."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from contract.errors import ErrorCode, JobFailure
from contract.job import InvalidInputError, JobInput, Resolution, parse_input
from contract.result import Stage
from contract.worker import WorkerReport, WorkerState
from shim.queue.base import (
    NO_VIDEO,
    Backlog,
    Idempotency,
    Job,
    JobObserver,
    JobState,
    ModelNotLoadedError,
    QueueFullError,
    RenderTimes,
    Workers,
)
from shim.queue.database import Database, end, fetch_all, fetch_one
from shim.queue.schema import jobs, outcomes, render_times, valid_manifest, workers

log = logging.getLogger(__name__)


class SqlQueue:
    """A `JobQueue` over `database`, which is the caller's to close. At most `max_queue_size` jobs wait."""

    def __init__(self, database: Database, *, max_queue_size: int = 10, observer: JobObserver | None = None) -> None:
        self._database = database
        self._max_queue_size = max_queue_size
        self._observer = observer or JobObserver()

    async def close(self) -> None:
        """Let go of the database."""
        await self._database.close()

    async def submit(self, job_input: JobInput, idempotency: Idempotency | None = None) -> Job:
        """Queue a job, if a worker has the model loaded and there is room. See `JobQueue.submit`."""
        async with self._database.write(rings=True) as connection:
            await self._database.admit_one_by_one(connection)
            if idempotency is not None and (before := await self._submitted(connection, idempotency)) is not None:
                return before
            await self._check_ready(connection)
            position = await self._check_room(connection)
            task_id = await self._insert(connection, job_input.wire(), {}, idempotency)
        self._observer.submitted()
        return Job(task_id, JobState.QUEUED, queue_position=position)

    async def enqueue(self, payload: Any, extras: Mapping[str, Any]) -> str:
        """Queue a job as RunPod's /run does: any input, whether or not there are workers. Its task_id.

        Raises:
            QueueFullError: as many jobs wait as may wait.
        """
        async with self._database.write(rings=True) as connection:
            await self._database.admit_one_by_one(connection)
            await self._check_room(connection)
            task_id = await self._insert(connection, payload, extras)
        self._observer.submitted()
        return task_id

    async def get(self, task_id: str) -> Job | None:
        """The job as of now."""
        async with self._database.read() as connection:
            return await self._find(connection, jobs.c.task_id == task_id)

    async def output(self, task_id: str) -> Any:
        """What the job returned, word for word; None before it did."""
        async with self._database.read() as connection:
            return await connection.scalar(select(jobs.c.output).where(jobs.c.task_id == task_id))

    async def cancel(self, task_id: str) -> Job | None:
        """Stop a waiting or running job. The worker of a running one is told through `stops`."""
        failure = JobFailure(error="The task was cancelled", error_code=ErrorCode.CANCELLED)
        async with self._database.write(rings=True) as connection:
            cancelled = await end(
                connection,
                self._database.clock(),
                JobState.CANCELLED,
                jobs.c.task_id == task_id,
                failure=failure.model_dump(mode="json"),
                stop_requested=jobs.c.state == JobState.RUNNING,
            )
            job = await self._find(connection, jobs.c.task_id == task_id)
        if cancelled:
            log.info("%s: cancelled", task_id, extra={"task_id": task_id})
            self._observer.ended(JobState.CANCELLED, failure=failure)
        return job

    async def purge(self) -> int:
        """Cancel every waiting job; how many there were."""
        failure = JobFailure(error="The queue was purged", error_code=ErrorCode.CANCELLED)
        async with self._database.write() as connection:
            await self._database.admit_one_by_one(connection)
            cancelled = await end(
                connection,
                self._database.clock(),
                JobState.CANCELLED,
                jobs.c.state == JobState.QUEUED,
                failure=failure.model_dump(mode="json"),
            )
        log.info("the queue was purged of %d tasks", cancelled)
        self._observer.ended(JobState.CANCELLED, failure=failure, count=cancelled)
        return cancelled

    async def retry(self, task_id: str) -> bool:
        """Queue a failed job again, with no attempt counted; False if it has not failed.

        Raises:
            QueueFullError: as many jobs wait as may wait.
        """
        async with self._database.write(rings=True) as connection:
            await self._database.admit_one_by_one(connection)
            await self._check_room(connection)
            result = await connection.execute(
                update(jobs)
                .where(jobs.c.task_id == task_id, jobs.c.state == JobState.FAILED)
                .values(state=JobState.QUEUED, failure=None, attempts=0, progress=0, stage=None, finished_at=None)
            )
        return result.rowcount > 0

    async def backlog(self) -> Backlog:
        """What is waiting and running, in the order it was submitted."""
        async with self._database.read() as connection:
            rows = [
                await fetch_all(connection, select(jobs.c.input).where(jobs.c.state == state).order_by(jobs.c.seq))
                for state in (JobState.QUEUED, JobState.RUNNING)
            ]
            ready = await connection.scalar(
                select(func.count())
                .select_from(workers)
                .where(self._database.is_alive(), workers.c.state == WorkerState.READY)
            )
        waiting, running = ([_valid_input(row.input) for row in part] for part in rows)
        return Backlog(waiting, running, ready or 0)

    async def render_times(self) -> RenderTimes:
        """Mean seconds of the last twenty or so renders of each kind."""
        async with self._database.read() as connection:
            rows = await fetch_all(connection, select(render_times))
        return {(row.model, Resolution(row.resolution), row.duration): row.mean for row in rows}

    async def check_ready(self) -> None:
        """Raise ModelNotLoadedError unless a worker has the model loaded."""
        async with self._database.read() as connection:
            await self._check_ready(connection)

    async def workers(self) -> Workers:
        """The workers that were seen lately."""
        async with self._database.read() as connection:
            return await self._workers(connection)

    async def ended(self) -> Mapping[JobState, int]:
        """How many jobs have ended in each way."""
        async with self._database.read() as connection:
            rows = await fetch_all(connection, select(outcomes))
        return {JobState(row.state): row.total for row in rows}

    async def _submitted(self, connection: AsyncConnection, idempotency: Idempotency) -> Job | None:
        which = jobs.c.idempotency_key == idempotency.key
        row = await fetch_one(connection, select(jobs.c.fingerprint).where(which))
        if row is None:
            return None
        idempotency.check(row.fingerprint)
        return await self._find(connection, which)

    async def _find(self, connection: AsyncConnection, which: ColumnElement[bool]) -> Job | None:
        row = await fetch_one(connection, select(jobs).where(which))
        if row is None:
            return None
        position = await self._position(connection, row) if row.state == JobState.QUEUED else None
        return self._job(row, position)

    async def _insert(
        self,
        connection: AsyncConnection,
        payload: Any,
        extras: Mapping[str, Any],
        idempotency: Idempotency | None = None,
    ) -> str:
        task_id = str(uuid.uuid4())
        await connection.execute(
            insert(jobs).values(
                task_id=task_id,
                state=JobState.QUEUED,
                input=payload,
                extras=dict(extras) or None,
                created_at=self._database.clock(),
                idempotency_key=idempotency.key if idempotency else None,
                fingerprint=idempotency.fingerprint if idempotency else None,
            )
        )
        return task_id

    async def _check_room(self, connection: AsyncConnection) -> int:
        """The position that a job submitted now would have."""
        waiting = await connection.scalar(select(func.count()).select_from(jobs).where(jobs.c.state == JobState.QUEUED))
        if (waiting or 0) >= self._max_queue_size:
            raise QueueFullError(f"The queue is full: {waiting} tasks are waiting")
        return (waiting or 0) + 1

    async def _check_ready(self, connection: AsyncConnection) -> None:
        seen = await self._workers(connection)
        if seen.ready:
            return
        if seen.loading:
            raise ModelNotLoadedError("Model not loaded yet: a worker is loading it")
        reasons = [report.error for report in seen.reports if report.error]
        raise ModelNotLoadedError(f"Model not loaded: {reasons[0] if reasons else 'no worker is running'}")

    async def _workers(self, connection: AsyncConnection) -> Workers:
        rows = await fetch_all(
            connection, select(workers).where(self._database.is_alive()).order_by(workers.c.worker_id)
        )
        states = [row.state for row in rows]
        return Workers(
            ready=states.count(WorkerState.READY),
            loading=states.count(WorkerState.LOADING),
            failed=states.count(WorkerState.FAILED),
            reports_by_id={
                row.worker_id: WorkerReport.model_validate(row.report) for row in rows if row.report is not None
            },
        )

    async def _position(self, connection: AsyncConnection, row: Row[Any]) -> int:
        ahead = select(func.count()).select_from(jobs).where(jobs.c.state == JobState.QUEUED, jobs.c.seq <= row.seq)
        return await connection.scalar(ahead) or 0

    def _job(self, row: Row[Any], position: int | None) -> Job:
        state = JobState(row.state)
        result = valid_manifest(row.output) if state is JobState.COMPLETED else None
        failure = JobFailure.model_validate(row.failure) if row.failure is not None else None
        if state is JobState.COMPLETED and result is None:
            failure = NO_VIDEO
        return Job(
            task_id=row.task_id,
            state=state,
            progress=row.progress if state is JobState.COMPLETED else min(row.progress, 99),
            stage=Stage(row.stage) if row.stage and state is not JobState.QUEUED else Stage.QUEUED,
            elapsed_time=max((row.finished_at or self._database.clock()) - row.created_at, 0.0),
            queue_position=position,
            result=result,
            failure=failure,
        )


def _valid_input(payload: Any) -> JobInput | None:
    try:
        return parse_input(payload)
    except InvalidInputError:
        return None
