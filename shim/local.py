"""One machine: the embedded S3 gateway and the worker processes, kept running for as long as the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import HttpUrl, SecretStr

from shim.settings import child_environment
from storage.settings import BucketSettings

#: Seconds before a process that died is started again: the first time, the second, ... and from then on.
_BACK_OFF: Final = (0.5, 1, 2, 5, 10, 30)
#: A process that ran for so many seconds had started well: the next back-off begins anew.
_SETTLED: Final = 60.0
_GATEWAY_START: Final = 30.0

log = logging.getLogger(__name__)


class LocalError(Exception):
    """A part of the local service can't be started; the message says what to do."""


@dataclass(frozen=True)
class Launch:
    """One life of a process: how to start it, where its output goes (None: ours), and whom its end concerns.

    `ended` is given the exit code (negative: the signal) and whether the process was asked to end.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    ended: Callable[[int, bool], Awaitable[None]]
    output: Path | None = None


class Supervised:
    """A process that is started again, with back-off, whenever it ends before `stop`.

    It runs in a session of its own, so that a Ctrl-C in our terminal is ours to handle, and what it leaves behind
    in its process group goes with it. It can't outlive us: see `shim.tether`.
    """

    def __init__(
        self, name: str, launch: Callable[[], Awaitable[Launch]], on_restart: Callable[[], None] = lambda: None
    ) -> None:
        self._name = name
        self._launch = launch
        self._on_restart = on_restart
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        """Keep the process running until `stop`. Raises what `Launch.ended` raises."""
        failures = 0
        while not self._stopping.is_set():
            launch = await self._launch()
            started = time.monotonic()
            code = await self._live(launch)
            await launch.ended(code, self._stopping.is_set())
            if self._stopping.is_set():
                return
            failures = 0 if time.monotonic() - started > _SETTLED else failures
            delay = _BACK_OFF[min(failures, len(_BACK_OFF) - 1)]
            failures += 1
            log.warning("%s ended with code %d; starting it again in %.1f s", self._name, code, delay)
            self._on_restart()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def _live(self, launch: Launch) -> int:
        tethered = [sys.executable, "-m", "shim.tether", str(os.getpid()), *launch.command]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(launch.output.open("ab")) if launch.output else None
            process = await asyncio.create_subprocess_exec(
                *tethered,
                env=launch.environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._process = process
        if self._stopping.is_set():  # `stop` came while the process was being made and saw none
            process.terminate()
        try:
            return await process.wait()
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            self._process = None

    async def stop(self, grace: float) -> None:
        """SIGTERM, and after `grace` seconds SIGKILL. Returns when the process is gone."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace)
        except TimeoutError:
            log.warning("%s did not end within %.0f s of SIGTERM", self._name, grace)
            _signal_group(process.pid, signal.SIGKILL)
            await process.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


class EmbeddedBucket:
    """The S3 gateway that serves a folder: `juicefs gateway`, MinIO's S3 front over local files.

    Source: https://juicefs.com/docs/community/guide/gateway. It listens on loopback only. Its keys and its port are
    made once and kept beside the data, so that presigned URLs survive a restart.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._program = _program("juicefs")
        directory.mkdir(parents=True, exist_ok=True)
        self._access_key = secret_file(directory / "access-key", lambda: secrets.token_hex(8))
        self._secret_key = secret_file(directory / "secret-key", lambda: secrets.token_hex(24))
        self._port = _kept_port(directory / "port")

    @property
    def settings(self) -> BucketSettings:
        """How to reach the bucket."""
        return BucketSettings(
            endpoint_url=HttpUrl(f"http://127.0.0.1:{self._port}"),
            access_key_id=self._access_key,
            secret_access_key=SecretStr(self._secret_key),
        )

    def environment(self) -> dict[str, str]:
        """The same for a worker, in RunPod's names."""
        return {
            "BUCKET_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "BUCKET_ACCESS_KEY_ID": self._access_key,
            "BUCKET_SECRET_ACCESS_KEY": self._secret_key,
            "BUCKET_NAME": self.settings.name,
        }

    async def format(self) -> None:
        """Create the volume on the first start; later it is there already.

        Raises:
            LocalError: the folder can't be used.
        """
        process = await asyncio.create_subprocess_exec(
            *(self._program, "format", "--storage", "file", "--bucket", f"{self._directory}/objects/"),
            *("--trash-days", "0", "--no-update", self._metadata_url, "videos"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
        if process.returncode:
            raise LocalError(f"can't use {self._directory} for the embedded bucket:\n{errors.decode()[-2000:]}")

    async def launch(self) -> Launch:
        """One life of the gateway."""
        flags = ("--multi-buckets", "--keep-etag", "--object-meta", "--no-banner", "--backup-meta", "0")
        cache = (
            "--cache-dir",
            f"{self._directory}/cache",
            "--cache-size",
            "0",
            "--log",
            f"{self._directory}/gateway.log",
        )
        return Launch(
            command=(self._program, "gateway", *flags, *cache, self._metadata_url, f"127.0.0.1:{self._port}"),
            environment=child_environment(MINIO_ROOT_USER=self._access_key, MINIO_ROOT_PASSWORD=self._secret_key),
            ended=_nobody,
            output=self._directory / "gateway.log",
        )

    async def wait_until_listening(self) -> None:
        """Return once the gateway takes connections.

        Raises:
            LocalError: it does not within half a minute.
        """
        deadline = time.monotonic() + _GATEWAY_START
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError as exc:
                if time.monotonic() > deadline:
                    log_file = self._directory / "gateway.log"
                    raise LocalError(f"the embedded S3 gateway does not start; see {log_file}") from exc
                await asyncio.sleep(0.05)
            else:
                writer.close()
                await writer.wait_closed()
                return

    @property
    def _metadata_url(self) -> str:
        return f"sqlite3://{self._directory}/meta.db"


async def _nobody(_: int, __: bool) -> None:
    """The end of this process concerns nobody but its supervisor."""


def _program(name: str) -> str:
    """Path of a program that came with one of our packages, or that the machine has."""
    ours = Path(sysconfig.get_path("scripts")) / name
    found = str(ours) if ours.exists() else shutil.which(name)
    if found is None:
        raise LocalError(
            f"{name} is not installed: install hunyuan-video-service[local], or name a bucket with BUCKET_ENDPOINT_URL"
        )
    return found


def secret_file(path: Path, make: Callable[[], str]) -> str:
    """What `path` holds; made at the first time and readable by its owner alone."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with os.fdopen(descriptor, "w") as file:
        file.write(make())
    return path.read_text().strip()


def _kept_port(path: Path) -> int:
    """A free port on loopback, the same as last time if it is still free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(path.read_text()) if path.exists() else 0))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    path.write_text(str(port))
    return port
