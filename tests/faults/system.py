"""The whole service: each part is a process to kill, and each connection passes a proxy that can break it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import psutil

from storage.bucket import Bucket
from tests.faults.parts import DatabasePart, Part, ShimPart, StorePart, WorkerPart
from tests.support.fault_proxy import FaultProxy
from tests.support.postgres import Postgres, running_postgres
from tests.support.service import eventually
from tests.support.worker_process import Note, read_notes

SHIMS = 2
WORKERS = 4
#: HUNYUAN_STALL_TIMEOUT of each worker: short for hung renders, long for a worker that is cut off and comes back late.
_STALL_TIMEOUTS = (8.0, 8.0, 120.0, 120.0)


class System:
    """Two servers, four workers, one PostgreSQL, one bucket. Each server has half of the workers."""

    def __init__(self, directory: Path, postgres: Postgres, stack: ExitStack, *, step_seconds: float) -> None:
        self.directory = directory
        self.store = StorePart(directory)
        self.database = DatabasePart(postgres)
        self.links: dict[str, FaultProxy] = {}

        def link(name: str, address: tuple[str, int], *, http: bool = False) -> FaultProxy:
            self.links[name] = stack.enter_context(FaultProxy(address, http=http))
            return self.links[name]

        database_url = self.database.reached_by(link("shims to database", self.database.address))
        shims_bucket = self.store.reached_by(link("shims to store", self.store.address))
        self.shims = [
            ShimPart(f"shim{index}", directory / f"shim{index}", database_url, shims_bucket) for index in range(SHIMS)
        ]
        self.addresses = [link(f"clients to {shim.name}", shim.address).url for shim in self.shims]
        self.workers = []
        for index in range(WORKERS):
            shim = self.shims[index % SHIMS]
            store_link = link(f"worker{index} to store", self.store.address, http=True)
            worker = WorkerPart(
                f"worker{index}",
                directory,
                link(f"worker{index} to {shim.name}", shim.address),
                store_link,
                self.store.reached_by(store_link),
                keeps_id=index < WORKERS // 2,
                step_seconds=step_seconds,
                stall_timeout=_STALL_TIMEOUTS[index],
            )
            self.workers.append(worker)

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
        codes = self.stop_workers() | _terminate([*self.shims]) | _terminate([self.store])
        for shim in self.shims:
            shim.service.http.close()
        return codes

    def stop_workers(self) -> dict[str, int]:
        """Sends SIGTERM to the workers, so that each finishes what it does, and returns their exit codes."""
        return _terminate([*self.workers])

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


def _terminate(parts: list[Part]) -> dict[str, int]:
    running = [part for part in parts if part.is_running()]
    with ThreadPoolExecutor() as pool:
        return dict(pool.map(lambda part: (part.name, part.terminate()), running))


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
