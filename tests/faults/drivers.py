"""Injects faults: signals to processes and broken connections between them, one after another, chosen by a seed."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.faults.system import WORKER_TIMEOUT, Part, System
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.service import eventually

#: Seconds to wait for a worker to store a video while its result cannot reach the server.
_STORE_SECONDS = 10.0

_KILL, _FREEZE, _TERMINATE = "SIGKILL", "SIGSTOP", "SIGTERM"

#: Byte limits are drawn up to these, which is about a video of the scripted model.
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


@dataclass(frozen=True)
class Form:
    """How many faults a run has. Each driver injects each of its faults once, or repeatedly if `repeats`.

    `longest_fault` is in seconds. The share `long_freezes` of a worker's freezes lasts until its lease expires.
    """

    name: str
    tasks: int
    machines_tasks: int
    clients: int
    longest_fault: float
    long_freezes: float
    repeats: bool


SHORT = Form("short", tasks=24, machines_tasks=20, clients=14, longest_fault=2.0, long_freezes=0.0, repeats=False)
FULL = Form("full", tasks=200, machines_tasks=100, clients=24, longest_fault=5.0, long_freezes=0.25, repeats=True)


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

    def _faults(self) -> Iterator[Callable[[], None]]:
        while True:
            bag = self._bag()
            self._chance.shuffle(bag)
            yield from bag
            if not self._form.repeats:
                return

    def _bag(self) -> list[Callable[[], None]]:
        raise NotImplementedError

    def _seconds(self) -> float:
        return self._chance.uniform(0.3, self._form.longest_fault)


class Signals(Driver):
    """Kills, freezes and terminates processes, and starts them again as a supervisor does."""

    def _bag(self) -> list[Callable[[], None]]:
        def of(part: Part, kind: str) -> Callable[[], None]:
            return lambda: self._send(part, kind)

        system = self._system
        kinds = (_KILL, _FREEZE, _TERMINATE)
        singles: list[Part] = [system.store, system.database]
        bag = [of(part, kind) for part in singles for kind in kinds]
        bag += [of(self._chance.choice(system.shims), kind) for kind in kinds]
        bag += [of(worker, _KILL) for worker in system.workers]
        bag += [of(self._chance.choice(system.workers), kind) for kind in (_FREEZE, _TERMINATE)]
        return [*bag, self._kill_with_a_result, self._kill_with_a_result]

    def _send(self, part: Part, kind: str) -> None:
        self._check_running()
        eventually(f"{part.name} up", part.is_up, 120)
        self.counts[f"{kind} {part.name}"] += 1
        if kind == _FREEZE:
            self._freeze(part)
            return
        if kind == _KILL:
            part.kill()
        elif code := part.terminate():
            self.violations.append(f"{part.name} ended with code {code} after {_TERMINATE}")
        time.sleep(self._seconds() / 2)
        part.start()

    def _freeze(self, part: Part) -> None:
        seconds = self._seconds()
        if part in self._system.workers and self._chance.random() < self._form.long_freezes:
            seconds = 1.5 * WORKER_TIMEOUT
        part.freeze()
        try:
            time.sleep(seconds)
        finally:
            part.thaw()

    def _kill_with_a_result(self) -> None:
        """Kills a worker that has stored a video and cannot report it."""
        self._check_running()
        link = self._chance.choice(self._system.workers).link
        before = len(self._system.notes())
        link.faults = Faults(refuse=True)
        try:
            deadline = time.monotonic() + _STORE_SECONDS
            while time.monotonic() < deadline and not self._stopped.wait(0.02):
                stored = {note.pid for note in self._system.notes()[before:] if note.event == "stored"}
                for worker in self._system.workers:
                    if worker.link is link and worker.is_running() and worker.worker.pid in stored:
                        self.counts[f"{_KILL} {worker.name} with a result"] += 1
                        worker.kill()
                        worker.start()
                        return
        finally:
            link.heal()

    def _check_running(self) -> None:
        for part in self._system.parts:
            if not part.is_running():
                self.violations.append(f"{part.name} ended by itself")
                part.start()


class Network(Driver):
    """Breaks the connections of one link after another: all of them, or each new one at random."""

    def _bag(self) -> list[Callable[[], None]]:
        def of(name: str, link: FaultProxy, kind: str) -> Callable[[], None]:
            return lambda: self._break(name, link, kind)

        links = self._system.links.items()
        return [of(name, link, kind) for name, link in links for kind in (*_BREAKS, "at random")]

    def _break(self, name: str, link: FaultProxy, kind: str) -> None:
        self.counts[f"{kind}: {name}"] += 1
        if kind == "at random":
            link.break_at_random(self._chance, 0.5, [_BREAKS[mishap] for mishap in _MISHAPS])
        else:
            link.faults = _BREAKS[kind].drawn(self._chance)
        try:
            time.sleep(self._seconds())
        finally:
            link.heal()
