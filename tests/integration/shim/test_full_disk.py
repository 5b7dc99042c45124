"""A full disk is named where an operator looks: in the response, in the log and in /health."""

import logging
from pathlib import Path

import httpx
import pytest

from shim.app import create_app
from shim.metrics import Metrics
from shim.queue.base import JobQueue, QueueUnavailableError
from storage.bucket import Bucket
from tests.support.disks import disk, fill
from tests.support.http_server import serving
from tests.support.queues import JOB, NOWHERE, sql_bench


async def _submit_ten(queue: JobQueue) -> None:
    for _ in range(10):
        await queue.submit(JOB)


async def test_a_full_disk_of_the_queue_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with disk(tmp_path, 16) as directory:
        async with sql_bench(f"sqlite:///{directory}/queue.sqlite3") as bench:
            await bench.worker()
            filler = fill(directory)
            with caplog.at_level(logging.ERROR), pytest.raises(QueueUnavailableError, match="database is full"):
                await _submit_ten(bench.queue)
            assert "HUNYUAN_DATA_DIR" in caplog.text
            filler.unlink()
            assert (await bench.queue.submit(JOB)).task_id


async def test_health_names_a_full_disk_until_there_is_space_again(tmp_path: Path) -> None:
    with disk(tmp_path, 200) as directory:
        async with sql_bench(f"sqlite:///{directory}/queue.sqlite3") as bench:
            app = create_app(bench.queue, Bucket(NOWHERE), metrics=Metrics(data_directory=directory))
            async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
                assert (await http.get("/health")).json()["problems"] == []
                filler = fill(directory)
                health = await http.get("/health")
                assert health.status_code == 200
                assert health.json()["status"] == "degraded"
                assert health.json()["problems"] == ["the disk of HUNYUAN_DATA_DIR is full: 0 MB are free"]
                filler.unlink()
                assert (await http.get("/health")).json()["status"] == "healthy"
