"""`hunyuan serve` with its queue and its bucket, and a worker with the scripted model: real but for the pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.service import Service, eventually, running_without_workers
from tests.support.worker_process import WorkerProcess

TOKEN = "a-token-of-the-tests"


@contextmanager
def scripted_service(directory: Path, *arguments: str, **environment: str) -> Iterator[tuple[Service, WorkerProcess]]:
    """The server with `environment`, ready for tasks, and its worker, which is started with `arguments`."""
    with running_without_workers(directory, HUNYUAN_PLATFORM_TOKEN=TOKEN, **environment) as service:
        worker = WorkerProcess(directory, service.embedded_bucket(), platform=service.address, token=TOKEN)
        worker.start(*arguments)
        try:
            eventually("a loaded model", lambda: service.http.get("/ready").status_code == 200, 120)
            yield service, worker
        finally:
            worker.kill()
