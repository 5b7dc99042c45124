"""The worker side of the SQL queue: hands jobs to workers and stores what they send back.

`shim.api.runpod_worker` speaks RunPod's worker protocol over this.
"""

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    Update,
    case,
    delete,
    exists,
    func,
    literal,
    null,
    select,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from contract import tracing
from contract.errors import JobFailure
from contract.log_fields import bound
from contract.result import Manifest, Progress
from contract.worker import WorkerReport, WorkerState
from shim.queue import fair_order
from shim.queue.base import NO_VIDEO, FindResult, QueueError, render_kind, valid_manifest
from shim.queue.database import Database, fetch_all, fetch_one, upsert
from shim.queue.history import NEXT_EVENT, add_events
from shim.queue.job import JobState
from shim.queue.lost_jobs import Loss, LostJobs, running_on
from shim.queue.observer import JobObserver
from shim.queue.outbox import put_in_outbox
from shim.queue.previews import delete_previews, save_preview
from shim.queue.schema import jobs, render_times, workers
from shim.queue.watches import EVERY_TASK
from shim.queue.webhook_columns import has_no_pending_webhook

#: Seconds after which a cancellation is sent to the worker again if the job still runs there.
_CANCELLATION_RETRY: Final = 2.0
#: The number of jobs that the running mean of render times covers.
_MEAN_SAMPLES: Final = 20
#: Seconds without a report after which a worker's row is deleted.
_WORKER_TTL: Final = 3600.0
#: The most jobs that one sweep deletes, so that it never blocks others for long.
_SWEEP_LIMIT: Final = 1000

log = logging.getLogger(__name__)


class WorkerStoppingError(QueueError):
    """The worker has reported that it is stopping: it gets no more jobs."""


@dataclass(frozen=True)
class Delivery:
    """A job as a worker takes it: RunPod's `input`, and the other fields of the request (`s3Config`, ...)."""

    task_id: str
    input: Any
    extras: Mapping[str, Any]


class Dispatcher:
    """Hands the jobs in `database` to workers.

    A worker has a lease on its running job until the database's `worker_timeout` has passed since its last report or
    progress, or since its last ping if it sends no reports. When the lease expires, `find_result` looks for the job in
    the bucket; otherwise the job returns to the front of the queue, and fails after `max_attempts` renders that workers
    began and lost. A job that ended otherwise than its worker says enters the outbox of the bucket. Jobs are deleted
    `history_ttl` seconds after their end.
    """

    def __init__(
        self,
        database: Database,
        *,
        find_result: FindResult,
        max_attempts: int = 3,
        history_ttl: float = 7 * 24 * 3600.0,
        observer: JobObserver | None = None,
    ) -> None:
        self._database = database
        self._history_ttl = history_ttl
        self._observer = observer or JobObserver()
        self._lost_jobs = LostJobs(database, find_result, self.complete, max_attempts, self._observer)

    @property
    def changed(self) -> asyncio.Event:
        """The event that is set when there may be a job to take or to cancel. Get it before you read."""
        return self._database.changed

    @property
    def poll_interval(self) -> float:
        """Seconds after which to read again even if `changed` is not set."""
        return self._database.poll_interval

    async def take(self, worker_id: str) -> Delivery | None:
        """Gives the job at the front of the queue to this worker; None if no job waits.

        Raises:
            WorkerStoppingError: the worker has reported that it is stopping.
        """
        # 1. An idle worker asks. A job that still runs on it has lost its result, or never reached the worker.
        await self._lost_jobs.recover(jobs.c.worker_id == worker_id, Loss.SILENT)
        # 2. Most calls find nothing to write, and a read transaction is cheaper.
        async with self._database.read() as connection:
            worker = await _read_taking_worker(connection, worker_id)
            if not await self._has_something_to_write(connection, worker_id, worker):
                return None
        # 3. Record that the worker is idle and alive, and give it the first job that no other worker has locked.
        async with self._database.write(wake=EVERY_TASK) as connection:
            now = self._database.clock()
            await _save_worker(connection, worker_id, now, WorkerState.READY)
            await connection.execute(_clear_cancellations(worker_id, now))
            front = await fetch_one(connection, _front_job().with_for_update(skip_locked=True))
            if front is None:
                return None
            job = await self._start(connection, worker_id, front.task_id, now)
        # 4. Log and count it.
        with bound(task_id=front.task_id, worker_id=worker_id):
            log.info("taken by worker %s, delivery %d", worker_id, job.attempts)
        if front.started_at is None:
            self._observer.started(now - front.created_at)
            if (parent := tracing.traceparent_of(job.input)) is not None:
                tracing.record("queue", now - front.created_at, parent=parent, task_id=front.task_id)
        return Delivery(front.task_id, job.input, job.extras or {})

    async def _start(self, connection: AsyncConnection, worker_id: str, task_id: str, now: float) -> Row[Any]:
        rows = await connection.execute(
            update(jobs)
            .where(jobs.c.task_id == task_id)
            .values(
                state=JobState.RUNNING,
                worker_id=worker_id,
                attempts=jobs.c.attempts + 1,
                deliveries_not_begun=jobs.c.deliveries_not_begun + 1,
                started_at=now,
                lease_expires_at=now + self._database.worker_timeout,
                last_event=NEXT_EVENT,
                preview=None,
            )
            .returning(jobs.c.input, jobs.c.extras, jobs.c.attempts)
        )
        started = rows.one()
        await connection.execute(delete_previews(jobs.c.task_id == task_id))  # of an earlier attempt
        await add_events(connection, now, jobs.c.task_id == task_id)
        return started

    async def record_progress(self, worker_id: str, task_id: str, progress: Progress) -> None:
        """Stores the progress of a running job and extends its lease. Ignores progress that is late or lower."""
        advances = jobs.c.progress <= progress.progress
        begins_stage = advances & jobs.c.stage.is_distinct_from(progress.stage.value)
        values = {
            "progress": case((advances, progress.progress), else_=jobs.c.progress),
            "stage": case((advances, progress.stage.value), else_=jobs.c.stage),
            "last_event": case((begins_stage, NEXT_EVENT), else_=jobs.c.last_event),
            "deliveries_not_begun": 0,
        }
        this_job = jobs.c.task_id == task_id
        if progress.preview is not None:
            values["preview"] = case((advances, func.coalesce(jobs.c.preview, 0) + 1), else_=jobs.c.preview)
        async with self._database.write(wake=task_id) as connection:
            await self._extend_leases(connection, worker_id, this_job, **values)
            if progress.preview is not None:
                is_latest = jobs.c.progress == progress.progress
                await save_preview(connection, progress.preview, this_job, is_latest, *running_on(worker_id))
            await add_events(connection, self._database.clock(), this_job, *running_on(worker_id))

    async def complete(self, worker_id: str, task_id: str, output: Any) -> bool:
        """Stores a job's output; False if the job had ended before.

        Accepts it from any worker: one that was taken for lost may finish first. The worker that renders the job again
        then receives a cancellation.
        """
        async with self._database.write(notify=True) as connection:
            renders_elsewhere = (jobs.c.state == JobState.RUNNING) & (jobs.c.worker_id != worker_id)
            changes = {"output": output, "progress": 100, "stop_requested": renders_elsewhere}
            failure = NO_VIDEO if valid_manifest(output) is None else None
            completed = await self._database.end_jobs(
                connection, JobState.COMPLETED, jobs.c.task_id == task_id, failure=failure, **changes
            )
            if completed:
                await _update_render_times(connection, output)
            else:  # the worker may have stored objects after the job's end
                await connection.execute(put_in_outbox(self._database.clock(), jobs.c.task_id == task_id))
            await connection.execute(_clear_cancellations(worker_id, self._database.clock(), task_id))
        if completed:
            self._log_completion(worker_id, valid_manifest(output))
        return bool(completed)

    def _log_completion(self, worker_id: str, result: Manifest | None) -> None:
        if result is None:
            log.error("worker %s returned no video; check that it runs this release's handler", worker_id)
            self._observer.ended(JobState.COMPLETED, failure=NO_VIDEO)
        else:
            log.info("completed by worker %s", worker_id)
            self._observer.ended(JobState.COMPLETED, result=result)

    async def fail(self, worker_id: str, task_id: str, failure: JobFailure) -> bool:
        """Stores a job's failure; False if the job had ended before or runs on another worker now."""
        async with self._database.write(notify=True) as connection:
            which = *running_on(worker_id), jobs.c.task_id == task_id
            failed = await self._database.end_jobs(connection, JobState.FAILED, *which, failure=failure)
            await connection.execute(_clear_cancellations(worker_id, self._database.clock(), task_id))
        if failed:
            log.warning("failed with %s on worker %s", failure.error_code, worker_id)
            self._observer.ended(JobState.FAILED, failure=failure)
        return bool(failed)

    async def report(self, worker_id: str, report: WorkerReport) -> None:
        """Stores a worker's report and extends its leases. A worker that has stopped is released.

        A FAILED worker has stopped its render for lack of progress, so its report extends no lease.
        """
        if report.state is WorkerState.STOPPED:
            await self.release_worker(worker_id, count_attempt=False)
            return
        now = self._database.clock()
        async with self._database.write(notify=report.state is WorkerState.STOPPING) as connection:
            await _save_worker(connection, worker_id, now, report.state, report.model_dump(mode="json"))
            if report.state is not WorkerState.FAILED:
                await self._extend_leases(connection, worker_id)

    async def ping(self, worker_id: str, task_ids: Collection[str]) -> None:
        """Extends the leases of the jobs that the SDK's ping names. The worker has begun them.

        The SDK pings from a separate process, which goes on while the worker hangs. So a ping does not make a worker
        ready, and extends no lease of a worker that sends reports: those come from the worker itself.
        """
        if not task_ids:
            return
        named = jobs.c.task_id.in_(task_ids)
        sends_reports = exists().where(workers.c.worker_id == worker_id, workers.c.report.is_not(null()))
        async with self._database.write() as connection:
            await connection.execute(
                update(workers)
                .where(
                    workers.c.worker_id == worker_id,
                    workers.c.report.is_(null()),
                    select(jobs.c.seq).where(*running_on(worker_id), named).exists(),
                )
                .values(last_seen=self._database.clock())
            )
            began = update(jobs).where(*running_on(worker_id), named)
            await connection.execute(began.values(deliveries_not_begun=0))
            await self._extend_leases(connection, worker_id, named, ~sends_reports)

    async def pending_cancellations(self, worker_id: str) -> list[str]:
        """The jobs that this worker must cancel now. Each is returned again after 2 seconds while it still runs.

        Raises:
            WorkerStoppingError: the worker has reported that it is stopping, and has nothing to cancel.
        """
        now = self._database.clock()
        due = (
            jobs.c.worker_id == worker_id,
            jobs.c.stop_requested == true(),
            # Not later than now: an earlier start of this server may have had another clock.
            ~func.coalesce(jobs.c.stop_sent_at, 0.0).between(now - _CANCELLATION_RETRY, now),
        )
        async with self._database.read() as connection:
            if await connection.scalar(select(jobs.c.seq).where(*due).limit(1)) is None:
                await _read_taking_worker(connection, worker_id)
                return []
        async with self._database.write() as connection:
            rows = await connection.execute(update(jobs).where(*due).values(stop_sent_at=now).returning(jobs.c.task_id))
            return [row.task_id for row in rows]

    async def release_worker(self, worker_id: str, *, count_attempt: bool = True) -> None:
        """Deletes a worker whose process has ended and recovers its job.

        `count_attempt=False` is for a worker that was asked to end.
        """
        async with self._database.write() as connection:
            await connection.execute(delete(workers).where(workers.c.worker_id == worker_id))
            await connection.execute(_clear_cancellations(worker_id, self._database.clock()))
        await self._lost_jobs.recover(jobs.c.worker_id == worker_id, Loss.EXITED if count_attempt else Loss.STOPPED)

    async def release_workers(self, prefix: str) -> None:
        """Deletes the workers whose ids begin with `prefix`, which ended with their server, and recovers their jobs."""
        async with self._database.write() as connection:
            await connection.execute(delete(workers).where(workers.c.worker_id.startswith(prefix, autoescape=True)))
        await self._lost_jobs.recover(jobs.c.worker_id.startswith(prefix, autoescape=True), Loss.STOPPED)

    async def sweep(self) -> None:
        """Recovers the jobs whose lease has expired; deletes old jobs and workers, and traces of credentials."""
        await self._database.set_clock()
        now = self._database.clock()
        await self._lost_jobs.recover(jobs.c.lease_expires_at < now, Loss.SILENT)
        ended = (
            (jobs.c.finished_at < now - self._history_ttl)
            & jobs.c.bucket_due_at.is_(None)
            & has_no_pending_webhook(now)
        )
        async with self._database.read() as connection:
            old = await fetch_all(connection, select(jobs.c.seq).where(ended).limit(_SWEEP_LIMIT))
        async with self._database.write() as connection:
            await connection.execute(delete(workers).where(workers.c.last_seen < now - _WORKER_TTL))
            if old:  # `ended` again: a client may have retried a job in between
                await connection.execute(delete(jobs).where(jobs.c.seq.in_([row.seq for row in old]), ended))
                self._database.note_deleted()
        await self._database.forget_deleted()

    async def _has_something_to_write(
        self, connection: AsyncConnection, worker_id: str, worker: Row[Any] | None
    ) -> bool:
        to_cancel = select(jobs.c.task_id).where(jobs.c.worker_id == worker_id, jobs.c.stop_requested == true())
        for statement in (_front_job(), to_cancel.limit(1)):
            if await connection.scalar(statement) is not None:
                return True
        fresh = self._database.clock() - self._database.worker_timeout / 4
        return worker is None or worker.state != WorkerState.READY or worker.last_seen <= fresh

    async def _extend_leases(
        self, connection: AsyncConnection, worker_id: str, *which: ColumnElement[bool], **values: Any
    ) -> None:
        expires_at = self._database.clock() + self._database.worker_timeout
        await connection.execute(
            update(jobs).where(*running_on(worker_id), *which).values(lease_expires_at=expires_at, **values)
        )


def _front_job() -> Select[Any]:
    columns = jobs.c.task_id, jobs.c.created_at, jobs.c.started_at
    return select(*columns).where(jobs.c.state == JobState.QUEUED).order_by(*fair_order.ORDER).limit(1)


async def _read_taking_worker(connection: AsyncConnection, worker_id: str) -> Row[Any] | None:
    """The worker's row; None before its first report. Raises WorkerStoppingError."""
    worker = await fetch_one(connection, select(workers).where(workers.c.worker_id == worker_id))
    if worker is not None and worker.state == WorkerState.STOPPING:
        raise WorkerStoppingError(worker_id)
    return worker


def _clear_cancellations(worker_id: str, now: float, task_id: str | None = None) -> Update:
    """The worker has left that job, or every job, and needs no cancellation for it.

    The job enters the outbox again: the worker may have stored objects after the cancellation.
    """
    which = [jobs.c.worker_id == worker_id, jobs.c.stop_requested == true()]
    if task_id is not None:
        which.append(jobs.c.task_id == task_id)
    return put_in_outbox(now, *which).values(stop_requested=False, stop_sent_at=None)


async def _save_worker(
    connection: AsyncConnection, worker_id: str, now: float, state: WorkerState, report: Any = None
) -> None:
    """Inserts or updates a worker's row. Without a `report` the row keeps the last one."""
    seen = {"last_seen": now, "state": state} | ({"report": report} if report is not None else {})
    await upsert(connection, workers, {"worker_id": worker_id, **seen}, seen)


async def _update_render_times(connection: AsyncConnection, output: Any) -> None:
    """Adds a finished job to the running mean of its kind."""
    manifest = valid_manifest(output)
    if manifest is None:
        return
    seconds = manifest.timings.get("total", 0.0)
    stored = render_times.c
    samples = case((stored.samples < _MEAN_SAMPLES, stored.samples + 1), else_=literal(_MEAN_SAMPLES))
    kind = dict(zip(("model", "resolution", "duration"), render_kind(manifest.input), strict=True))
    changes = {"mean": stored.mean + (seconds - stored.mean) / samples, "samples": samples}
    await upsert(connection, render_times, {**kind, "mean": seconds, "samples": 1}, changes)
