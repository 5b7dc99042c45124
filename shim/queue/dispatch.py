"""The worker side of our own job queue: who renders what, and what becomes of it when its worker is lost.

`shim.platform` speaks RunPod's worker protocol over this.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, Select, Update, case, delete, func, literal, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from contract.errors import ErrorCode, JobFailure
from contract.result import Manifest, Progress
from contract.worker import WorkerReport, WorkerState
from shim.queue.base import NO_VIDEO, Discard, FindResult, JobObserver, JobState, QueueError
from shim.queue.database import Database, end, fetch_all, fetch_one, upsert
from shim.queue.schema import jobs, render_times, valid_manifest, workers
from storage.errors import StorageError

#: Seconds after which a stop that the worker has not followed is sent again.
_STOP_AGAIN: Final = 2.0
#: The running mean of render times is over about so many jobs.
_MEAN_OVER: Final = 20
#: Rows of workers unseen for so many seconds are removed.
_WORKER_TTL: Final = 3600.0
#: How many jobs that ended long ago one sweep removes: few enough to keep nobody waiting.
_SWEPT: Final = 1000

log = logging.getLogger(__name__)


class WorkerStoppingError(QueueError):
    """That worker is about to end: there is nothing for it any more."""


@dataclass(frozen=True)
class Delivery:
    """A job as a worker takes it: RunPod's `input`, and beside it what else the job carries (`s3Config`, ...)."""

    task_id: str
    input: Any
    extras: Mapping[str, Any]


class Dispatcher:
    """Hands the jobs in `database` to workers.

    A running job belongs to its worker for `lease` seconds after that worker's last sign of life. One whose lease
    lapses is looked for in the bucket with `find_result`, else queued again at the front; after `max_attempts` it
    fails. What a cancelled job finished all the same is removed with `discard`. Jobs are forgotten `history` seconds
    after they ended.
    """

    def __init__(
        self,
        database: Database,
        *,
        find_result: FindResult,
        discard: Discard,
        max_attempts: int = 3,
        lease: float = 60.0,
        history: float = 7 * 24 * 3600.0,
        observer: JobObserver | None = None,
    ) -> None:
        self._database = database
        self._find_result = find_result
        self._discard = discard
        self._max_attempts = max_attempts
        self._lease = lease
        self._history = history
        self._observer = observer or JobObserver()

    @property
    def changed(self) -> asyncio.Event:
        """Set when there is something new to take or to stop. Get it before you look."""
        return self._database.changed

    @property
    def look_again(self) -> float:
        """Seconds after which to look even if `changed` was not set."""
        return self._database.look_again

    async def take(self, worker_id: str) -> Delivery | None:
        """The job at the front, now this worker's.

        The SDK asks when it is idle. A job that the table says is still with this worker has lost its result, or
        never reached it: that one is settled first, and usually handed out again.

        Raises:
            WorkerStoppingError: the worker said that it takes no more.
        """
        await self._settle(jobs.c.worker_id == worker_id)
        async with self._database.read() as connection:
            worker = await fetch_one(connection, select(workers).where(workers.c.worker_id == worker_id))
            _check_taking(worker)
            if not await self._has_news(connection, worker_id, worker):
                return None
        now = self._database.clock()
        async with self._database.write() as connection:
            await _save_worker(connection, worker_id, now, WorkerState.READY)
            await connection.execute(_stopped(worker_id))
            front = await fetch_one(connection, _front().with_for_update(skip_locked=True))
            if front is None:
                return None
            task_id = front.task_id
            row = (
                await connection.execute(
                    update(jobs)
                    .where(jobs.c.task_id == task_id)
                    .values(
                        state=JobState.RUNNING,
                        worker_id=worker_id,
                        attempts=jobs.c.attempts + 1,
                        started_at=now,
                        lease_expires_at=now + self._lease,
                    )
                    .returning(jobs.c.input, jobs.c.extras, jobs.c.attempts)
                )
            ).one()
        log.info("%s: taken by worker %s, attempt %d", task_id, worker_id, row.attempts, extra=_ids(task_id, worker_id))
        if front.started_at is None:
            self._observer.started(now - front.created_at)
        return Delivery(task_id, row.input, row.extras or {})

    async def record_progress(self, worker_id: str, task_id: str, progress: Progress) -> None:
        """Note how far a running job is. What comes late, or after the end, changes nothing."""
        advances = jobs.c.progress <= progress.progress
        now = self._database.clock()
        async with self._database.write() as connection:
            await connection.execute(
                update(jobs)
                .where(*_held(worker_id), jobs.c.task_id == task_id)
                .values(
                    progress=case((advances, progress.progress), else_=jobs.c.progress),
                    stage=case((advances, progress.stage.value), else_=jobs.c.stage),
                    lease_expires_at=now + self._lease,
                )
            )

    async def complete(self, worker_id: str, task_id: str, output: Any) -> bool:
        """Store a job's output; False if it had ended before. The first end is the one that counts.

        A result is a result, whoever brings it: a worker that was given up for dead may still finish first, and
        then the one that renders the job again is told to stop.
        """
        async with self._database.write(rings=True) as connection:
            completed = await end(
                connection,
                self._database.clock(),
                JobState.COMPLETED,
                jobs.c.task_id == task_id,
                output=output,
                progress=100,
                stop_requested=(jobs.c.state == JobState.RUNNING) & (jobs.c.worker_id != worker_id),
            )
            if completed:
                await _observe(connection, output)
            await connection.execute(_stopped(worker_id, task_id))
            state = await connection.scalar(select(jobs.c.state).where(jobs.c.task_id == task_id))
        if completed:
            self._tell_completed(worker_id, task_id, valid_manifest(output))
        if state == JobState.CANCELLED:
            await self._discard(task_id)
        return bool(completed)

    def _tell_completed(self, worker_id: str, task_id: str, result: Manifest | None) -> None:
        if result is None:
            log.error("%s: worker %s returned no video", task_id, worker_id, extra=_ids(task_id, worker_id))
            self._observer.ended(JobState.COMPLETED, failure=NO_VIDEO)
        else:
            log.info("%s: completed by worker %s", task_id, worker_id, extra=_ids(task_id, worker_id))
            self._observer.ended(JobState.COMPLETED, result=result)

    async def fail(self, worker_id: str, task_id: str, failure: JobFailure) -> bool:
        """Store a job's failure; False if it had ended before or is another worker's by now."""
        async with self._database.write(rings=True) as connection:
            failed = await end(
                connection,
                self._database.clock(),
                JobState.FAILED,
                *_held(worker_id),
                jobs.c.task_id == task_id,
                failure=failure.model_dump(mode="json"),
            )
            await connection.execute(_stopped(worker_id, task_id))
        if failed:
            log.warning("%s: failed with %s", task_id, failure.error_code, extra=_ids(task_id, worker_id))
            self._observer.ended(JobState.FAILED, failure=failure)
        return bool(failed)

    async def report(self, worker_id: str, report: WorkerReport) -> None:
        """Note what a worker says of itself: a sign of life, for its job too, until it says that it has stopped."""
        if report.state is WorkerState.STOPPED:
            await self.forget_worker(worker_id, blameless=True)
            return
        now = self._database.clock()
        async with self._database.write(rings=report.state is WorkerState.STOPPING) as connection:
            await _save_worker(connection, worker_id, now, report.state, report.model_dump(mode="json"))
            await self._extend(connection, worker_id, now)

    async def ping(self, worker_id: str, task_ids: Collection[str]) -> None:
        """Note the SDK's ping: a sign of life for the jobs that it names.

        The SDK pings from a process of its own, which can outlive the worker: a ping alone makes no worker ready.
        """
        if not task_ids:
            return
        now = self._database.clock()
        named = jobs.c.task_id.in_(task_ids)
        async with self._database.write() as connection:
            await connection.execute(
                update(workers)
                .where(workers.c.worker_id == worker_id, select(jobs.c.seq).where(*_held(worker_id), named).exists())
                .values(last_seen=now)
            )
            await self._extend(connection, worker_id, now, named)

    async def stops(self, worker_id: str) -> list[str]:
        """The jobs that this worker is to stop now; one that it goes on with is named again after 2 seconds.

        Raises:
            WorkerStoppingError: the worker said that it takes no more, and there is nothing to stop.
        """
        now = self._database.clock()
        due = (
            jobs.c.worker_id == worker_id,
            jobs.c.stop_requested == true(),
            func.coalesce(jobs.c.stop_sent_at, 0.0) <= now - _STOP_AGAIN,
        )
        async with self._database.read() as connection:
            if await connection.scalar(select(jobs.c.seq).where(*due).limit(1)) is None:
                _check_taking(await fetch_one(connection, select(workers).where(workers.c.worker_id == worker_id)))
                return []
        async with self._database.write() as connection:
            rows = await connection.execute(update(jobs).where(*due).values(stop_sent_at=now).returning(jobs.c.task_id))
            return [row.task_id for row in rows]

    async def forget_worker(self, worker_id: str, *, blameless: bool = False) -> None:
        """That worker's process is gone: settle what it was at. `blameless` counts no attempt against its job."""
        async with self._database.write() as connection:
            await connection.execute(delete(workers).where(workers.c.worker_id == worker_id))
            await connection.execute(_stopped(worker_id))
        await self._settle(jobs.c.worker_id == worker_id, blameless=blameless)

    async def forget_workers(self, prefix: str) -> None:
        """The workers whose ids begin with `prefix` are gone: settle what they were at."""
        async with self._database.write() as connection:
            await connection.execute(delete(workers).where(workers.c.worker_id.startswith(prefix, autoescape=True)))
        await self._settle(jobs.c.worker_id.startswith(prefix, autoescape=True))

    async def sweep(self) -> None:
        """Settle the jobs whose lease has lapsed; drop what nobody has asked for in a long time."""
        await self._database.set_clock()
        now = self._database.clock()
        await self._settle(jobs.c.lease_expires_at < now)
        ended = jobs.c.finished_at < now - self._history
        async with self._database.read() as connection:
            old = await fetch_all(connection, select(jobs.c.seq).where(ended).limit(_SWEPT))
        async with self._database.write() as connection:
            await connection.execute(delete(workers).where(workers.c.last_seen < now - _WORKER_TTL))
            if old:  # `ended` again: it may have been queued again meanwhile
                await connection.execute(delete(jobs).where(jobs.c.seq.in_([row.seq for row in old]), ended))

    async def _settle(self, which: ColumnElement[bool], *, blameless: bool = False) -> None:
        """Running jobs that nobody is at: done after all, or queued again, or given up.

        While the bucket can't be asked none is given up: it may be done. To be queued again does no harm, the worker
        asks before it renders.
        """
        async with self._database.read() as connection:
            lost = await fetch_all(connection, select(jobs).where(jobs.c.state == JobState.RUNNING, which))
        for row in lost:
            result, unknown = None, False
            try:
                result = await self._find_result(row.task_id)
            except StorageError as exc:
                log.warning("%s: can't look for its manifest: %s", row.task_id, exc, extra={"task_id": row.task_id})
                unknown = True
            if result is not None:
                text = "%s: its result was lost on the way, its manifest is in the bucket"
                log.info(text, row.task_id, extra=_ids(row.task_id, row.worker_id))
                await self.complete(row.worker_id, row.task_id, result.model_dump(mode="json"))
            elif row.attempts >= self._max_attempts and not blameless:
                if not unknown:
                    await self._give_up(row, which)
            else:
                await self._give_back(row, which, blameless)

    async def _give_up(self, row: Row[Any], which: ColumnElement[bool]) -> None:
        text = f"The worker was lost {row.attempts} times while it rendered this task"
        code = ErrorCode.GENERATION_FAILED
        failure = JobFailure(error=text, error_code=code)
        async with self._database.write(rings=True) as connection:
            lost = await end(
                connection,
                self._database.clock(),
                JobState.FAILED,
                *_unchanged(row),
                which,
                failure=failure.model_dump(mode="json"),
            )
        if lost:
            ids = _ids(row.task_id, row.worker_id)
            log.error("%s: failed with %s, given up after %d attempts", row.task_id, code, row.attempts, extra=ids)
            self._observer.ended(JobState.FAILED, failure=failure)

    async def _give_back(self, row: Row[Any], which: ColumnElement[bool], blameless: bool) -> None:
        async with self._database.write(rings=True) as connection:
            result = await connection.execute(
                update(jobs)
                .where(*_unchanged(row), which)
                .values(
                    state=JobState.QUEUED,
                    worker_id=None,
                    lease_expires_at=None,
                    attempts=jobs.c.attempts - (1 if blameless else 0),
                )
            )
        if result.rowcount:
            ids = _ids(row.task_id, row.worker_id)
            log.warning("%s: worker %s was lost, the task is queued again", row.task_id, row.worker_id, extra=ids)
            if not blameless:
                self._observer.requeued()

    async def _has_news(self, connection: AsyncConnection, worker_id: str, worker: Row[Any] | None) -> bool:
        """Whether there is anything to write for a worker that asks; mostly there is not."""
        to_stop = select(jobs.c.task_id).where(jobs.c.worker_id == worker_id, jobs.c.stop_requested == true())
        if await connection.scalar(_front()) is not None or await connection.scalar(to_stop.limit(1)) is not None:
            return True
        fresh = self._database.clock() - self._database.worker_timeout / 4
        return worker is None or worker.state != WorkerState.READY or worker.last_seen <= fresh

    async def _extend(
        self, connection: AsyncConnection, worker_id: str, now: float, *which: ColumnElement[bool]
    ) -> None:
        await connection.execute(
            update(jobs).where(*_held(worker_id), *which).values(lease_expires_at=now + self._lease)
        )


def _ids(task_id: str, worker_id: str) -> dict[str, str]:
    """What a log line is about."""
    return {"task_id": task_id, "worker_id": worker_id}


def _front() -> Select[Any]:
    columns = jobs.c.task_id, jobs.c.created_at, jobs.c.started_at
    return select(*columns).where(jobs.c.state == JobState.QUEUED).order_by(jobs.c.seq).limit(1)


def _held(worker_id: str) -> tuple[ColumnElement[bool], ...]:
    return jobs.c.state == JobState.RUNNING, jobs.c.worker_id == worker_id


def _unchanged(row: Row[Any]) -> tuple[ColumnElement[bool], ...]:
    """That job, if nobody has taken, ended or given it back since `row` was read."""
    return *_held(row.worker_id), jobs.c.task_id == row.task_id, jobs.c.attempts == row.attempts


def _check_taking(worker: Row[Any] | None) -> None:
    if worker is not None and worker.state == WorkerState.STOPPING:
        raise WorkerStoppingError(worker.worker_id)


def _stopped(worker_id: str, task_id: str | None = None) -> Update:
    """The worker is no longer at that job, or at any: it need not be told to stop."""
    statement = update(jobs).where(jobs.c.worker_id == worker_id, jobs.c.stop_requested == true())
    if task_id is not None:
        statement = statement.where(jobs.c.task_id == task_id)
    return statement.values(stop_requested=False, stop_sent_at=None)


async def _save_worker(
    connection: AsyncConnection, worker_id: str, now: float, state: WorkerState, report: Any = None
) -> None:
    """Insert or update a worker's row; with no `report` the last one stays."""
    seen = {"last_seen": now, "state": state} | ({"report": report} if report is not None else {})
    await upsert(connection, workers, {"worker_id": worker_id, **seen}, seen)


async def _observe(connection: AsyncConnection, output: Any) -> None:
    """Let a finished job's render time into the mean of its kind."""
    manifest = valid_manifest(output)
    if manifest is None:
        return
    seconds = manifest.timings.get("total", 0.0)
    known = render_times.c
    samples = case((known.samples < _MEAN_OVER, known.samples + 1), else_=literal(_MEAN_OVER))
    row = {
        "model": manifest.input.model,
        "resolution": manifest.input.resolution,
        "duration": manifest.input.duration,
        "mean": seconds,
        "samples": 1,
    }
    changes = {"mean": known.mean + (seconds - known.mean) / samples, "samples": samples}
    await upsert(connection, render_times, row, changes)
