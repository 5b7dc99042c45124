"""The tables of the SQL queue, and how its database is opened."""

from __future__ import annotations

from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    event,
    func,
    insert,
    select,
)
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from handler.contract import Manifest
from shim.queue.base import JobState, QueueError

VERSION: Final = 1

metadata = MetaData()

#: `seq` orders the queue. A job that is queued again keeps its own, so it is back at the front.
jobs = Table(
    "jobs",
    metadata,
    Column("seq", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True),
    Column("task_id", String(128), nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("input", JSON, nullable=False),
    Column("extras", JSON(none_as_null=True)),  # s3Config and the like: wiped when the job ends
    Column("worker_id", String(128)),
    Column("attempts", Integer, nullable=False, default=0),
    Column("progress", Integer, nullable=False, default=0),
    Column("stage", String(32)),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("lease_expires_at", Float),
    Column("output", JSON(none_as_null=True)),
    Column("failure", JSON(none_as_null=True)),
    Column("stop_requested", Boolean, nullable=False, default=False),
    Column("stop_sent_at", Float),
)

# What waits, runs or must be stopped is found at the same cost however many jobs have ended.
Index("jobs_by_state", jobs.c.state, jobs.c.seq)
Index("jobs_by_worker", jobs.c.worker_id, jobs.c.state)
Index("jobs_to_stop", jobs.c.worker_id, jobs.c.stop_requested)

workers = Table(
    "workers",
    metadata,
    Column("worker_id", String(128), primary_key=True),
    Column("last_seen", Float, nullable=False),
    Column("state", String(16), nullable=False),
    Column("report", JSON(none_as_null=True)),
)

#: A running mean of render seconds, per kind of job.
render_times = Table(
    "render_times",
    metadata,
    Column("model", String(64), primary_key=True),
    Column("resolution", String(16), primary_key=True),
    Column("duration", Integer, primary_key=True),
    Column("mean", Float, nullable=False),
    Column("samples", Integer, nullable=False),
)

#: How many jobs have ended in each way: counted as they end, so that nobody has to count them all.
outcomes = Table(
    "outcomes",
    metadata,
    Column("state", String(16), primary_key=True),
    Column("total", BigInteger, nullable=False),
)

schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))


def valid_manifest(output: Any) -> Manifest | None:
    """A job's output, if it is what our handler returns."""
    try:
        return Manifest.model_validate(output)
    except ValidationError:
        return None


async def open_engine(url: str) -> AsyncEngine:
    """An engine on the database at `url`, its tables made where they are missing.

    Raises:
        QueueError: a newer release of the service made the database.
    """
    engine = create_async_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _configure_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
    try:
        async with writing(engine).begin() as connection:
            await connection.run_sync(_create)
    except BaseException:
        await engine.dispose()
        raise
    return engine


def writing(engine: AsyncEngine) -> AsyncEngine:
    """The same engine, for transactions that write."""
    return engine.execution_options(writes=True)


def _create(connection: Connection) -> None:
    metadata.create_all(connection)
    version = connection.scalar(select(func.max(schema_version.c.version)))
    if version is None:
        connection.execute(insert(schema_version).values(version=VERSION))
        connection.execute(insert(outcomes), [{"state": state, "total": 0} for state in JobState if state.is_terminal])
    elif version > VERSION:
        raise QueueError(f"the queue's database has version {version}, this release knows {VERSION}: upgrade it")


def _configure_sqlite(connection: Any, _: object) -> None:
    """WAL, so that readers never wait for a writer; FULL, so that an accepted task outlives a power cut, too.

    Source: https://www.sqlite.org/pragma.html#pragma_synchronous. An fsync for each commit is nothing beside a render.
    """
    connection.isolation_level = None  # SQLAlchemy, not the driver, begins transactions
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "busy_timeout = 10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """A transaction that will write takes the lock at once: an upgrade half-way would fail instead of waiting."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
