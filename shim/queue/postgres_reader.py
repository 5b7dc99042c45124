"""The reads of polls on PostgreSQL: prepared statements on connections of their own, through libpq.

The reads that arrive while one is under way go together as one statement, so a server has at most one lookup under way
however many clients poll. psycopg's cursors take as long as the rest of a poll, so this uses the parts that they are
made of: the wrapper of libpq, the generator that waits for results, and the transformer that decodes them.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer
from psycopg.generators import execute
from psycopg.pq.abc import PGresult
from psycopg.waiting import wait_async
from sqlalchemy import URL, func, text
from sqlalchemy.dialects import postgresql

from shim.queue.base import QueueSummary, QueueUnavailableError
from shim.queue.engine import libpq_parameters
from shim.queue.reader import Batched, JobRow, compiled, select_counts, select_job, summary
from shim.queue.schema import jobs

_DIALECT: Final = postgresql.dialect()  # type: ignore[no-untyped-call] # as in SQLAlchemy
_JOBS: Final = compiled(select_job(jobs.c.task_id == func.any(text("$1::varchar[]"))), _DIALECT)
_COUNTS: Final = compiled(select_counts(text("$1::float8")), _DIALECT)
_SUCCEEDED: Final = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)
#: Seconds after which psycopg wakes up to look for signals.
_WAKE_UP: Final = 1.0


class PostgresReader:
    """A `Reader` of the database at `url`. A read fails after `timeout` seconds. It connects at the first read."""

    def __init__(self, url: URL, *, timeout: float) -> None:
        self._job_statement = _Statement(url, _JOBS, timeout)
        self._count_statement = _Statement(url, _COUNTS, timeout)
        self._jobs = Batched(self._load_jobs)
        self._counts = Batched(self._load_counts)

    async def job(self, task_id: str) -> JobRow | None:
        if "\0" in task_id:  # PostgreSQL's strings end there
            return None
        return await self._jobs.get(task_id)

    async def counts(self, alive_since: float) -> QueueSummary:
        counts = await self._counts.get(alive_since)
        assert counts is not None  # noqa: S101 - `_load_counts` returns every key
        return counts

    async def close(self) -> None:
        for part in (self._jobs, self._counts, self._job_statement, self._count_statement):
            await part.close()

    async def _load_jobs(self, task_ids: Sequence[str]) -> Mapping[str, JobRow]:
        rows = [JobRow._make(row) for row in await self._job_statement.rows(_array(task_ids))]
        return {row.task_id: row for row in rows}

    async def _load_counts(self, alive_since: Sequence[float]) -> Mapping[float, QueueSummary]:
        """The moments differ by less than the length of one read, so the last one stands for all."""
        counts = summary(await self._count_statement.rows(repr(max(alive_since)).encode()))
        return dict.fromkeys(alive_since, counts)


class _Statement:
    """A prepared statement with one parameter, on a connection of its own. One call at a time."""

    def __init__(self, url: URL, statement: str, timeout: float) -> None:
        self._url = url
        self._statement = statement.encode()
        self._timeout = timeout
        self._connection: psycopg.AsyncConnection[Any] | None = None

    async def rows(self, parameter: bytes) -> Sequence[tuple[Any, ...]]:
        """The rows for a parameter in PostgreSQL's text format. Raises QueueUnavailableError."""
        try:
            async with asyncio.timeout(self._timeout):
                if self._connection is not None:
                    try:
                        return await self._execute(self._connection, parameter)
                    except psycopg.OperationalError:  # the database was restarted since the last call
                        await self.close()
                return await self._execute(await self._connect(), parameter)
        except (psycopg.Error, TimeoutError) as exc:
            await self.close()
            raise QueueUnavailableError("The job queue's database does not answer") from exc
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        connection = await psycopg.AsyncConnection.connect(autocommit=True, **libpq_parameters(self._url))
        self._connection = connection
        connection.pgconn.send_prepare(b"", self._statement)
        await _result(connection)
        return connection

    async def _execute(self, connection: psycopg.AsyncConnection[Any], parameter: bytes) -> Sequence[tuple[Any, ...]]:
        connection.pgconn.send_query_prepared(b"", [parameter])
        result = await _result(connection)
        transformer = Transformer(connection)
        transformer.set_pgresult(result)
        return transformer.load_rows(0, result.ntuples, tuple)


async def _result(connection: psycopg.AsyncConnection[Any]) -> PGresult:
    """The result of what was sent. Raises psycopg.OperationalError."""
    result: PGresult
    (result,) = await wait_async(execute(connection.pgconn), connection.pgconn.socket, _WAKE_UP)
    if result.status not in _SUCCEEDED:
        raise psycopg.OperationalError(result.error_message.decode(errors="replace"))
    return result


def _array(values: Sequence[str]) -> bytes:
    """PostgreSQL's text form of an array. Source: https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO."""
    quoted = (value.replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return ("{" + ",".join(f'"{value}"' for value in quoted) + "}").encode()
