"""Injects faults after which a worker is late: hung renders, a partition of one worker, and steps of the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.faults.drivers import Driver, Fault, skipped
from tests.faults.parts import WORKER_TIMEOUT, WorkerPart
from tests.support.fault_proxy import Faults

#: Seconds to wait for the moment of a fault: a worker that encodes, or that begins an upload.
_MOMENT = 10.0
#: Seconds within which a hung render, or its worker, has ended after the worker's stall timeout.
_END_SECONDS = 30.0
#: Steps of a server's wall clock: a correction by NTP, a resumed virtual machine, a wrong time zone.
_STEPS = (90.0, -90.0, 3600.0, -3600.0)


class HungRenders(Driver):
    """Hangs the encoder or a model step of a worker."""

    def _bag(self) -> list[Fault]:
        return [self._hang_encoder, self._hang_step]

    @property
    def _workers(self) -> list[WorkerPart]:
        """The workers that notice a hung render soon."""
        return [worker for worker in self._system.workers if worker.stall_timeout <= WORKER_TIMEOUT]

    def _hang_encoder(self) -> None:
        """SIGSTOP to ffmpeg. Mild form: SIGCONT after some seconds."""
        deadline = time.monotonic() + _MOMENT
        while time.monotonic() < deadline and not self._stopped.wait(0.02):
            for worker in self._workers:
                encoder = _encoder(worker)
                if encoder is not None:
                    self._hang(worker, encoder)
                    return

    def _hang(self, worker: WorkerPart, encoder: psutil.Process) -> None:
        kind = "encoder hung"
        pid = worker.pid()
        try:
            encoder.suspend()
            self._count(kind, worker.name)
            if skipped(kind):
                time.sleep(self._seconds())
                encoder.resume()
                return
        except psutil.NoSuchProcess:
            return
        self._await_end(kind, worker, pid, lambda: not encoder.is_running())

    def _hang_step(self) -> None:
        """A step of the model does not return. Mild form: it returns after some seconds."""
        kind = "model step hung"
        worker = self._chance.choice(self._workers)
        pid = worker.pid()
        if pid is None:
            return
        hang = self._system.directory / f"hang-{pid}"
        self._count(kind, worker.name)
        hang.touch()
        try:
            if skipped(kind):
                time.sleep(self._seconds())
            else:
                rendering = len(self._renders(pid))
                deadline = time.monotonic() + _MOMENT
                while len(self._renders(pid)) == rendering and time.monotonic() < deadline and worker.pid() == pid:
                    self._stopped.wait(0.05)
                if len(self._renders(pid)) > rendering:
                    self._await_end(kind, worker, pid, lambda: False)
        finally:
            hang.unlink()

    def _renders(self, pid: int) -> list[str]:
        return [note.task_id for note in self._system.notes() if note.pid == pid and note.event == "rendering"]

    def _await_end(self, kind: str, worker: WorkerPart, pid: int | None, has_ended: Callable[[], bool]) -> None:
        """Waits until the hung render or its worker has ended."""
        seconds = worker.stall_timeout + _END_SECONDS
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if has_ended() or worker.pid() != pid:
                self._restart_if_ended(worker)
                return
            time.sleep(0.1)
        self.violations.append(f"{kind}: the render of {worker.name} still ran after {seconds:.0f} s")
        with worker.lock:
            if worker.pid() == pid:
                worker.kill()
                worker.start()


class Partitions(Driver):
    """Cuts one worker off as its upload begins."""

    def _bag(self) -> list[Fault]:
        return [self._cut_off]

    def _cut_off(self) -> None:
        """One worker loses bucket and server as its upload begins, and returns after its lease has expired.

        Mild form: it returns at once.
        """
        kind = "worker cut off as its upload begins"
        before = len(self._system.notes())
        deadline = time.monotonic() + _MOMENT
        while time.monotonic() < deadline and not self._stopped.wait(0.01):
            uploading = {note.pid for note in self._system.notes()[before:] if note.event == "uploading"}
            for worker in self._system.workers:
                if worker.stall_timeout > 2 * WORKER_TIMEOUT and worker.pid() in uploading:
                    self._count(kind, worker.name)
                    self._partition(worker, self._seconds() if skipped(kind) else 1.5 * WORKER_TIMEOUT)
                    return

    def _partition(self, worker: WorkerPart, seconds: float) -> None:
        links = (worker.store_link, worker.link)
        fault = self._chance.choice((Faults(stall=True), Faults(refuse=True)))
        for link in links:
            link.faults = fault
        try:
            time.sleep(seconds)
        finally:
            for link in links:
                link.heal()


class Clocks(Driver):
    """Steps the wall clock of one server or of both, and sets it right again."""

    def _bag(self) -> list[Fault]:
        return [] if skipped("clock stepped") else [self._step for _ in _STEPS]

    def _step(self) -> None:
        step = self._chance.choice(_STEPS)
        shims = self._chance.sample(self._system.shims, k=self._chance.randint(1, len(self._system.shims)))
        self._count("clock stepped", f"{step:+.0f} s")
        _set([shim.clock for shim in shims], step)
        try:
            self._stopped.wait(4 * self._seconds())
        finally:
            _set([shim.clock for shim in shims], 0.0)


def _set(clocks: list[Path], seconds: float) -> None:
    for clock in clocks:
        new = clock.with_suffix(".new")
        new.write_text(str(seconds))
        new.rename(clock)


def _encoder(worker: WorkerPart) -> psutil.Process | None:
    """The worker's ffmpeg that reads frames."""
    pid = worker.pid()
    if pid is None:
        return None
    try:
        for process in psutil.Process(pid).children():
            if "ffmpeg" in process.name() and "pipe:0" in process.cmdline():
                return process
    except psutil.Error:
        pass
    return None
