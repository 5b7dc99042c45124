"""The SQL queue's database, as both of its sides use it."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, Self

import psycopg
from sqlalchemy import ColumnElement, Row, Select, Table, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from shim.queue.base import JobState, QueueUnavailableError
from shim.queue.engine import SUBMIT_LOCK, connection_parameters, database_url, open_engine, writing
from shim.queue.schema import jobs, outcomes, workers

#: Seconds after which to look for what nobody rang for: where other servers are not heard, and where they are.
_LOOK_AGAIN: Final = 1.0
_LOOK_AGAIN_LISTENING: Final = 10.0
_LISTEN_AGAIN: Final = 1.0
#: Seconds that a transaction may take. The server ends long statements by itself, but not one that is frozen or cut
#: off. To cancel it takes the driver up to 10 s more.
_PATIENCE: Final = 20.0
_CHANNEL: Final = "hunyuan_queue"

log = logging.getLogger(__name__)


class Database:
    """Transactions, the time, and a bell that rings when there is something new to look for.

    On PostgreSQL the bell is heard by every server on the same database, as long as `listen` runs in each; and the
    time is the database's, so that servers whose clocks differ agree on when a lease lapses. `clock` gives seconds
    since the epoch in its place. A worker counts as there for `worker_timeout` seconds after it was last seen. A
    transaction that takes longer than `patience` seconds is given up.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        clock: Callable[[], float] | None = None,
        worker_timeout: float = 60.0,
        patience: float = _PATIENCE,
    ) -> None:
        self._engine = engine
        self._writing = writing(engine)
        self._is_postgresql = engine.dialect.name == "postgresql"
        self._changed = asyncio.Event()
        self._name = uuid.uuid4().hex
        self._listening = False
        self._clock = clock
        self._ahead = 0.0
        self._patience = patience
        self.worker_timeout = worker_timeout

    @classmethod
    async def open(cls, url: str, **options: Any) -> Self:
        """The database at `url`, its tables made or brought up to date. The options are those of `__init__`.

        Raises:
            ValueError: `url` is no address of a database that we know.
            QueueUnavailableError: it does not answer, or refuses us.
            QueueError: a newer release of the service made it.
        """
        database = cls(await open_engine(database_url(url)), **options)
        try:
            await database.set_clock()
        except BaseException:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        """Let go of its connections."""
        await self._engine.dispose()

    def clock(self) -> float:
        """Seconds since the epoch, by the database's clock."""
        return self._clock() if self._clock is not None else time.time() + self._ahead

    async def set_clock(self) -> None:
        """Ask the database for the time. Raises QueueUnavailableError."""
        if not self._is_postgresql or self._clock is not None:
            return
        async with self.read() as connection:
            asked = time.time()
            answer = await connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())"))
            self._ahead = float(answer) - (asked + time.time()) / 2

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads. Raises QueueUnavailableError."""
        with _translated():
            async with asyncio.timeout(self._patience), self._engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def write(self, *, rings: bool = False) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes, committed at the end of the block, and then rings if it `rings`.

        Raises QueueUnavailableError.
        """
        with _translated():
            async with asyncio.timeout(self._patience), self._writing.begin() as connection:
                yield connection
                if rings and self._is_postgresql:  # delivered if and when this transaction is committed
                    await connection.execute(
                        text("SELECT pg_notify(:channel, :name)"), {"channel": _CHANNEL, "name": self._name}
                    )
        if rings:
            self._ring()

    async def admit_one_by_one(self, connection: AsyncConnection) -> None:
        """Until its transaction ends, hold back every other one that adds to the queue, on every server.

        SQLite lets in one writer at a time anyway.
        """
        if self._is_postgresql:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": SUBMIT_LOCK})

    @property
    def changed(self) -> asyncio.Event:
        """Set when the bell rings next. Get it before you look."""
        return self._changed

    @property
    def look_again(self) -> float:
        """Seconds after which to look even if the bell was not heard."""
        return _LOOK_AGAIN_LISTENING if self._listening else _LOOK_AGAIN

    async def listen(self) -> None:
        """Hear the bells that other servers ring, until cancelled. SQLite serves one server: there are no others."""
        if not self._is_postgresql:
            await asyncio.Event().wait()
        while True:
            try:
                await self._listen()
            except psycopg.Error as exc:
                log.warning("the bells of other servers are not heard: %s", exc)
            finally:
                self._listening = False
            await asyncio.sleep(_LISTEN_AGAIN)

    async def _listen(self) -> None:
        url = self._engine.url
        address = url.set(drivername="postgresql").render_as_string(hide_password=False)
        connecting = psycopg.AsyncConnection.connect(address, autocommit=True, **connection_parameters(url))
        async with await connecting as connection:
            await connection.execute(f"LISTEN {_CHANNEL}")
            self._listening = True
            self._ring()  # for what was missed
            async for notification in connection.notifies():
                if notification.payload != self._name:
                    self._ring()

    def _ring(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def is_alive(self) -> ColumnElement[bool]:
        """Whether a worker was seen lately."""
        return workers.c.last_seen > self.clock() - self.worker_timeout


@contextmanager
def _translated() -> Iterator[None]:
    """A server that is away, stops, or is a replica that takes no writes just now, is one that does not answer."""
    try:
        yield
    except (OperationalError, InterfaceError, InternalError, PoolTimeoutError, TimeoutError) as exc:
        raise QueueUnavailableError("The job queue's database does not answer") from exc
    except DBAPIError as exc:
        if not exc.connection_invalidated:
            raise
        raise QueueUnavailableError("The job queue's database does not answer") from exc


def is_live() -> ColumnElement[bool]:
    """Whether a job waits or runs."""
    return jobs.c.state.in_((JobState.QUEUED, JobState.RUNNING))


async def end(
    connection: AsyncConnection, now: float, state: JobState, *which: ColumnElement[bool], **values: Any
) -> int:
    """End the live jobs that `which` names, and count them; how many there were.

    Their keys are wiped, except a failed job's, which may be retried.
    """
    if state is not JobState.FAILED:
        values["extras"] = None
    ended = await connection.execute(
        update(jobs).where(is_live(), *which).values(state=state, finished_at=now, lease_expires_at=None, **values)
    )
    if ended.rowcount:
        await connection.execute(
            update(outcomes).where(outcomes.c.state == state).values(total=outcomes.c.total + ended.rowcount)
        )
    return ended.rowcount


async def upsert(connection: AsyncConnection, table: Table, row: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Insert `row`, or make the `changes` to the row that has its primary key already."""
    insert: Any = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    keys: Sequence[str] = [column.name for column in table.primary_key]
    await connection.execute(insert(table).values(**row).on_conflict_do_update(index_elements=keys, set_=dict(changes)))


async def fetch_one(connection: AsyncConnection, statement: Select[Any]) -> Row[Any] | None:
    """The one row there is, or None."""
    row: Row[Any] | None = (await connection.execute(statement)).one_or_none()
    return row


async def fetch_all(connection: AsyncConnection, statement: Select[Any]) -> list[Row[Any]]:
    """Every row."""
    return list(await connection.execute(statement))
