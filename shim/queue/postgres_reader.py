"""The reads of polls on PostgreSQL: prepared statements on connections of their own, through libpq.

The reads that arrive while one is under way go together as one statement, so a server has at most one lookup under way
however many clients poll. psycopg's cursors take as long as the rest of a poll, so this uses its wrapper of libpq.
Source: https://www.postgresql.org/docs/current/libpq-async.html.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import psycopg
from psycopg import pq
from psycopg.pq.abc import PGresult
from sqlalchemy import URL, func, text
from sqlalchemy.dialects import postgresql

from shim.queue.base import QueueUnavailableError
from shim.queue.engine import libpq_parameters
from shim.queue.reader import Batched, CountRow, JobRow, compiled, count_row, decode_json, select_counts, select_job
from shim.queue.schema import jobs

_DIALECT: Final = postgresql.dialect()  # type: ignore[no-untyped-call] # as in SQLAlchemy
_JOBS: Final = compiled(select_job(jobs.c.task_id == func.any(text("$1::varchar[]"))), _DIALECT)
_COUNTS: Final = compiled(select_counts(text("$1::float8")), _DIALECT)

_Row = Sequence[bytes | None]


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

    async def counts(self, alive_since: float) -> CountRow:
        counts = await self._counts.get(alive_since)
        assert counts is not None  # noqa: S101 - `_load_counts` returns every key
        return counts

    async def close(self) -> None:
        for part in (self._jobs, self._counts, self._job_statement, self._count_statement):
            await part.close()

    async def _load_jobs(self, task_ids: Sequence[str]) -> Mapping[str, JobRow]:
        rows = [_job_row(row) for row in await self._job_statement.rows(_array(task_ids))]
        return {row.task_id: row for row in rows}

    async def _load_counts(self, alive_since: Sequence[float]) -> Mapping[float, CountRow]:
        """The moments differ by less than the length of one read, so the last one stands for all."""
        rows = await self._count_statement.rows(repr(max(alive_since)).encode())
        counts = count_row([[_text(column) for column in row] for row in rows], decode_json)
        return dict.fromkeys(alive_since, counts)


class _Statement:
    """A prepared statement with one parameter, on a connection of its own. One call at a time."""

    def __init__(self, url: URL, statement: str, timeout: float) -> None:
        self._url = url
        self._statement = statement.encode()
        self._timeout = timeout
        self._session: _Session | None = None

    async def rows(self, parameter: bytes) -> Sequence[_Row]:
        """The rows, in PostgreSQL's text format. Raises QueueUnavailableError."""
        try:
            async with asyncio.timeout(self._timeout):
                rows = await self._rows_of_open_session(parameter)
                if rows is None:
                    self._session = await _Session.open(self._url, self._statement)
                    rows = await self._session.rows(parameter)
                return rows
        except (psycopg.Error, TimeoutError) as exc:
            await self.close()
            raise QueueUnavailableError("The job queue's database does not answer") from exc
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _rows_of_open_session(self, parameter: bytes) -> Sequence[_Row] | None:
        """None without a session, or if its connection is lost: the database was restarted since the last call."""
        if self._session is None:
            return None
        try:
            return await self._session.rows(parameter)
        except psycopg.OperationalError:
            await self.close()
            return None


class _Session:
    """A connection with one prepared statement."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self._libpq = connection.pgconn
        self._socket = self._libpq.socket
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] | None = None
        self._loop.add_reader(self._socket, self._wake)

    @classmethod
    async def open(cls, url: URL, statement: bytes) -> Self:
        connection = await psycopg.AsyncConnection.connect(autocommit=True, **libpq_parameters(url))
        session = cls(connection)
        try:
            session._libpq.send_prepare(b"", statement)
            await session._results()
        except BaseException:
            await session.close()
            raise
        return session

    async def rows(self, parameter: bytes) -> Sequence[_Row]:
        self._libpq.send_query_prepared(b"", [parameter])
        (result,) = await self._results()
        columns = range(result.nfields)
        return [[result.get_value(row, column) for column in columns] for row in range(result.ntuples)]

    async def close(self) -> None:
        self._loop.remove_reader(self._socket)
        await self._connection.close()

    async def _results(self) -> Sequence[PGresult]:
        """The results of what was sent. Raises psycopg.OperationalError."""
        while self._libpq.flush():
            await self._writable()
        results: list[PGresult] = []
        while True:
            while self._libpq.is_busy():
                await self._readable()
            result = self._libpq.get_result()
            if result is None:
                return results
            if result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
                raise psycopg.OperationalError(result.error_message.decode(errors="replace"))
            results.append(result)

    async def _readable(self) -> None:
        self._ready = self._loop.create_future()
        try:
            await self._ready
        finally:
            self._ready = None
        self._libpq.consume_input()

    async def _writable(self) -> None:
        writable = asyncio.Event()
        self._loop.add_writer(self._socket, writable.set)
        try:
            await writable.wait()
        finally:
            self._loop.remove_writer(self._socket)

    def _wake(self) -> None:
        """The socket has input. Between calls that is a notice, or the end of the connection: the next call fails."""
        if self._ready is not None:
            if not self._ready.done():
                self._ready.set_result(None)
            return
        try:
            self._libpq.consume_input()
        except psycopg.OperationalError:
            self._loop.remove_reader(self._socket)


def _job_row(row: _Row) -> JobRow:
    task_id, state, progress, stage, created_at, finished_at, output, failure, position = row
    return JobRow(
        task_id=_required(task_id),
        state=_required(state),
        progress=int(_required(progress)),
        stage=_text(stage),
        created_at=float(_required(created_at)),
        finished_at=float(finished_at) if finished_at is not None else None,
        output=decode_json(output),
        failure=decode_json(failure),
        queue_position=int(position) if position is not None else None,
    )


def _text(column: bytes | None) -> str | None:
    return column.decode() if column is not None else None


def _required(column: bytes | None) -> str:
    assert column is not None  # noqa: S101 - a column that cannot be NULL
    return column.decode()


def _array(values: Sequence[str]) -> bytes:
    """PostgreSQL's text form of an array. Source: https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO."""
    quoted = (value.replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return ("{" + ",".join(f'"{value}"' for value in quoted) + "}").encode()
