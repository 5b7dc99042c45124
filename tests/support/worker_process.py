"""A worker process as a platform runs it, with the scripted model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil

from contract.worker_environment import ENDPOINT_ID, worker_environment
from storage.settings import BucketSettings


def bucket_environment(settings: BucketSettings) -> dict[str, str]:
    """The environment variables of this bucket."""
    return {
        "BUCKET_ENDPOINT_URL": str(settings.endpoint_url),
        "BUCKET_ACCESS_KEY_ID": settings.access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": settings.secret_access_key.get_secret_value(),
        "BUCKET_NAME": settings.name,
    }


@dataclass(frozen=True)
class Note:
    """A note of `tests.support.scripted_worker`. `at` in seconds since the epoch."""

    event: str
    task_id: str
    at: float
    pid: int


def read_notes(path: Path) -> list[Note]:
    return [Note(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


class WorkerProcess:
    """`python -m tests.support.scripted_worker` in its own process group. `settings` are environment variables."""

    def __init__(
        self,
        directory: Path,
        bucket: BucketSettings,
        *,
        platform: str,
        token: str,
        worker_id: str = "w1",
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.worker_id = worker_id
        self.log = directory / f"{worker_id}.log"
        self.notes_file = directory / "notes.jsonl"
        self._base_url = f"{platform}/v2"
        self._token = token
        self._directory = directory
        self._bucket = bucket
        self._settings = settings
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("BUCKET_", "RUNPOD_"))}
        environment = {
            **clean,
            **bucket_environment(self._bucket),
            **worker_environment(self._base_url, ENDPOINT_ID, self.worker_id, self._token),
            "HUNYUAN_WORK_DIR": str(self._directory),
            **self._settings,
        }
        command = [
            sys.executable,
            "-u",
            "-m",
            "tests.support.scripted_worker",
            "--notes",
            str(self.notes_file),
            *arguments,
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """The process and its descendants."""
        worker = psutil.Process(self.pid)
        return [worker, *worker.children(recursive=True)]

    def renders(self) -> list[str]:
        """The tasks that this or another worker of the same directory rendered, in order."""
        return [note.task_id for note in read_notes(self.notes_file) if note.event == "rendering"]

    def terminate(self) -> None:
        """SIGTERM to the worker alone, as a container's runtime sends it."""
        assert self.process is not None
        self.process.terminate()

    def wait(self, seconds: float = 60.0) -> int:
        """The exit code."""
        assert self.process is not None
        code = self.process.wait(seconds)
        self.process = None
        return code

    def kill(self) -> None:
        """SIGKILL to the worker alone."""
        assert self.process is not None
        self.process.kill()
        self.wait()

    def freeze(self) -> None:
        """Stop the worker and its children, as a paused container."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)
