"""The other processes of a render across several GPUs, as rank 0 sees them, and rank 0 as they see it.

Rank 0 is the worker. Each other rank is a process of `python -m handler.video_model.follower`, with a socket to rank 0.
A job goes to all of them, each renders the latents, and rank 0 alone decodes. Whether a job was cancelled is decided by
rank 0 before each step, because all must stop at the same one. If a rank fails, all of them give up the job; it leaves
the process groups, so that the others do not wait for it. A rank whose process ends, ends the worker: its job is queued
again, and the next worker starts all ranks anew.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Final

from PIL import Image

from contract.job import JobInput
from contract.worker import WorkerExit
from handler.settings import WorkerSettings, environment_of_rank
from handler.video_model.base import (
    Cancellation,
    ModelError,
    ModelLoadError,
    ModelOutOfMemoryError,
    RenderCancelledError,
)
from handler.video_model.parallel import Parallel
from handler.work_dir import WorkDirError, job_directory

#: The module that the process of another rank runs.
FOLLOWER: Final = "handler.video_model.follower"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beginning:
    """What a rank needs to load the model, from rank 0. `directory` is where the ranks find each other."""

    settings: WorkerSettings
    rank: int
    directory: Path
    backend: str


@dataclass(frozen=True)
class Order:
    """A job for every rank. `attempt` changes when the ranks must connect again."""

    attempt: int
    job_input: JobInput
    image: Image.Image | None
    seed: int


@dataclass(frozen=True)
class Verdict:
    """Whether the job was cancelled before its next step."""

    is_cancelled: bool


@dataclass(frozen=True)
class GiveUp:
    """Another rank has failed."""


@dataclass(frozen=True)
class Ended:
    """A rank has loaded the model or has rendered a job. `error` is why it could not."""

    error: str | None = None
    is_out_of_memory: bool = False


def _exit_worker(text: str) -> None:
    """Ends the process with WorkerExit.RANK_LOST, from any thread."""
    log.critical("%s; the worker exits with code %d, and its task is queued again", text, WorkerExit.RANK_LOST)
    os._exit(WorkerExit.RANK_LOST)


class _OtherRank:
    """A process, and what it says."""

    def __init__(self, beginning: Beginning, on_failure: Callable[[], None]) -> None:
        self.rank = beginning.rank
        self._on_failure = on_failure
        self._reports: SimpleQueue[Ended] = SimpleQueue()
        self._is_closing = False
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", FOLLOWER, str(os.getpid()), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment_of_rank(beginning.rank),
            )
        self._connection = Connection(ours.detach())
        self.send(beginning)
        Thread(target=self._listen, name=f"rank-{self.rank}", daemon=True).start()

    def send(self, message: Any) -> None:
        """A process that has ended is found by the thread that listens to it."""
        try:
            self._connection.send(message)
        except OSError:
            log.warning("rank %d does not take messages", self.rank)

    def report(self) -> Ended:
        """Waits for the next one."""
        return self._reports.get()

    def _listen(self) -> None:
        try:
            while True:
                report: Ended = self._connection.recv()
                if report.error is not None:
                    self._on_failure()
                self._reports.put(report)
        except (EOFError, OSError):
            code = self.process.wait()
            if not self._is_closing:
                _exit_worker(f"the process of rank {self.rank} has ended with code {code}")

    def kill(self) -> None:
        """Ends the process."""
        self._is_closing = True
        self.process.kill()


class OtherRanks:
    """Ranks 1 to `settings.gpus_per_job` - 1, from the point of view of rank 0."""

    def __init__(self, settings: WorkerSettings, *, backend: str) -> None:
        """Starts their processes, which load the model."""
        self._closing = ExitStack()
        try:
            directory = self._closing.enter_context(job_directory(settings.work_dir))
        except WorkDirError as exc:
            raise ModelLoadError(f"HUNYUAN_WORK_DIR: {exc}") from exc
        self.parallel = Parallel(0, settings.gpus_per_job, directory, backend=backend)
        self._attempt = 0
        self._ranks = [
            _OtherRank(Beginning(settings, rank, directory, backend), self.parallel.abort)
            for rank in range(1, settings.gpus_per_job)
        ]

    def wait_until_loaded(self) -> None:
        """Raises ModelLoadError if one of them can't load the model."""
        for other in self._ranks:
            report = other.report()
            if report.error is not None:
                raise ModelLoadError(f"rank {other.rank}: {report.error}")

    @contextmanager
    def rendering(
        self, job_input: JobInput, image: Image.Image | None, seed: int, cancelled: Event
    ) -> Iterator[Cancellation]:
        """Every rank renders the job inside the block. Yields what the block must ask whether it is cancelled.

        Raises:
            ModelOutOfMemoryError: a rank has not enough memory.
        """
        if not self.parallel.is_joined:
            self._attempt += 1
        self._send(Order(self._attempt, job_input, image, seed))
        error: BaseException | None = None
        try:
            self.parallel.join(self._attempt)
            yield _Decision(cancelled, self._send)
        except RenderCancelledError:
            raise
        except BaseException as exc:
            # Its frames hold the process groups, which must go for the others to notice.
            traceback.clear_frames(exc.__traceback__)
            error = exc
            raise
        finally:
            reports = self._end(has_failed=error is not None)
            full = next((report for report in reports if report.is_out_of_memory), None)
            if error is not None and not isinstance(error, ModelError) and full is not None:
                raise ModelOutOfMemoryError(full.error)  # rank 0 only knows that another one has left

    def _end(self, *, has_failed: bool) -> list[Ended]:
        """Waits until each rank has ended the job."""
        if has_failed:
            self._send(GiveUp())
            self.parallel.leave()
        reports = [other.report() for other in self._ranks]
        for other, report in zip(self._ranks, reports, strict=True):
            if report.error is not None:
                log.error("rank %d: %s", other.rank, report.error)
                self.parallel.leave()
        return reports

    def _send(self, message: Any) -> None:
        for other in self._ranks:
            other.send(message)

    def close(self) -> None:
        """Ends the processes."""
        self.parallel.leave()
        for other in self._ranks:
            other.kill()
        self._closing.close()


class _Decision:
    """Rank 0's answer whether the job is cancelled, which every rank gets."""

    def __init__(self, cancelled: Event, send: Callable[[Any], None]) -> None:
        self._cancelled = cancelled
        self._send = send

    def is_set(self) -> bool:
        """See `Cancellation`."""
        is_cancelled = self._cancelled.is_set()
        self._send(Verdict(is_cancelled))
        return is_cancelled
