"""The SQL queue's database, as both of its sides use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

from sqlalchemy import ColumnElement, Row, Select, update
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from shim.queue.base import JobState, QueueUnavailableError
from shim.queue.schema import jobs, open_engine, outcomes, workers, writing


class Database:
    """Transactions, the time, and a bell that rings when there is something new to look for.

    `clock` gives seconds since the epoch. A worker counts as there for `worker_timeout` seconds after it was last seen.
    """

    def __init__(
        self, engine: AsyncEngine, *, clock: Callable[[], float] = time.time, worker_timeout: float = 60.0
    ) -> None:
        self._engine = engine
        self._writing = writing(engine)
        self._changed = asyncio.Event()
        self.clock = clock
        self.worker_timeout = worker_timeout

    @classmethod
    async def open(cls, url: str, *, clock: Callable[[], float] = time.time, worker_timeout: float = 60.0) -> Self:
        """The database at `url` (SQLAlchemy's form), its tables made where they are missing."""
        return cls(await open_engine(url), clock=clock, worker_timeout=worker_timeout)

    async def close(self) -> None:
        """Let go of its connections."""
        await self._engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads. Raises QueueUnavailableError."""
        with _translated():
            async with self._engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes, committed at the end of the block. Raises QueueUnavailableError."""
        with _translated():
            async with self._writing.begin() as connection:
                yield connection

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next `ring`. Get it before you look."""
        return self._changed

    def ring(self) -> None:
        """Wake everyone who waits for `changed`."""
        self._changed.set()
        self._changed = asyncio.Event()

    def is_alive(self) -> ColumnElement[bool]:
        """Whether a worker was seen lately."""
        return workers.c.last_seen > self.clock() - self.worker_timeout


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeoutError) as exc:
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


async def fetch_one(connection: AsyncConnection, statement: Select[Any]) -> Row[Any] | None:
    """The one row there is, or None."""
    row: Row[Any] | None = (await connection.execute(statement)).one_or_none()
    return row


async def fetch_all(connection: AsyncConnection, statement: Select[Any]) -> list[Row[Any]]:
    """Every row."""
    return list(await connection.execute(statement))
