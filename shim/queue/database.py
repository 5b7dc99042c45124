"""Transactions, the clock and change notifications of the SQL queue's database."""

import asyncio
import logging
import sqlite3
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, Final, Self

import psycopg
from sqlalchemy import ColumnElement, Row, Select, Table, null, text, true, update
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contract.errors import JobFailure
from shim.queue.base import QueueUnavailableError
from shim.queue.clock import Clock, SteadyClock
from shim.queue.engine import (
    SUBMIT_LOCK,
    database_url,
    empty_write_ahead_log,
    insert_into,
    libpq_parameters,
    open_engine,
    writing,
)
from shim.queue.history import NEXT_EVENT, add_events
from shim.queue.job import JobState
from shim.queue.postgres_reader import PostgresReader
from shim.queue.previews import delete_previews
from shim.queue.reader import Reader
from shim.queue.schema import jobs, outcomes, workers
from shim.queue.sqlite_reader import SqliteReader
from shim.queue.watches import Watches
from shim.queue.webhook_columns import due_if_any

#: Seconds between two looks for changes of other servers: without notifications, and with them.
_POLL_INTERVAL: Final = 1.0
_POLL_INTERVAL_LISTENING: Final = 10.0
_LISTEN_RETRY: Final = 1.0
#: Seconds that a transaction may take. PostgreSQL's statement_timeout ends a long statement, but not one on a frozen or
#: unreachable server. Cancelling that one takes the driver up to 10 s more.
_TRANSACTION_TIMEOUT: Final = 20.0
#: Seconds between two readings of the database's clock that a slow answer does not explain.
_CLOCK_STEP: Final = 10.0
#: PostgreSQL's channels: of what sets `changed`, and of what only wakes those who watch a task.
_CHANNEL: Final = "hunyuan_queue"
_WATCH_CHANNEL: Final = "hunyuan_watched_tasks"

log = logging.getLogger(__name__)


class Database:
    """Transactions, the clock, and an event that is set when a job or a worker has changed.

    On PostgreSQL every server that runs `listen` sees the changes of the others, and the clock is the database's, so
    that servers with different clocks agree when a lease expires; a step of that clock moves every lease. On SQLite it
    is a SteadyClock. `clock` replaces it: a function that returns seconds since the epoch. A worker is lost
    `worker_timeout` seconds after its last report, and so is its lease on a job. A transaction fails after
    `transaction_timeout` seconds.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        clock: Clock | None = None,
        worker_timeout: float = 60.0,
        transaction_timeout: float = _TRANSACTION_TIMEOUT,
    ) -> None:
        self._engine = engine
        self._writing = writing(engine)
        self._is_postgresql = engine.dialect.name == "postgresql"
        self._changed = asyncio.Event()
        self._watches = Watches()
        self._server_id = uuid.uuid4().hex
        self._listening = False
        self._clock = clock or SteadyClock()
        self._has_read_clock = False
        self._log_has_deleted = not self._is_postgresql  # an earlier start may have been killed
        self._transaction_timeout = transaction_timeout
        self.worker_timeout = worker_timeout
        self.reader = _reader(engine, transaction_timeout)

    @classmethod
    async def open(cls, url: str, **options: Any) -> Self:
        """Opens the database at `url` and migrates its tables. `options` are those of `__init__`.

        Raises:
            ValueError: `url` is not the address of a SQLite or PostgreSQL database.
            QueueUnavailableError: the database does not respond, or rejects the connection.
            QueueError: a newer release has migrated the database.
        """
        database = cls(await open_engine(database_url(url)), **options)
        try:
            await database.set_clock()
            await database._renew_leases()
        except BaseException:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        await self.reader.close()
        await self._engine.dispose()

    def clock(self) -> float:
        """Seconds since the epoch, by the database's clock."""
        return self._clock()

    async def set_clock(self) -> None:
        """Reads the database's clock. Raises QueueUnavailableError."""
        if not self._is_postgresql or not isinstance(self._clock, SteadyClock):
            return
        async with self.read() as connection:
            asked = self._clock()
            answer = await connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())"))
            moved = self._clock.set(float(answer) + (self._clock() - asked) / 2)
        if self._has_read_clock and abs(moved) > _CLOCK_STEP:
            log.warning(
                "the database's clock moved by %+.0f s, and every lease with it (HUNYUAN_WORKER_TIMEOUT); check the "
                "time service of the database's machine",
                moved,
            )
        self._has_read_clock = True

    def note_deleted(self) -> None:
        """Says that a transaction deletes credentials: `forget_deleted` then removes their traces."""
        self._log_has_deleted = True

    async def forget_deleted(self) -> None:
        """Removes the credentials of jobs that have ended from SQLite's write-ahead log. Call it now and then.

        PostgreSQL keeps old rows until it vacuums, and its own log as long as it is configured to.
        """
        if self._is_postgresql or not self._log_has_deleted:
            return
        self._log_has_deleted = False  # before the call: a job may end during it
        with _errors_translated():
            if not await empty_write_ahead_log(self._engine):
                self._log_has_deleted = True

    async def _renew_leases(self) -> None:
        """Gives the workers of running jobs `worker_timeout` to report to a server that has just started.

        Nobody watched an expired lease before. A lease in SQLite's file was made by the clock of an earlier start.
        """
        now = self.clock()
        unwatched = jobs.c.lease_expires_at < now if self._is_postgresql else true()
        async with self.write() as connection:
            await connection.execute(
                update(jobs)
                .where(jobs.c.state == JobState.RUNNING, unwatched)
                .values(lease_expires_at=now + self.worker_timeout)
            )
            await connection.execute(update(workers).where(workers.c.last_seen > now).values(last_seen=now))

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads. Raises QueueUnavailableError."""
        with _errors_translated():
            async with asyncio.timeout(self._transaction_timeout), self._engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def write(self, *, notify: bool = False, wake: str | None = None) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes and commits at the end of the block.

        `notify` sets `changed` on every server and wakes everybody who watches a task. `wake` only wakes those who
        watch this task, or those who watch any task if it is EVERY_TASK.

        Raises QueueUnavailableError.
        """
        with _errors_translated():
            async with asyncio.timeout(self._transaction_timeout), self._writing.begin() as connection:
                yield connection
                if self._is_postgresql and notify:
                    await _notify(connection, _CHANNEL, self._server_id)
                elif self._is_postgresql and wake is not None:
                    await _notify(connection, _WATCH_CHANNEL, f"{self._server_id} {wake}")
        if notify:
            self._set_changed()
        elif wake is not None:
            self._watches.wake(wake)

    async def claim_next(self, due: Select[Any], claim: Mapping[str, float]) -> Row[Any] | None:
        """The first job that `due` selects, as `reader.snapshot` needs it; None if there is none.

        The columns of `due` begin with the task id. `claim` are the values that keep every server from this job for a
        while. A read comes first: mostly nothing is due, and a transaction that writes would make others wait.
        """
        async with self.read() as connection:
            if await connection.scalar(due) is None:
                return None
        async with self.write() as connection:
            task_id = await connection.scalar(due.with_for_update(skip_locked=True))
            if task_id is None:
                return None
            claimed = await connection.execute(
                update(jobs)
                .where(jobs.c.task_id == task_id)
                .values(**claim)
                .returning(jobs, null().label("queue_position"))
            )
            job: Row[Any] = claimed.one()
            return job

    async def lock_submissions(self, connection: AsyncConnection) -> None:
        """Holds back every other transaction that adds a job, on every server, until this one ends.

        SQLite needs no lock: it runs one writing transaction at a time.
        """
        if self._is_postgresql:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": SUBMIT_LOCK})

    @property
    def changed(self) -> asyncio.Event:
        """The event that the next change sets. Get it before you read, or you miss a change in between."""
        return self._changed

    @property
    def poll_interval(self) -> float:
        """Seconds after which to read again even if `changed` is not set: a notification can be lost."""
        return _POLL_INTERVAL_LISTENING if self._listening else _POLL_INTERVAL

    def watching(self, task_id: str) -> AbstractContextManager[asyncio.Event]:
        """An event that is set when the task has changed. Clear it before you read, or you miss a change in between."""
        return self._watches.watching(task_id)

    @property
    def watch_interval(self) -> float:
        """Seconds after which to read a watched task again: like `poll_interval`, but SQLite misses no change."""
        return self.poll_interval if self._is_postgresql else _POLL_INTERVAL_LISTENING

    async def listen(self) -> None:
        """Sets `changed` when another server notifies, until cancelled. A SQLite database serves one server only."""
        if not self._is_postgresql:
            await asyncio.Event().wait()
        while True:
            try:
                await self._listen()
            except psycopg.Error as exc:
                log.warning("LISTEN failed; polling every %.0f s until it is back: %s", _POLL_INTERVAL, exc)
            finally:
                self._listening = False
            await asyncio.sleep(_LISTEN_RETRY)

    async def _listen(self) -> None:
        connecting = psycopg.AsyncConnection.connect(autocommit=True, **libpq_parameters(self._engine.url))
        async with await connecting as connection:
            for channel in (_CHANNEL, _WATCH_CHANNEL):
                await connection.execute(f"LISTEN {channel}")
            self._listening = True
            self._set_changed()  # a notification may have been missed before
            async for notification in connection.notifies():
                server_id, _, task_id = notification.payload.partition(" ")
                if server_id == self._server_id:
                    continue
                if notification.channel == _CHANNEL:
                    self._set_changed()
                else:
                    self._watches.wake(task_id)

    def _set_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._watches.wake()

    def is_alive(self) -> ColumnElement[bool]:
        """Selects the workers seen within `worker_timeout`."""
        return workers.c.last_seen > self.alive_since()

    def alive_since(self) -> float:
        """By `clock`: a worker is alive if it was seen after this moment."""
        return self.clock() - self.worker_timeout

    async def end_jobs(
        self,
        connection: AsyncConnection,
        state: JobState,
        *which: ColumnElement[bool],
        failure: JobFailure | None = None,
        **values: Any,
    ) -> int:
        """Moves the waiting and running jobs that `which` selects to a terminal state; returns how many there were.

        Deletes the credentials that came with them, except of failed jobs, which may be retried. In the same
        transaction, a job that ends without a video enters the outbox of the bucket, and its webhook becomes due.
        """
        values |= due_if_any(self.clock())
        if state is not JobState.COMPLETED:
            values["bucket_due_at"] = self.clock()
        if state is not JobState.FAILED:
            values["extras"] = None
        if failure is not None:
            values["failure"] = failure.model_dump(mode="json")
        now = self.clock()
        ended = await connection.execute(
            update(jobs)
            .where(jobs.c.state.in_((JobState.QUEUED, JobState.RUNNING)), *which)
            .values(state=state, finished_at=now, lease_expires_at=None, last_event=NEXT_EVENT, **values)
            .returning(jobs.c.seq)
        )
        numbers = [row.seq for row in ended]
        if numbers:
            self.note_deleted()
            await add_events(connection, now, jobs.c.seq.in_(numbers))
            await connection.execute(delete_previews(jobs.c.seq.in_(numbers)))
            await connection.execute(
                update(outcomes).where(outcomes.c.state == state).values(total=outcomes.c.total + len(numbers))
            )
        return len(numbers)


def _reader(engine: AsyncEngine, timeout: float) -> Reader:
    if engine.dialect.name == "postgresql":
        return PostgresReader(engine.url, timeout=timeout)
    assert engine.url.database is not None  # noqa: S101 - a SQLite queue is a file
    return SqliteReader(engine.url.database, timeout=timeout)


@contextmanager
def _errors_translated() -> Iterator[None]:
    """Raises QueueUnavailableError for a server that is stopped, frozen, or a replica that accepts no writes."""
    try:
        yield
    except (DBAPIError, PoolTimeoutError, TimeoutError) as exc:
        passing = OperationalError, InterfaceError, InternalError
        if isinstance(exc, DBAPIError) and not isinstance(exc, passing) and not exc.connection_invalidated:
            raise
        if isinstance(exc, OperationalError) and _is_disk_full(exc.orig):
            text = "The disk of the job queue's database is full: free space on it"
            log.error("%s (HUNYUAN_DATA_DIR, or the server of HUNYUAN_DATABASE_URL)", text)
            raise QueueUnavailableError(text) from exc
        raise QueueUnavailableError("The job queue's database does not answer") from exc


def _is_disk_full(error: BaseException | None) -> bool:
    sqlite_code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, psycopg.errors.DiskFull) or sqlite_code == sqlite3.SQLITE_FULL


async def _notify(connection: AsyncConnection, channel: str, payload: str) -> None:
    """PostgreSQL delivers it when this transaction commits."""
    await connection.execute(text("SELECT pg_notify(:channel, :payload)"), {"channel": channel, "payload": payload})


async def upsert(connection: AsyncConnection, table: Table, row: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Inserts `row`, or applies `changes` to the existing row with its primary key."""
    keys: Sequence[str] = [column.name for column in table.primary_key]
    statement = insert_into(connection, table).values(**row)
    await connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=dict(changes)))


async def fetch_one(connection: AsyncConnection, statement: Select[Any]) -> Row[Any] | None:
    """The only row of the result; None if it is empty."""
    row: Row[Any] | None = (await connection.execute(statement)).one_or_none()
    return row


async def fetch_all(connection: AsyncConnection, statement: Select[Any]) -> list[Row[Any]]:
    """All rows of the result."""
    return list(await connection.execute(statement))
