"""What polls read: a job's row and the queue's counts, each with one statement and without SQLAlchemy's transactions.

Nothing is cached: a read begins after the call, so it sees whatever was committed before the call, on every server.
shim.queue.sqlite_reader and shim.queue.postgres_reader run the statements.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from sqlalchemy import ColumnElement, Dialect, Row, Select, case, func, null, select, tuple_
from sqlalchemy.sql.elements import TextClause

from contract.errors import JobFailure
from contract.result import Stage
from contract.worker import WorkerReport, WorkerState
from shim.queue.base import NO_VIDEO, QueueSummary, QueueUnavailableError, Workers, valid_manifest
from shim.queue.fair_order import ORDER
from shim.queue.job import JobSnapshot, JobState, WebhookState
from shim.queue.schema import jobs, workers

K = TypeVar("K")
V = TypeVar("V")


class JobRow(NamedTuple):
    """What a job's status is made of. `queue_position` is None unless the job waits."""

    task_id: str
    state: str
    progress: int
    stage: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    estimated_time: float | None
    last_event: int
    attempts: int
    output: Any
    failure: Any
    webhook: Any
    preview: int | None
    queue_position: int | None


class Reader(Protocol):
    """Each method raises QueueUnavailableError if the database does not answer."""

    async def job(self, task_id: str) -> JobRow | None:
        """The job's row; None for an unknown job."""
        ...

    async def counts(self, alive_since: float) -> QueueSummary:
        """The counts; workers are alive that were seen after `alive_since`, by the database's clock."""
        ...

    async def close(self) -> None: ...


def select_job(*which: ColumnElement[bool]) -> Select[Any]:
    """The columns of a `JobRow`, of the jobs that `which` selects."""
    ahead = jobs.alias("ahead")
    position = (
        select(func.count())
        .select_from(ahead)
        .where(ahead.c.state == JobState.QUEUED, tuple_(ahead.c.turn, ahead.c.seq) <= tuple_(*ORDER))
        .correlate(jobs)
        .scalar_subquery()
    )
    columns = [jobs.c[name] for name in JobRow._fields[:-1]]
    queue_position = case((jobs.c.state == JobState.QUEUED, position), else_=null()).label("queue_position")
    return select(*columns, queue_position).where(*which)


def snapshot(row: JobRow | Row[Any], now: float) -> JobSnapshot:
    """The job whose columns `select_job` has selected."""
    state = JobState(row.state)
    result = valid_manifest(row.output) if state is JobState.COMPLETED else None
    failure = JobFailure.model_validate(row.failure) if row.failure is not None else None
    if state is JobState.COMPLETED and result is None:
        failure = failure or NO_VIDEO
    started_at = row.started_at if state is not JobState.QUEUED else None  # a job that waits again has an old one
    return JobSnapshot(
        task_id=row.task_id,
        state=state,
        progress=row.progress if state is JobState.COMPLETED else min(row.progress, 99),
        stage=Stage(row.stage) if row.stage and state is not JobState.QUEUED else Stage.QUEUED,
        elapsed_time=max((row.finished_at or now) - row.created_at, 0.0),
        queue_position=row.queue_position,
        result=result,
        failure=failure,
        last_event=row.last_event,
        attempts=row.attempts,
        submitted_at=row.created_at,
        started_at=started_at,
        running_time=0.0 if started_at is None else max((row.finished_at or now) - started_at, 0.0),
        estimated_time=row.estimated_time,
        webhook=WebhookState.model_validate(row.webhook) if row.webhook is not None else None,
        preview=row.preview if state is JobState.RUNNING else None,
    )


def select_counts(alive_since: TextClause) -> Select[Any]:
    """The numbers of jobs, in one row for each worker that was seen after `alive_since`, or in one if there is none."""
    waiting, running = [
        select(func.count()).select_from(jobs).where(jobs.c.state == state).scalar_subquery().label(name)
        for name, state in (("waiting", JobState.QUEUED), ("running", JobState.RUNNING))
    ]
    numbers = select(waiting, running).subquery()
    columns = workers.c.worker_id, workers.c.state, workers.c.report
    joined = numbers.outerjoin(workers, workers.c.last_seen > alive_since)
    return select(numbers, *columns).select_from(joined).order_by(workers.c.worker_id)


def compiled(statement: Select[Any], dialect: Dialect) -> str:
    """The statement in the dialect's SQL, with its values in it. Parameters are `text`: `?` or `$1`."""
    return str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


def summary(rows: Sequence[Sequence[Any]]) -> QueueSummary:
    """What the rows of `select_counts` say."""
    waiting, running = rows[0][:2]
    return QueueSummary(waiting, running, workers_of([row[2:] for row in rows if row[2] is not None]))


def workers_of(rows: Sequence[Sequence[Any]]) -> Workers:
    """The workers that are alive, from their ids, states and reports."""
    states = [state for _, state, _ in rows]
    return Workers(
        ready=states.count(WorkerState.READY),
        loading=states.count(WorkerState.LOADING),
        failed=states.count(WorkerState.FAILED),
        reports_by_id={worker_id: WorkerReport.model_validate(report) for worker_id, _, report in rows if report},
    )


class Batched(Generic[K, V]):
    """Joins the calls that arrive while `load` runs into one next call of `load`, which may leave keys out.

    A call's `load` begins after the call, so the result is never older than the call. If `load` raises, the calls that
    wait for the next one raise the same: they would ask the same database.
    """

    def __init__(self, load: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]]) -> None:
        self._load = load
        self._waiting: list[tuple[K, asyncio.Future[V | None]]] = []
        self._asked: list[tuple[K, asyncio.Future[V | None]]] = []
        self._loading: asyncio.Task[Mapping[K, V]] | None = None

    async def get(self, key: K) -> V | None:
        future: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, future))
        if self._loading is None:
            self._start()
        return await future

    async def close(self) -> None:
        """Cancels the load. The calls that wait raise QueueUnavailableError."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])

    def _start(self) -> None:
        self._loading = asyncio.create_task(self._load_waiting())
        self._loading.add_done_callback(self._deliver)

    async def _load_waiting(self) -> Mapping[K, V]:
        self._asked, self._waiting = self._waiting, []
        return await self._load(list(dict.fromkeys(key for key, _ in self._asked)))

    def _deliver(self, loading: asyncio.Task[Mapping[K, V]]) -> None:
        self._loading = None
        error = QueueUnavailableError("The job queue is closed") if loading.cancelled() else loading.exception()
        if error is not None:
            failed, self._waiting = [*self._asked, *self._waiting], []
            for _, future in failed:
                if not future.done():
                    future.set_exception(error)
            return
        loaded = loading.result()
        for key, future in self._asked:
            if not future.done():
                future.set_result(loaded.get(key))
        if self._waiting:
            self._start()
