"""Opens and migrates the SQL queue's database: SQLite on one machine, PostgreSQL for several servers."""

import errno
import os
import sqlite3
import stat
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import alembic.command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Table, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from contract.retry import RetryPolicy
from shim.queue.base import QueueError, QueueUnavailableError

#: PostgreSQL identifies an advisory lock by a number within the database.
MIGRATION_LOCK: Final = 1_500_001
SUBMIT_LOCK: Final = 1_500_002
INSTANCE_LOCK: Final = 1_500_003  # with a second number, the hash of the instance id
#: Milliseconds that SQLite waits for a lock; for readers that keep it from emptying the write-ahead log, while no
#: writer can begin.
_BUSY_TIMEOUT: Final = 10_000
_CHECKPOINT_TIMEOUT: Final = 200
_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_OPEN: Final = RetryPolicy(first=0.05, longest=0.5, total=10.0)

#: libpq's parameters, https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS. With them the
#: loss of the server or of the network shows within seconds, not after the kernel's 15 minutes.
_POSTGRESQL: Final = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "application_name": "hunyuan",
    "options": "-c statement_timeout=15s -c lock_timeout=10s -c idle_in_transaction_session_timeout=60s",
}


def database_url(text: str) -> URL:
    """Parses `sqlite:///file` or `postgresql://user:password@host/database` and adds the driver.

    Raises:
        ValueError: `text` is neither.
    """
    try:
        url = make_url(text)
    except ArgumentError as exc:
        raise ValueError("takes postgresql://user:password@host:5432/database") from exc
    match url.get_backend_name():
        case "sqlite":
            return url.set(drivername="sqlite+aiosqlite")
        case "postgresql" | "postgres":
            return url.set(drivername="postgresql+psycopg")
        case other:
            raise ValueError(f"takes postgresql://user:password@host:5432/database, not {other}")


async def open_engine(url: URL) -> AsyncEngine:
    """Opens the database at `url` and migrates its tables.

    Raises:
        QueueUnavailableError: the database does not respond, or rejects the connection.
        QueueError: a newer release has migrated the database.
    """
    return await _open(url, migrate)


async def _open(url: URL, change: Callable[[Connection], None]) -> AsyncEngine:
    engine = _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url)

    async def begin() -> None:
        try:
            async with writing(engine).begin() as connection:
                await connection.run_sync(change)
        except DBAPIError as exc:
            raise QueueUnavailableError(f"cannot open the database {url.render_as_string()}: {exc.orig}") from exc

    try:
        await _OPEN.async_retrying(_is_locked, what="opening the job queue")(begin)
    except BaseException:
        await engine.dispose()
        raise
    return engine


def _is_locked(error: BaseException) -> bool:
    """SQLite does not wait for a lock, whatever its busy timeout, while another program switches a new file to WAL."""
    cause = error.__cause__
    return isinstance(cause, DBAPIError) and getattr(cause.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY


def writing(engine: AsyncEngine) -> AsyncEngine:
    """The same engine for transactions that write: `_begin_sqlite` locks the database for them."""
    return engine.execution_options(writes=True)


def migrate(connection: Connection, revision: str = "head") -> None:
    """Migrates the tables to `revision` and keeps their rows. Other servers that migrate at the same time wait."""
    _lock_migrations(connection)
    if revision == "head" and MigrationContext.configure(connection).get_current_revision() == _newest():
        return
    try:
        alembic.command.upgrade(_alembic(connection), revision)
    except CommandError as exc:
        raise QueueError(
            "a newer release has migrated the database: upgrade this server to that release, or run `hunyuan "
            f"downgrade-queue {_newest()}` with that release while all servers are stopped ({exc})"
        ) from exc


async def downgrade(url: URL, revision: str) -> None:
    """Migrates the tables back to `revision`, for an older release. Rows stay; columns added since then are lost.

    Raises:
        QueueUnavailableError: the database does not respond, or rejects the connection.
        QueueError: `revision` is unknown, or newer than the database's.
    """
    engine = await _open(url, partial(_downgrade, revision=revision))
    await engine.dispose()


def _downgrade(connection: Connection, revision: str) -> None:
    _lock_migrations(connection)
    config = _alembic(connection)
    known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    if revision not in known:
        raise QueueError(f"there is no revision {revision}; this release knows {', '.join(sorted(known))}")
    try:
        alembic.command.downgrade(config, revision)
    except CommandError as exc:
        raise QueueError(f"the database can't be downgraded to revision {revision}: {exc}") from exc


def _lock_migrations(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})


@cache
def _newest() -> str | None:
    """The newest revision that this release knows."""
    return ScriptDirectory(_MIGRATIONS).get_current_head()


def _alembic(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def _postgresql(url: URL) -> AsyncEngine:
    return create_async_engine(
        url,
        connect_args=connection_parameters(url),
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=10,
        pool_timeout=5,
        hide_parameters=True,  # an error's text must not hold a prompt
    )


def libpq_parameters(url: URL) -> dict[str, Any]:
    """What psycopg needs to connect to `url`. Not as a URL: SQLAlchemy renders a space as "+", which libpq keeps."""
    address = url.translate_connect_args(database="dbname", username="user")
    return {**address, **url.query, **connection_parameters(url)}


def connection_parameters(url: URL) -> dict[str, Any]:
    """The parameters of a PostgreSQL connection, except those that the URL sets."""
    return {name: value for name, value in _POSTGRESQL.items() if name not in url.query}


def _sqlite(url: URL) -> AsyncEngine:
    _make_private(url)
    engine = create_async_engine(url, hide_parameters=True)
    event.listen(engine.sync_engine, "connect", _configure_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _make_private(url: URL) -> None:
    """Lets only the owner read the database, whatever its directory allows. SQLite gives new files the database's mode.

    Raises:
        QueueUnavailableError: the file can't be created or is another user's.
    """
    if not url.database or url.database == ":memory:":
        return
    path = Path(url.database)
    try:
        _create(path)
        for file in (path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))):
            if file.exists() and stat.S_IMODE(file.stat().st_mode) != 0o600:
                file.chmod(0o600)
    except OSError as exc:
        raise QueueUnavailableError(f"cannot open the database {path}: {exc.strerror}") from exc


def _create(path: Path) -> None:
    """An empty file, if there is none. An existing one is not opened: closing it would end SQLite's locks on it.

    Source: https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled_by_a_separate_thread_doing_close_
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def _configure_sqlite(connection: Any, _: object) -> None:
    """WAL: readers never wait for a writer. FULL: an accepted task survives a power cut, at one fsync for each commit.

    Deleted content is overwritten with zeros: https://www.sqlite.org/pragma.html#pragma_secure_delete.
    Source: https://www.sqlite.org/pragma.html#pragma_synchronous.
    """
    connection.isolation_level = None  # SQLAlchemy, not the driver, begins transactions
    cursor = connection.cursor()
    pragmas = "journal_mode = WAL", "synchronous = FULL", "secure_delete = ON", "foreign_keys = ON"
    for pragma in (*pragmas, f"busy_timeout = {_BUSY_TIMEOUT}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """Locks for a writing transaction at its start, because SQLite fails to upgrade a read lock instead of waiting."""
    options = connection.get_execution_options()
    if options.get("transaction", True):
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writes", False) else "BEGIN")


async def empty_write_ahead_log(engine: AsyncEngine) -> bool:
    """Moves SQLite's write-ahead log into the database and empties it, so that it holds nothing that was deleted.

    Returns False if a reader needs the log for longer than a moment.
    """
    async with engine.execution_options(transaction=False).connect() as connection:
        await connection.exec_driver_sql(f"PRAGMA busy_timeout = {_CHECKPOINT_TIMEOUT}")
        try:
            busy = await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            is_done: bool = busy.scalar_one() == 0
        finally:
            await connection.exec_driver_sql(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT}")
    return is_done


def insert_into(connection: AsyncConnection, table: Table) -> Any:
    """The database's own INSERT, which can have an ON CONFLICT clause."""
    own: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    return own.insert(table)
