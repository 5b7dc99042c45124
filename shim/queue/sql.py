"""The server's own job queue in a SQL database: SQLite on one machine, PostgreSQL for several servers."""

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from contract.errors import TASK_CANCELLED, VIDEO_DELETED, ErrorCode, JobFailure
from contract.job import KNOWN_MODELS, InvalidInputError, JobInput, Resolution, parse_queued
from contract.offer import check_offered
from shim.queue.base import (
    NO_WEBHOOKS,
    Backlog,
    Idempotency,
    ModelNotLoadedError,
    QueueFullError,
    QueueSummary,
    RenderTimes,
    Submission,
    TaskObjects,
    Workers,
)
from shim.queue.database import Database, fetch_all, fetch_one
from shim.queue.estimates import estimated_time
from shim.queue.fair_order import ORDER, next_turn
from shim.queue.history import NEXT_EVENT, add_events, drop_oldest_events, job_events, select_events
from shim.queue.job import JobEvent, JobPage, JobRecord, JobSnapshot, JobState, JobStatus
from shim.queue.observer import JobObserver
from shim.queue.outbox import Outbox, put_in_outbox
from shim.queue.previews import select_preview
from shim.queue.reader import select_job, snapshot, workers_of
from shim.queue.schema import HAS_STATUS, jobs, outcomes, render_times, workers
from shim.queue.watches import EVERY_TASK
from shim.queue.webhook_columns import begun_again, webhook_columns
from shim.queue.webhook_request import WebhookOptions

#: The columns of a `JobRecord`.
_RECORD: Final = (
    jobs.c.input,
    jobs.c.created_at.label("submitted_at"),
    *(jobs.c[name] for name in ("started_at", "finished_at", "worker_id", "attempts", "lost_attempts")),
)

log = logging.getLogger(__name__)


class SqlQueue:
    """A `JobQueue` in `database`. At most `max_queue_size` jobs of each client wait. `close` closes the database.

    Without `webhooks`, jobs have none. `shim.queue.webhooks` sends them.
    """

    def __init__(
        self,
        database: Database,
        *,
        max_queue_size: int = 10,
        observer: JobObserver | None = None,
        webhooks: WebhookOptions | None = None,
    ) -> None:
        self._database = database
        self._webhooks = webhooks
        self._max_queue_size = max_queue_size
        self._observer = observer or JobObserver()

    async def close(self) -> None:
        await self._database.close()

    async def submit(
        self,
        job_input: JobInput,
        idempotency: Idempotency | None = None,
        check: Callable[[], None] | None = None,
        *,
        client: str = "",
        webhook_url: str | None = None,
    ) -> Submission:
        """Queues a job in one transaction. See `JobQueue.submit`."""
        if webhook_url is not None and self._webhooks is None:
            raise InvalidInputError(NO_WEBHOOKS)
        async with self._database.write(notify=True) as connection:
            # 1. Wait for other submissions: the limit of waiting jobs holds for requests at the same moment.
            await self._database.lock_submissions(connection)
            # 2. Read what the checks and the estimate need.
            alive = await _read_workers(connection, self._database.is_alive())
            waiting, running = await _read_waiting(connection), await _read_running(connection)
            backlog = _backlog(waiting, running, alive.ready)
            times = {**alive.estimates, **await _read_render_times(connection)}
            # 3. Check the weights; return the job of an earlier request with this key; check the rest.
            models = alive.models or KNOWN_MODELS
            check_offered(job_input, models, takes_images=alive.takes_images, limits=alive.limits, loras=alive.loras)
            if idempotency is not None and (earlier := await self._find_submitted(connection, idempotency)) is not None:
                return Submission(earlier, backlog, times)
            _check_ready(alive)
            self._check_not_full(waiting, client)
            if check is not None:
                check()
            # 4. Queue the job, behind those of its turn and of earlier turns.
            turn = next_turn(waiting, client)
            ahead = [job for job in waiting if job.turn <= turn]
            backlog = _backlog(ahead, running, alive.ready)
            values = {"client": client, "turn": turn, "estimated_time": estimated_time(job_input, backlog, times)}
            task_id = await self._insert(connection, job_input.wire(), {}, idempotency, webhook_url, **values)
        self._observer.submitted()
        job = JobSnapshot(task_id, JobState.QUEUED, queue_position=len(ahead) + 1, last_event=1)
        return Submission(job, backlog, times)

    async def enqueue(self, payload: Any, extras: Mapping[str, Any]) -> str:
        """Queues a job as RunPod's /run does: with any input, and with no worker ready. Returns its task_id.

        All jobs that come this way are one client's.

        Raises:
            QueueFullError: the limit of waiting jobs is reached.
        """
        async with self._database.write(notify=True) as connection:
            await self._database.lock_submissions(connection)
            waiting = await _read_waiting(connection)
            self._check_not_full(waiting, "")
            turn = next_turn(waiting, "")
            task_id = await self._insert(connection, payload, extras, None, None, client="", turn=turn)
        self._observer.submitted()
        return task_id

    async def get(self, task_id: str) -> JobSnapshot | None:
        row = await self._database.reader.job(task_id)
        return snapshot(row, self._database.clock()) if row is not None else None

    async def list_jobs(
        self,
        client: str,
        *,
        limit: int,
        status: JobStatus | None = None,
        cursor: int | None = None,
        after: str | None = None,
        oldest_first: bool = False,
    ) -> JobPage:
        """One page of the client's jobs. See `JobQueue.list_jobs`."""
        which = [jobs.c.client == client]
        past = jobs.c.seq.__gt__ if oldest_first else jobs.c.seq.__lt__
        if cursor is not None:
            which.append(past(cursor))
        if after is not None:
            before = jobs.alias()
            which.append(past(select(before.c.seq).where(before.c.task_id == after).scalar_subquery()))
        order = jobs.c.seq.asc() if oldest_first else jobs.c.seq.desc()
        statement = select_job(*which).add_columns(jobs.c.seq, jobs.c.input).order_by(order).limit(limit + 1)
        if status is not None:
            statement = statement.where(HAS_STATUS[status])
        async with self._database.read() as connection:
            rows = await fetch_all(connection, statement)
        now = self._database.clock()
        page = [snapshot(row, now) for row in rows[:limit]]
        # A completed job of an older release may have no manifest, and has failed for its client.
        shown = [job for job in page if status in (None, job.status)]
        inputs = {row.task_id: row.input for row in rows[:limit]}
        return JobPage(shown, inputs, rows[limit - 1].seq if len(rows) > limit else None)

    async def history(self, task_id: str, after: int = 0) -> Sequence[JobEvent]:
        async with self._database.read() as connection:
            return job_events(await fetch_all(connection, select_events(task_id, after)))

    async def record(self, task_id: str) -> JobRecord | None:
        async with self._database.read() as connection:
            row = await fetch_one(connection, select(*_RECORD).where(jobs.c.task_id == task_id))
            if row is None:
                return None
            events = job_events(await fetch_all(connection, select_events(task_id)))
        return JobRecord(**row._asdict(), events=events)

    async def preview(self, task_id: str) -> bytes | None:
        async with self._database.read() as connection:
            jpeg: bytes | None = await connection.scalar(select_preview(task_id))
        return jpeg

    def watching(self, task_id: str) -> AbstractContextManager[asyncio.Event]:
        return self._database.watching(task_id)

    @property
    def watch_interval(self) -> float:
        return self._database.watch_interval

    async def output(self, task_id: str) -> Any:
        """What the worker returned for the job, unchanged; None before that."""
        async with self._database.read() as connection:
            return await connection.scalar(select(jobs.c.output).where(jobs.c.task_id == task_id))

    async def cancel(self, task_id: str) -> JobSnapshot | None:
        """Cancels a waiting or running job. `Dispatcher.pending_cancellations` returns a running one to its worker."""
        async with self._database.write(notify=True) as connection:
            which, is_running = jobs.c.task_id == task_id, jobs.c.state == JobState.RUNNING
            cancelled = await self._database.end_jobs(
                connection, JobState.CANCELLED, which, failure=TASK_CANCELLED, stop_requested=is_running
            )
            job = await self._find(connection, which)
        if cancelled:
            log.info("cancelled by a client")
            self._observer.ended(JobState.CANCELLED, failure=TASK_CANCELLED)
        return job

    async def delete_video(self, task_id: str) -> bool:
        """Replaces the job's output by the failure. The outbox deletes the objects, also those of late attempts."""
        which = (jobs.c.task_id == task_id) & (jobs.c.state == JobState.COMPLETED)
        values = {"output": None, "failure": VIDEO_DELETED.model_dump(mode="json"), "last_event": NEXT_EVENT}
        async with self._database.write(notify=True) as connection:
            deleted = await connection.execute(update(jobs).where(which).values(values))
            await add_events(connection, self._database.clock(), which)
            await connection.execute(put_in_outbox(self._database.clock(), which))
        return deleted.rowcount > 0

    async def purge(self) -> int:
        """Cancels every waiting job; returns how many there were."""
        failure = JobFailure(error="The queue was purged", error_code=ErrorCode.CANCELLED)
        async with self._database.write(wake=EVERY_TASK) as connection:
            await self._database.lock_submissions(connection)
            waiting = jobs.c.state == JobState.QUEUED
            cancelled = await self._database.end_jobs(connection, JobState.CANCELLED, waiting, failure=failure)
        log.info("a client purged the queue: %d waiting tasks are cancelled", cancelled)
        self._observer.ended(JobState.CANCELLED, failure=failure, count=cancelled)
        return cancelled

    async def retry(self, task_id: str, objects: TaskObjects | None = None) -> bool:
        """Queues a failed job again. See `JobQueue.retry`. Without `objects`, call `Outbox.reopen` before."""
        if objects is not None:
            await Outbox(self._database, objects).reopen(task_id)
        async with self._database.write(notify=True) as connection:
            await self._database.lock_submissions(connection)
            which = jobs.c.task_id == task_id
            client = await connection.scalar(select(jobs.c.client).where(which)) or ""
            waiting = await _read_waiting(connection)
            self._check_not_full(waiting, client)
            result = await connection.execute(
                update(jobs)
                .where(which, jobs.c.state == JobState.FAILED)
                .values(
                    state=JobState.QUEUED,
                    failure=None,
                    worker_id=None,
                    turn=next_turn(waiting, client),
                    lost_attempts=0,
                    deliveries_not_begun=0,
                    progress=0,
                    stage=None,
                    finished_at=None,
                    bucket_due_at=None,
                    last_event=NEXT_EVENT,
                    estimated_time=None,
                    **begun_again(),
                )
            )
            if result.rowcount:
                await add_events(connection, self._database.clock(), which)
                await drop_oldest_events(connection, which)
        return result.rowcount > 0

    async def check_ready(self) -> None:
        _check_ready((await self.summary()).workers)

    async def summary(self) -> QueueSummary:
        return await self._database.reader.counts(self._database.alive_since())

    async def ended(self) -> Mapping[JobState, int]:
        """How many jobs have reached each terminal state."""
        async with self._database.read() as connection:
            rows = await fetch_all(connection, select(outcomes))
        return {JobState(row.state): row.total for row in rows}

    async def _find_submitted(self, connection: AsyncConnection, idempotency: Idempotency) -> JobSnapshot | None:
        which = jobs.c.idempotency_key == idempotency.key
        row = await fetch_one(connection, select(jobs.c.fingerprint).where(which))
        if row is None:
            return None
        idempotency.check(row.fingerprint)
        return await self._find(connection, which)

    async def _find(self, connection: AsyncConnection, which: ColumnElement[bool]) -> JobSnapshot | None:
        row = await fetch_one(connection, select_job(which))
        return snapshot(row, self._database.clock()) if row is not None else None

    async def _insert(
        self,
        connection: AsyncConnection,
        payload: Any,
        extras: Mapping[str, Any],
        idempotency: Idempotency | None,
        webhook_url: str | None,
        **values: Any,
    ) -> str:
        task_id, now = str(uuid.uuid4()), self._database.clock()
        default_url = self._webhooks.default_url if self._webhooks is not None else None
        await connection.execute(
            insert(jobs).values(
                task_id=task_id,
                state=JobState.QUEUED,
                input=payload,
                extras=dict(extras) or None,
                created_at=now,
                last_event=1,
                **values,
                idempotency_key=idempotency.key if idempotency else None,
                fingerprint=idempotency.fingerprint if idempotency else None,
                **webhook_columns(webhook_url or default_url),
            )
        )
        await add_events(connection, now, jobs.c.task_id == task_id)
        return task_id

    def _check_not_full(self, waiting: Sequence[Row[Any]], client: str) -> None:
        own = sum(job.client == client for job in waiting)
        if own >= self._max_queue_size:
            of_whom = " of this API key" if client else ""
            raise QueueFullError(f"The queue is full: {own} tasks{of_whom} are waiting")


async def _read_workers(connection: AsyncConnection, is_alive: ColumnElement[bool]) -> Workers:
    columns = workers.c.worker_id, workers.c.state, workers.c.report
    rows = await fetch_all(connection, select(*columns).where(is_alive).order_by(workers.c.worker_id))
    return workers_of(rows)


async def _read_waiting(connection: AsyncConnection) -> list[Row[Any]]:
    """The client, turn and input of each waiting job, in the order in which they are taken."""
    columns = jobs.c.client, jobs.c.turn, jobs.c.input
    return await fetch_all(connection, select(*columns).where(jobs.c.state == JobState.QUEUED).order_by(*ORDER))


async def _read_running(connection: AsyncConnection) -> list[Row[Any]]:
    return await fetch_all(connection, select(jobs.c.input).where(jobs.c.state == JobState.RUNNING))


def _backlog(waiting: Sequence[Row[Any]], running: Sequence[Row[Any]], ready_workers: int) -> Backlog:
    ahead, busy = ([_valid_input(job.input) for job in rows] for rows in (waiting, running))
    return Backlog(ahead, busy, ready_workers)


async def _read_render_times(connection: AsyncConnection) -> RenderTimes:
    rows = await fetch_all(connection, select(render_times))
    return {(row.model, Resolution(row.resolution), row.duration): row.mean for row in rows}


def _check_ready(alive: Workers) -> None:
    if alive.ready:
        return
    if alive.loading:
        raise ModelNotLoadedError("Model not loaded yet: a worker is loading it")
    reasons = [report.error for report in alive.reports if report.error]
    raise ModelNotLoadedError(f"Model not loaded: {reasons[0] if reasons else 'no worker is running'}")


def _valid_input(payload: Any) -> JobInput | None:
    try:
        return parse_queued(payload).request
    except InvalidInputError:
        return None
