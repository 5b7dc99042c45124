"""Injects faults: signals to processes and broken connections between them, one after another, chosen by a seed."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from contract.worker import WorkerExit
from tests.faults.forms import KINDS, NOT_YET, Form
from tests.faults.parts import WORKER_TIMEOUT, Part, ShimPart, WorkerPart
from tests.faults.system import System
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.service import eventually

#: Seconds to wait for a worker to store a video while its result cannot reach the server.
_STORE_SECONDS = 10.0

_KILL, _FREEZE, _STOP = "killed", "frozen", "stopped"

#: Byte limits are drawn up to these, which is less than a video of the scripted model.
_BREAKS: dict[str, Faults] = {
    "refused": Faults(refuse=True),
    "reset at once": Faults(reset_on_accept=True),
    "reset on the way up": Faults(reset_up_after=8_000),
    "reset on the way down": Faults(reset_down_after=8_000),
    "truncated": Faults(truncate_after=8_000),
    "stalled": Faults(stall=True),
    "slow": Faults(latency=0.2, bandwidth=50_000),
}
#: The faults that a new connection of a link may meet at random.
_MISHAPS = ("reset at once", "reset on the way up", "reset on the way down", "truncated")

Fault = Callable[[], None]


class Driver(threading.Thread):
    """Injects one fault after another until it is stopped or has no more. Ends each fault before the next."""

    def __init__(self, name: str, system: System, form: Form, seed: str) -> None:
        super().__init__(name=name)
        self._chance = random.Random(f"{seed} {name}")
        self._system = system
        self._form = form
        self._stopped = threading.Event()
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []

    def run(self) -> None:
        try:
            for fault in self._faults():
                if self._stopped.is_set():
                    return
                fault()
                self._stopped.wait(self._chance.uniform(0.1, 0.5))
        except Exception as exc:  # the test reports it
            self.violations.append(f"{self.name}: {exc!r}")
            raise

    def stop(self) -> None:
        self._stopped.set()
        self.join(300)
        if self.is_alive():
            self.violations.append(f"{self.name} has not ended")

    def _faults(self) -> Iterator[Fault]:
        while bag := self._bag():
            self._chance.shuffle(bag)
            yield from bag
            if not self._form.repeats:
                return

    def _bag(self) -> list[Fault]:
        raise NotImplementedError

    def restart_ended(self) -> None:
        """Starts the parts that are not running, as a supervisor does."""
        for part in self._system.parts:
            self._restart_if_ended(part)

    def _restart_if_ended(self, part: Part) -> None:
        """Starts a part that is not running, as a supervisor does. Only a hung worker may have ended by itself."""
        with part.lock:
            if not part.is_running():
                if not (isinstance(part, WorkerPart) and part.is_stuck()):
                    self.violations.append(f"{part.name} ended by itself")
                part.start()

    def _count(self, kind: str, detail: str = "") -> None:
        assert kind in KINDS, kind
        self.counts[kind] += 1
        if detail:
            self.counts[f"    {kind}: {detail}"] += 1

    def _seconds(self) -> float:
        return self._chance.uniform(0.3, self._form.longest_fault)


class Signals(Driver):
    """Kills, freezes and stops processes, and starts them again as a supervisor does."""

    def _bag(self) -> list[Fault]:
        def of(part: Part, kind: str) -> Fault:
            return lambda: self._send(part, kind)

        system = self._system
        kinds = (_KILL, _FREEZE, _STOP)
        singles: list[Part] = [system.store, system.database]
        bag = [of(part, kind) for part in singles for kind in kinds]
        bag += [of(self._chance.choice(system.shims), kind) for kind in kinds]
        bag += [of(worker, _KILL) for worker in system.workers]
        bag += [of(self._chance.choice(system.workers), kind) for kind in (_FREEZE, _STOP)]
        return [*bag, self._kill_with_a_result, self._kill_with_a_result, self._power_cut]

    def _send(self, part: Part, kind: str) -> None:
        self.restart_ended()
        with part.lock:
            eventually(f"{part.name} up", part.is_up, 120)
            self._count(f"{_role(part)} {kind}", part.name)
            if kind == _FREEZE:
                self._freeze(part)
                return
            if kind == _KILL:
                part.kill()
            elif (code := part.terminate()) not in (0, WorkerExit.RENDER_STUCK):
                self.violations.append(f"{part.name} ended with code {code} after SIGTERM")
            time.sleep(self._seconds() / 2)
            part.start()

    def _freeze(self, part: Part) -> None:
        seconds = self._seconds()
        is_late = isinstance(part, WorkerPart) and part.stall_timeout > 2 * WORKER_TIMEOUT
        if is_late and self._chance.random() < self._form.long_freezes:
            seconds = 1.5 * WORKER_TIMEOUT
        part.freeze()
        try:
            time.sleep(seconds)
        finally:
            part.thaw()

    def _kill_with_a_result(self) -> None:
        """Kills a worker that has stored a video and cannot report it."""
        self.restart_ended()
        worker = self._chance.choice(self._system.workers)
        before = len(self._system.notes())
        worker.link.faults = Faults(refuse=True)
        try:
            deadline = time.monotonic() + _STORE_SECONDS
            while time.monotonic() < deadline and not self._stopped.wait(0.02):
                stored = {note.pid for note in self._system.notes()[before:] if note.event == "stored"}
                with worker.lock:
                    if worker.pid() in stored:
                        self._count("worker killed with a result", worker.name)
                        worker.kill()
                        worker.start()
                        return
        finally:
            worker.link.heal()

    def _power_cut(self) -> None:
        """Kills a server, empties the file with the server's name, and starts the server; it may ask to delete it."""
        shim = self._chance.choice(self._system.shims)
        eventually(f"{shim.name} up", shim.is_up, 120)
        self._count("file emptied by a power cut", shim.name)
        shim.kill()
        emptied = shim.data / "instance"
        emptied.write_bytes(b"")
        shim.start()
        eventually(f"{shim.name} up or stopped", lambda: shim.is_up() or not shim.is_running(), 120)
        if not shim.is_running():
            text = shim.log.read_text(errors="replace")[-2000:]
            if str(emptied) not in text:
                self.violations.append(f"{shim.name} did not start, and does not name {emptied}: {text}")
            emptied.unlink()
            shim.restart()


class Network(Driver):
    """Breaks the connections of one link after another: all of them, or each new one at random."""

    def _bag(self) -> list[Fault]:
        def of(name: str, link: FaultProxy, kind: str) -> Fault:
            return lambda: self._break(name, link, kind)

        links = list(self._system.links.items())
        if not self._form.repeats:  # one link for each kind: a short run has no time for all
            return [of(*self._chance.choice(links), kind) for kind in (*_BREAKS, "at random")] + [self._fill]
        return [of(name, link, kind) for name, link in links for kind in (*_BREAKS, "at random")] + 6 * [self._fill]

    def _break(self, name: str, link: FaultProxy, kind: str) -> None:
        self._count("connection broken", f"{kind}: {name}")
        if kind == "at random":
            link.break_at_random(self._chance, 0.5, [_BREAKS[mishap] for mishap in _MISHAPS])
        else:
            link.faults = _BREAKS[kind].drawn(self._chance)
        try:
            time.sleep(self._seconds())
        finally:
            link.heal()

    def _fill(self) -> None:
        """The bucket answers every upload as a full store does."""
        self._count("bucket full")
        links = [worker.store_link for worker in self._system.workers]
        for link in links:
            link.answer(507, "XMinioStorageFull", times=1_000, method="PUT")
        try:
            time.sleep(self._seconds())
        finally:
            for link in links:
                link.heal()


def _role(part: Part) -> str:
    if isinstance(part, ShimPart):
        return "server"
    return "worker" if isinstance(part, WorkerPart) else "bucket" if part.name == "store" else "database"


def skipped(kind: str) -> bool:
    """Whether the run leaves this kind of fault out."""
    return kind in NOT_YET
