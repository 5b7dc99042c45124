"""The processes of the system, each with what a supervisor and the faults do to it."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import threading
from pathlib import Path
from typing import Protocol

import httpx
from pydantic import HttpUrl

from contract.worker import WorkerExit
from shim.host.gateway import EmbeddedBucket
from shim.settings import child_environment
from storage.settings import BucketSettings
from tests.support.fault_proxy import FaultProxy
from tests.support.postgres import Postgres
from tests.support.service import Service
from tests.support.worker_process import WorkerProcess, bucket_environment

TOKEN = secrets.token_hex(16)
#: Seconds without a request from a worker after which its lease expires.
WORKER_TIMEOUT = 15.0
#: Less than the number of clients, so that some receive QUEUE_FULL and wait.
MAX_QUEUE_SIZE = 8


class Part(Protocol):
    """A process of the system, with what a supervisor and the faults do to it."""

    name: str
    log: Path
    #: Held from a kill to the start after it, so that two drivers do not start the same part.
    lock: threading.RLock

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
        self.lock = threading.RLock()
        directory.mkdir()
        self.clock = directory / "clock"
        self.service = Service(
            directory,
            ("-m", "tests.support.stepped_clock", str(self.clock), "serve"),
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

    @property
    def data(self) -> Path:
        """HUNYUAN_DATA_DIR."""
        return self.service.directory / "data"

    def start(self) -> None:
        self._started.starts += 1
        self.service.launch()

    def restart(self) -> None:
        """Starts the server again after a start that it refused."""
        self._started.starts -= 1
        self.start()

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
        store_link: FaultProxy,
        bucket: BucketSettings,
        *,
        keeps_id: bool,
        step_seconds: float,
        stall_timeout: float,
    ) -> None:
        self.name = name
        self.lock = threading.RLock()
        self.link = link
        self.store_link = store_link
        self.stall_timeout = stall_timeout
        self.worker = WorkerProcess(
            directory,
            bucket,
            platform=link.url,
            token=TOKEN,
            worker_id=name,
            settings={"HUNYUAN_STALL_TIMEOUT": str(stall_timeout)},
        )
        self.log = self.worker.log
        self._keeps_id = keeps_id
        self._step_seconds = step_seconds
        self._started = _Started(self.log, "Starting Serverless Worker")

    def start(self) -> None:
        self._started.starts += 1
        if not self._keeps_id:
            self.worker.worker_id = f"{self.name}-{secrets.token_hex(4)}"
        self.worker.start("--full-size", "--step-seconds", str(self._step_seconds))

    def is_up(self) -> bool:
        return self._started.is_up()

    def is_running(self) -> bool:
        return self.pid() is not None

    def is_stuck(self) -> bool:
        """Whether it has ended itself because its render made no progress."""
        process = self.worker.process
        return process is not None and process.poll() == WorkerExit.RENDER_STUCK

    def pid(self) -> int | None:
        """The id of the running process."""
        process = self.worker.process
        return process.pid if process is not None and process.poll() is None else None

    def kill(self) -> None:
        self.worker.kill()

    def freeze(self) -> None:
        self.worker.freeze()

    def thaw(self) -> None:
        self.worker.thaw()

    def terminate(self) -> int:
        was_up = self.is_up()
        self.worker.terminate()
        try:
            code = self.worker.wait(150)
            # While Python imports the worker, no handler is set yet and there is no job to finish.
            return 0 if code == -signal.SIGTERM and not was_up else code
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL


class StorePart:
    """The S3 gateway that `hunyuan serve` embeds."""

    name = "store"

    def __init__(self, directory: Path) -> None:
        self.lock = threading.RLock()
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
        self.lock = threading.RLock()
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
