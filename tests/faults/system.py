"""The whole service: each part is a process to kill, and each connection passes a proxy that can break it."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, Self

import httpx
import psutil
from pydantic import HttpUrl

from shim.host.gateway import EmbeddedBucket
from shim.settings import child_environment
from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.fault_proxy import FaultProxy
from tests.support.postgres import Postgres, running_postgres
from tests.support.service import Service, eventually
from tests.support.worker_process import Note, WorkerProcess, bucket_environment, read_notes

TOKEN = secrets.token_hex(16)
SHIMS = 2
WORKERS = 4
#: Seconds without a request from a worker after which its lease expires.
WORKER_TIMEOUT = 15.0
#: Less than the number of clients, so that some receive QUEUE_FULL and wait.
MAX_QUEUE_SIZE = 8


class Part(Protocol):
    """A process of the system, with what a supervisor and the faults do to it."""

    name: str
    log: Path

    def start(self) -> None:
        """Starts the process without waiting for it."""

    def is_up(self) -> bool:
        """Whether it has started and handles signals."""

    def is_running(self) -> bool: ...

    def kill(self) -> None:
        """Sends SIGKILL and waits for the end."""

    def freeze(self) -> None:
        """SIGSTOP."""

    def thaw(self) -> None:
        """SIGCONT."""

    def terminate(self) -> int:
        """Asks it to shut down, and returns the exit code."""


class _Started:
    """Counts the lines of a log that say that a process has started."""

    def __init__(self, log: Path, line: str) -> None:
        self._log = log
        self._line = line
        self.starts = 0

    def is_up(self) -> bool:
        return self.starts > 0 and self._log.read_text(errors="replace").count(self._line) == self.starts


class ShimPart:
    """`hunyuan serve` without a worker."""

    def __init__(self, name: str, directory: Path, database_url: str, bucket: BucketSettings) -> None:
        self.name = name
        directory.mkdir()
        self.service = Service(
            directory,
            HUNYUAN_WORKERS="0",
            HUNYUAN_DATABASE_URL=database_url,
            HUNYUAN_PLATFORM_TOKEN=TOKEN,
            HUNYUAN_MAX_QUEUE_SIZE=str(MAX_QUEUE_SIZE),
            HUNYUAN_WORKER_TIMEOUT=str(WORKER_TIMEOUT),
            **bucket_environment(bucket),
        )
        self.log = self.service.log
        self._started = _Started(self.log, "listening on http://")

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.service.port

    def start(self) -> None:
        self._started.starts += 1
        self.service.launch()

    def is_up(self) -> bool:
        return self._started.is_up()

    def is_running(self) -> bool:
        return self.service.process is not None and self.service.process.poll() is None

    def kill(self) -> None:
        self.service.kill()

    def freeze(self) -> None:
        os.kill(self.service.process_id, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.service.process_id, signal.SIGCONT)

    def terminate(self) -> int:
        return self.service.stop()


class WorkerPart:
    """A worker. Restarts with the same id, as on RunPod, or with a new one, as `hunyuan worker` does."""

    def __init__(
        self,
        name: str,
        directory: Path,
        link: FaultProxy,
        bucket: BucketSettings,
        *,
        keeps_id: bool,
        step_seconds: float,
    ) -> None:
        self.name = name
        self.link = link
        self.worker = WorkerProcess(directory, bucket, platform=link.url, token=TOKEN, worker_id=name)
        self.log = self.worker.log
        self._keeps_id = keeps_id
        self._step_seconds = step_seconds
        self._started = _Started(self.log, "Starting Serverless Worker")

    def start(self) -> None:
        self._started.starts += 1
        if not self._keeps_id:
            self.worker.worker_id = f"{self.name}-{secrets.token_hex(4)}"
        self.worker.start("--step-seconds", str(self._step_seconds))

    def is_up(self) -> bool:
        return self._started.is_up()

    def is_running(self) -> bool:
        return self.worker.process is not None and self.worker.process.poll() is None

    def kill(self) -> None:
        self.worker.kill()

    def freeze(self) -> None:
        self.worker.freeze()

    def thaw(self) -> None:
        self.worker.thaw()

    def terminate(self) -> int:
        self.worker.terminate()
        try:
            return self.worker.wait(150)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL


class StorePart:
    """The S3 gateway that `hunyuan serve` embeds."""

    name = "store"

    def __init__(self, directory: Path) -> None:
        self.log = directory / "bucket" / "gateway.log"
        self._embedded = EmbeddedBucket(directory / "bucket")
        self.settings = self._embedded.settings
        asyncio.run(self._embedded.format())
        self._launch = asyncio.run(self._embedded.launch())
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.settings.endpoint_url.port or 80

    def reached_by(self, proxy: FaultProxy) -> BucketSettings:
        return self.settings.model_copy(update={"endpoint_url": HttpUrl(proxy.url)})

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._launch.command,
                env=child_environment(**self._launch.environment),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_up(self) -> bool:
        try:
            httpx.get(str(self.settings.endpoint_url), timeout=2)
        except httpx.TransportError:
            return False
        return True

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(30)

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def terminate(self) -> int:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(60)
        return 0  # JuiceFS chooses its exit code


class DatabasePart:
    """PostgreSQL."""

    name = "database"

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self.log = postgres.log
        self.url = postgres.create_database()

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self._postgres.port

    def reached_by(self, proxy: FaultProxy) -> str:
        return self.url.replace(f":{self._postgres.port}/", f":{proxy.port}/")

    def start(self) -> None:
        self._postgres.start()

    def is_up(self) -> bool:
        return True  # `start` has waited for it

    def is_running(self) -> bool:
        return self._postgres.is_running()

    def kill(self) -> None:
        self._postgres.kill()

    def freeze(self) -> None:
        self._postgres.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._postgres.send(signal.SIGCONT)

    def terminate(self) -> int:
        self._postgres.stop()
        return 0


class System:
    """Two servers, four workers, one PostgreSQL, one bucket. Each server has half of the workers."""

    def __init__(self, directory: Path, postgres: Postgres, stack: ExitStack, *, step_seconds: float) -> None:
        self.directory = directory
        self.store = StorePart(directory)
        self.database = DatabasePart(postgres)
        self.links: dict[str, FaultProxy] = {}

        def link(name: str, address: tuple[str, int]) -> FaultProxy:
            self.links[name] = stack.enter_context(FaultProxy(address))
            return self.links[name]

        database_url = self.database.reached_by(link("shims to database", self.database.address))
        shims_bucket = self.store.reached_by(link("shims to store", self.store.address))
        workers_bucket = self.store.reached_by(link("workers to store", self.store.address))
        self.shims = [
            ShimPart(f"shim{index}", directory / f"shim{index}", database_url, shims_bucket) for index in range(SHIMS)
        ]
        self.addresses = [link(f"clients to {shim.name}", shim.address).url for shim in self.shims]
        platforms = [link(f"workers to {shim.name}", shim.address) for shim in self.shims]
        self.workers = [
            WorkerPart(
                f"worker{index}",
                directory,
                platforms[index % SHIMS],
                workers_bucket,
                keeps_id=index < WORKERS // 2,
                step_seconds=step_seconds,
            )
            for index in range(WORKERS)
        ]

    @property
    def parts(self) -> list[Part]:
        return [self.store, self.database, *self._ours]

    @property
    def _ours(self) -> list[Part]:
        return [*self.workers, *self.shims]

    @property
    def bucket(self) -> Bucket:
        """The store, reached without a proxy."""
        return Bucket(self.store.settings)

    def start(self) -> Self:
        self.store.start()
        eventually("the store", self.store.is_up)
        self.bucket.create()
        for part in self._ours:
            part.start()
        eventually("all parts", lambda: all(part.is_up() for part in self.parts), 120)
        eventually("readiness", self._is_ready, 60)
        return self

    def _is_ready(self) -> bool:
        return all(shim.service.http.get("/health").json()["workers"]["ready"] == WORKERS for shim in self.shims)

    def stop(self) -> dict[str, int]:
        """Sends SIGTERM to the workers, then to the servers, then to the store. Returns the exit codes."""
        codes: dict[str, int] = {}
        groups: list[list[Part]] = [[*self.workers], [*self.shims], [self.store]]
        for group in groups:
            running = [part for part in group if part.is_running()]
            with ThreadPoolExecutor() as pool:
                ended = pool.map(lambda part: (part.name, part.terminate()), running)
                codes.update(ended)
        for shim in self.shims:
            shim.service.http.close()
        return codes

    def notes(self) -> list[Note]:
        return read_notes(self.directory / "notes.jsonl")

    def strays(self) -> list[psutil.Process]:
        """Processes that any server or worker left behind."""
        return [process for process in psutil.process_iter() if str(self.directory) in _directories(process)]

    def log_tails(self, lines: int = 25) -> str:
        return "\n".join(
            f"--- {part.name}\n" + "\n".join(part.log.read_text(errors="replace").splitlines()[-lines:])
            for part in self.parts
            if part.log.exists()
        )


def _directories(process: psutil.Process) -> str:
    """The directories in the environment that a process inherited from its server or worker."""
    try:
        environment: Mapping[str, str] = process.environ()
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
    except psutil.Error:
        return ""
    return environment.get("HUNYUAN_DATA_DIR", "") + environment.get("HUNYUAN_WORK_DIR", "")


@contextmanager
def running_system(directory: Path, *, step_seconds: float) -> Iterator[System]:
    """Yields the system when it is ready. Checks at the end that every process is gone."""
    with ExitStack() as stack:
        postgres = stack.enter_context(running_postgres())
        system = System(directory, postgres, stack, step_seconds=step_seconds)
        try:
            yield system.start()
        finally:
            for link in system.links.values():
                link.heal()
            codes = system.stop()
        assert set(codes.values()) <= {0}, codes
        deadline = time.monotonic() + 20
        while (strays := system.strays()) and time.monotonic() < deadline:
            psutil.wait_procs(strays, timeout=1)
        assert not strays, strays
