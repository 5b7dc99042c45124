"""The reads of polls on SQLite, in the event loop.

In WAL mode a reader never waits for a writer (https://www.sqlite.org/wal.html#concurrency), and a lookup takes tens of
microseconds, less than a switch to a thread. But a lookup that has to wait for the disk stops the whole event loop. So
after a slow lookup the lookups of the next seconds run in a thread, as does one that finds the database locked: while
another program recovers or converts it.
"""

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.dialects import sqlite

from shim.queue.base import QueueSummary, QueueUnavailableError
from shim.queue.reader import Batched, JobRow, compiled, select_counts, select_job, summary
from shim.queue.schema import jobs

#: Seconds. A lookup that takes longer has waited for the disk; the lookups of the next `_SLOW_SECONDS` use a thread.
_SLOW_LOOKUP: Final = 0.1
_SLOW_SECONDS: Final = 10.0
#: Seconds that a lookup in the thread waits for a lock.
_LOCK_SECONDS: Final = 10.0
_LOCKED: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})

_JOB: Final = compiled(select_job(jobs.c.task_id == text("?")), sqlite.dialect())
_COUNTS: Final = compiled(select_counts(text("?")), sqlite.dialect())

#: A statement and its parameter.
_Query = tuple[str, str | float]
_Rows = Sequence[Sequence[Any]]

sqlite3.register_converter("JSON", json.loads)
log = logging.getLogger(__name__)


class SqliteReader:
    """A `Reader` of the database file at `path`. A read in the thread fails after `timeout` seconds."""

    def __init__(self, path: str, *, timeout: float) -> None:
        self._connection = _connect(path, lock_seconds=0)
        self._connection_of_thread = _connect(path, lock_seconds=_LOCK_SECONDS)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slow-reads")
        self._in_thread: Batched[_Query, _Rows] = Batched(self._load_in_thread)
        self._timeout = timeout
        self._slow_until = 0.0

    async def job(self, task_id: str) -> JobRow | None:
        rows = await self._rows(_JOB, task_id)
        return JobRow._make(rows[0]) if rows else None

    async def counts(self, alive_since: float) -> QueueSummary:
        return summary(await self._rows(_COUNTS, alive_since))

    async def close(self) -> None:
        await self._in_thread.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._connection.close()
        self._connection_of_thread.close()

    async def _rows(self, statement: str, parameter: str | float) -> _Rows:
        started = time.monotonic()
        if started >= self._slow_until and (rows := self._read_at_once(statement, parameter)) is not None:
            seconds = time.monotonic() - started
            if seconds > _SLOW_LOOKUP:
                self._slow_until = started + seconds + _SLOW_SECONDS
                log.warning(
                    "a lookup in the SQLite queue took %.0f ms; lookups run in a thread for %.0f s. If this repeats, "
                    "the disk of HUNYUAN_DATA_DIR is slow",
                    seconds * 1000,
                    _SLOW_SECONDS,
                )
            return rows
        return await self._in_thread.get((statement, parameter)) or ()

    def _read_at_once(self, statement: str, parameter: str | float) -> _Rows | None:
        """The rows; None if the database is locked. `fetchall` ends the read, or a checkpoint would wait for it."""
        try:
            return self._connection.execute(statement, (parameter,)).fetchall()
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF in _LOCKED:  # the low byte is the code without its details
                return None
            raise _unavailable() from exc

    async def _load_in_thread(self, queries: Sequence[_Query]) -> Mapping[_Query, _Rows]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                return await loop.run_in_executor(self._thread, self._read_all, queries)
        except (sqlite3.OperationalError, TimeoutError) as exc:
            raise _unavailable() from exc

    def _read_all(self, queries: Sequence[_Query]) -> Mapping[_Query, _Rows]:
        return {query: self._connection_of_thread.execute(query[0], query[1:]).fetchall() for query in queries}


def _connect(path: str, *, lock_seconds: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path,
        timeout=lock_seconds,
        isolation_level=None,
        check_same_thread=False,
        detect_types=sqlite3.PARSE_DECLTYPES,  # decodes JSON columns with the converter above
    )
    connection.execute("PRAGMA query_only = ON")
    return connection


def _unavailable() -> QueueUnavailableError:
    return QueueUnavailableError("The job queue's database does not answer")
