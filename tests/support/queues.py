"""The job queues with their dispatcher and a clock that the test sets."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy
from pydantic import HttpUrl, SecretStr
from sqlalchemy import text

from contract.job import JobInput, Resolution, num_frames
from contract.result import JobResult
from contract.worker import WorkerReport, WorkerState
from shim.api.platform import Platform
from shim.app import create_app
from shim.metrics import Metrics
from shim.queue.base import FindResult, JobQueue
from shim.queue.database import Database
from shim.queue.dispatch import Dispatcher
from shim.queue.engine import migrate
from shim.queue.outbox import Outbox
from shim.queue.runpod import RunPodQueue
from shim.queue.schema import jobs, outcomes, render_times, workers
from shim.queue.sql import SqlQueue
from shim.queue.webhook_request import WebhookOptions
from shim.tasks import StoredVideos
from storage.settings import BucketSettings
from tests.support.http_server import serving
from tests.support.s3_servers import client_of

TOKEN = "a-token-of-the-tests"
JOB = JobInput(prompt="A paper boat on a rainy street", duration=5, resolution=Resolution.P720)

#: No server listens there: for apps whose bucket is not used.
NOWHERE = BucketSettings(
    endpoint_url=HttpUrl("http://127.0.0.1:9"), access_key_id="id", secret_access_key=SecretStr("secret")
)


def result(task_id: str, seconds: float = 30.0) -> JobResult:
    width, height = JOB.size
    return JobResult(
        task_id=task_id,
        input=JOB,
        model="scripted",
        seed=1,
        width=width,
        height=height,
        num_frames=num_frames(JOB.duration),
        file_size=1000,
        sha256="0" * 64,
        created_at=datetime.now(UTC),
        timings={"total": seconds},
        version="1",
        video_url="http://127.0.0.1:9/video.mp4",
        poster_url="http://127.0.0.1:9/poster.jpg",
    )


@dataclass
class Clock:
    """Returns `now`, in seconds since an epoch. The test advances it."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


async def find_nothing(_: str) -> JobResult | None:
    return None


@dataclass
class Bench:
    """A queue under test, and the dispatcher of its workers."""

    queue: JobQueue
    database: Database
    dispatcher: Dispatcher
    outbox: Outbox
    clock: Clock
    metrics: Metrics
    address: str = ""

    def later(self, seconds: float = 2.0) -> None:
        self.clock.now += seconds

    async def worker(self, worker_id: str = "w1", state: WorkerState = WorkerState.READY, **fields: Any) -> None:
        await self.dispatcher.report(worker_id, WorkerReport(state=state, model="scripted", **fields))
        self.later()

    async def take(self, worker_id: str = "w1") -> str:
        delivery = await self.dispatcher.take(worker_id)
        assert delivery is not None
        self.later()
        return delivery.task_id


@asynccontextmanager
async def sql_bench(
    url: str,
    *,
    find_result: FindResult = find_nothing,
    bucket: BucketSettings = NOWHERE,
    webhooks: WebhookOptions | None = None,
    **limits: Any,
) -> AsyncIterator[Bench]:
    """The SQL queue in the database at `url`."""
    clock = Clock()
    _copy_tables(url)
    database = await Database.open(url, clock=clock)
    try:
        metrics = Metrics(data_directory=Path(tempfile.gettempdir()))
        queue = SqlQueue(database, max_queue_size=limits.pop("max_queue_size", 3), observer=metrics, webhooks=webhooks)
        dispatcher = Dispatcher(database, find_result=find_result, observer=metrics, **limits)
        outbox = Outbox(database, StoredVideos(client_of(bucket)))
        yield Bench(queue, database, dispatcher, outbox, clock, metrics)
    finally:
        await database.close()


def _copy_tables(url: str) -> None:
    """Puts a file with the queue's tables where SQLite would create one, which takes a third of the time."""
    file = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not file.exists():
        file.touch(0o600)
        file.write_bytes(_migrated())


@functools.cache
def _migrated() -> bytes:
    """A SQLite file with the queue's tables."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "queue.sqlite3"
        engine = sqlalchemy.create_engine(f"sqlite:///{file}")
        with engine.begin() as connection:
            migrate(connection)
        engine.dispose()
        return file.read_bytes()


@asynccontextmanager
async def platform_bench(
    url: str, *, hold: float = 0.3, bucket: BucketSettings = NOWHERE, **limits: Any
) -> AsyncIterator[Bench]:
    """The SQL queue behind RunPod's protocol, and the documented API, on a real port."""
    async with sql_bench(url, bucket=bucket, **limits) as bench:
        assert isinstance(bench.queue, SqlQueue)
        platform = Platform(bench.queue, bench.dispatcher, bench.outbox, endpoint_id="local", token=TOKEN, hold=hold)
        app = create_app(bench.queue, client_of(bucket), metrics=bench.metrics, routers=[platform.router])
        async with serving(app) as bench.address:
            yield bench
            platform.stop()


@asynccontextmanager
async def runpod_bench(url: str, *, bucket: BucketSettings = NOWHERE) -> AsyncIterator[Bench]:
    """`RunPodQueue` over HTTP to our own server."""
    async with platform_bench(url, bucket=bucket) as bench:
        queue = RunPodQueue(
            endpoint_id="local",
            api_key=TOKEN,
            base_url=f"{bench.address}/v2",
            max_queue_size=3,
            clock=bench.clock,
        )
        bench.queue = queue
        try:
            yield bench
        finally:
            await queue.close()


async def empty(database: Database) -> None:
    """Delete every job and worker, and what was measured of them: several tests share one server."""
    async with database.write() as connection:
        for table in (jobs, workers, render_times):
            await connection.execute(table.delete())
        await connection.execute(outcomes.update().values(total=0))


async def add_history(database: Database, count: int) -> None:
    """Inserts `count` jobs that ended a minute ago, with the values that the queue leaves."""
    output = json.dumps(result("00000000-0000-4000-8000-000000000000").model_dump(mode="json"))
    numbers = {
        "sqlite": "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :count) ",
        "postgresql": "WITH numbers AS (SELECT n FROM generate_series(1, :count) AS n) ",
    }
    async with database.write() as connection:
        await connection.execute(
            text(
                "INSERT INTO jobs (task_id, state, input, worker_id, attempts, progress, stage, created_at, "
                "started_at, finished_at, output, stop_requested, last_event) "
                + numbers[connection.dialect.name]
                + "SELECT 'old-' || n, 'completed', CAST(:input AS JSON), 'old-' || (n % 8), 1, 100, 'storing', "
                ":now - 90, :now - 80, :now - 60, CAST(:output AS JSON), false, 1 FROM numbers"
            ),
            {"count": count, "now": database.clock(), "input": JOB.model_dump_json(), "output": output},
        )
        await connection.execute(
            text(
                "INSERT INTO events (job, number, at, state, stage, progress, attempts) "
                "SELECT seq, 1, finished_at, state, stage, progress, attempts FROM jobs WHERE task_id LIKE 'old-%'"
            )
        )
        if connection.dialect.name == "postgresql":  # as autovacuum does; SQLite never analyzes by itself
            await connection.execute(text("ANALYZE jobs, events"))
