"""`hunyuan serve` as its users start it, in separate processes."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from pydantic import HttpUrl, SecretStr

from storage.bucket import Bucket
from storage.errors import StorageError
from storage.settings import BucketSettings

START_SECONDS = 120.0
RENDER_SECONDS = 180.0
#: A request whose video is rendered in the shortest time.
QUICK = {"duration": 5, "resolution": "720p", "num_inference_steps": 1}

T = TypeVar("T")


def free_port() -> int:
    """A port that is free, below those that the kernel gives to connections: no other process gets it meanwhile."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def eventually(what: str, look: Callable[[], T | None], seconds: float = 30.0) -> T:
    """Polls `look` until it returns something true and returns that; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {seconds:.0f} s; last seen: {seen!r}")
        time.sleep(0.05)


class Service:
    """`hunyuan serve` on loopback with its own data directory. `program` is what Python runs."""

    def __init__(
        self, directory: Path, program: Sequence[str] = ("-m", "hunyuan", "serve"), /, **environment: str
    ) -> None:
        self.directory = directory
        self._program = program
        self.port = free_port()
        self.address = f"http://{environment.get('HUNYUAN_HOST', '127.0.0.1')}:{self.port}"
        self.log = directory / "serve.log"
        self._environment: Mapping[str, str] = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("BUCKET_", "RUNPOD_"))},
            "HUNYUAN_HOST": "127.0.0.1",
            "HUNYUAN_PORT": str(self.port),
            "HUNYUAN_DATA_DIR": str(directory / "data"),
            "HUNYUAN_MODEL_PATH": "demo",
            "HUNYUAN_SHUTDOWN_GRACE": "0",
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(base_url=self.address, timeout=60)

    def launch(self) -> None:
        """Starts the server without waiting for it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self._program], env=self._environment, stdout=log, stderr=log
            )

    def start(self, *, until_ready: bool = True) -> None:
        self.launch()
        eventually(
            "the server's first answer" if not until_ready else "readiness",
            lambda: self._up(until_ready),
            START_SECONDS,
        )

    def _up(self, until_ready: bool) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the server exited:\n{self.log.read_text()}"
        try:
            up = self.http.get("/ready" if until_ready else "/health").status_code == 200
        except httpx.TransportError:
            return False
        return up and self._bucket_is_up()

    def _bucket_is_up(self) -> bool:
        """The server answers while its embedded bucket still starts."""
        if self._environment.get("BUCKET_ENDPOINT_URL"):
            return True
        try:
            Bucket(self.embedded_bucket(), attempts=1).check()
        except StorageError:
            return False
        return True

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(60)
        self.process = None
        return code

    def kill(self) -> None:
        """Sends SIGKILL to the server, not to its children."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        self.process = None

    def descendants(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker(self) -> psutil.Process:
        """The running worker process."""

        def look() -> psutil.Process | None:
            for process in self.descendants():
                try:
                    if process.cmdline()[1:3] == ["-m", "handler"] and process.ppid() == self.process_id:
                        return process
                except psutil.Error:
                    continue
            return None

        return eventually("a worker process", look)

    @property
    def process_id(self) -> int:
        assert self.process is not None
        return self.process.pid

    def embedded_bucket(self) -> BucketSettings:
        """The server's embedded bucket."""
        files = self.directory / "data" / "bucket"
        return BucketSettings(
            endpoint_url=HttpUrl(f"http://127.0.0.1:{(files / 'port').read_text()}"),
            access_key_id=(files / "access-key").read_text(),
            secret_access_key=SecretStr((files / "secret-key").read_text()),
        )

    def generate(self, **fields: Any) -> str:
        request = {"prompt": "A paper boat on a rainy street", "duration": 5, "resolution": "720p", **fields}
        response = self.http.post("/generate", json=request)
        assert response.status_code == 202, response.text
        task_id: str = response.json()["task_id"]
        return task_id

    def status(self, task_id: str) -> dict[str, Any]:
        response = self.http.get(f"/status/{task_id}")
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def finished(self, task_id: str, seconds: float = RENDER_SECONDS) -> dict[str, Any]:
        """Waits until the task is completed or failed, and returns that status."""

        def look() -> dict[str, Any] | None:
            answer = self.status(task_id)
            return None if answer["status"] == "processing" else answer

        return eventually(f"the end of task {task_id}", look, seconds)


@contextmanager
def running_service(directory: Path, **environment: str) -> Iterator[Service]:
    service = Service(directory, **environment)
    try:
        service.start()
        yield service
    finally:
        service.http.close()
        if service.process is not None:
            service.stop()


@contextmanager
def running_without_workers(directory: Path, **environment: str) -> Iterator[Service]:
    """A server that starts no workers, from its first answer on. It must end with exit code 0."""
    service = Service(directory, HUNYUAN_WORKERS="0", **environment)
    try:
        service.start(until_ready=False)
        yield service
    finally:
        service.http.close()
        assert service.stop() == 0, service.log.read_text()
