"""Steps of the wall clock move no lease, and a server that was away leaves live workers their jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from contract.worker import WorkerReport, WorkerState
from shim.queue.clock import SteadyClock
from shim.queue.database import Database
from shim.queue.dispatch import Dispatcher
from shim.queue.job import JobState
from shim.queue.sql import SqlQueue
from tests.support.postgres import Postgres
from tests.support.queues import JOB, Clock, find_nothing

READY = WorkerReport(state=WorkerState.READY, model="scripted")


@dataclass
class Machine:
    """A machine's two clocks."""

    wall: Clock = field(default_factory=lambda: Clock(1_700_000_000.0))
    monotonic: Clock = field(default_factory=lambda: Clock(500.0))

    def step(self, seconds: float) -> None:
        """Sets the wall clock, as an operator or a time service does."""
        self.wall.now += seconds

    def later(self, seconds: float) -> None:
        self.wall.now += seconds
        self.monotonic.now += seconds

    @asynccontextmanager
    async def server(self, url: str) -> AsyncIterator[Server]:
        database = await Database.open(url, clock=SteadyClock(self.wall, self.monotonic), worker_timeout=60.0)
        try:
            queue = SqlQueue(database)
            yield Server(database, queue, Dispatcher(database, find_result=find_nothing))
        finally:
            await database.close()


@dataclass
class Server:
    database: Database
    queue: SqlQueue
    dispatcher: Dispatcher

    async def running_task(self) -> str:
        await self.dispatcher.report("w1", READY)
        task_id = (await self.queue.submit(JOB)).task_id
        assert await self.dispatcher.take("w1") is not None
        return task_id

    async def swept(self, task_id: str) -> JobState:
        """The job's state after a sweep."""
        await self.dispatcher.sweep()
        job = await self.queue.get(task_id)
        assert job is not None
        return job.state


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/queue.sqlite3"


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    return postgres.create_database()


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize("seconds", [90.0, -3600.0])
async def test_a_step_of_the_wall_clock_gives_no_live_job_away(
    machine: Machine, each_database_url: str, seconds: float
) -> None:
    async with machine.server(each_database_url) as server:
        task_id = await server.running_task()
        machine.step(seconds)
        assert await server.swept(task_id) is JobState.RUNNING
        assert (await server.queue.summary()).workers.ready == 1


async def test_a_step_of_the_wall_clock_keeps_no_lost_job(machine: Machine, sqlite_url: str) -> None:
    async with machine.server(sqlite_url) as server:
        task_id = await server.running_task()
        machine.step(-3600)
        machine.later(61)
        assert await server.swept(task_id) is JobState.QUEUED
        assert (await server.queue.summary()).workers.ready == 0


async def test_a_wall_clock_that_was_set_back_between_two_runs_keeps_no_lost_job(
    machine: Machine, sqlite_url: str
) -> None:
    async with machine.server(sqlite_url) as server:
        task_id = await server.running_task()
    machine.step(-3600)
    async with machine.server(sqlite_url) as server:
        assert await server.swept(task_id) is JobState.RUNNING
        machine.later(61)
        assert await server.swept(task_id) is JobState.QUEUED
        assert (await server.queue.summary()).workers.ready == 0


async def test_a_server_that_was_away_gives_the_workers_of_running_jobs_time_to_report(
    machine: Machine, sqlite_url: str
) -> None:
    async with machine.server(sqlite_url) as server:
        task_id = await server.running_task()
    machine.later(3600)
    async with machine.server(sqlite_url) as server:
        assert await server.swept(task_id) is JobState.RUNNING
        machine.later(50)
        await server.dispatcher.report("w1", READY)
        machine.later(50)
        assert await server.swept(task_id) is JobState.RUNNING


async def test_a_cancellation_is_sent_again_after_the_clock_was_set_back(machine: Machine, sqlite_url: str) -> None:
    async with machine.server(sqlite_url) as server:
        task_id = await server.running_task()
        await server.queue.cancel(task_id)
        assert await server.dispatcher.pending_cancellations("w1") == [task_id]
    machine.step(-3600)
    async with machine.server(sqlite_url) as server:
        assert await server.dispatcher.pending_cancellations("w1") == [task_id]


async def test_the_clock_of_postgresql_stays_the_databases_after_a_step_of_the_servers(
    machine: Machine, postgres_url: str
) -> None:
    async with machine.server(postgres_url) as server:
        before = server.database.clock()
        machine.step(90)
        assert server.database.clock() == before
        await server.database.set_clock()
        assert abs(server.database.clock() - before) < 60


async def test_a_server_on_postgresql_leaves_an_expired_lease_to_its_worker_when_it_starts(postgres_url: str) -> None:
    clock = Clock()
    database = await Database.open(postgres_url, clock=clock)
    try:
        server = Server(database, SqlQueue(database), _dispatcher(database))
        task_id = await server.running_task()
    finally:
        await database.close()
    clock.now += 3600
    database = await Database.open(postgres_url, clock=clock)
    try:
        server = Server(database, SqlQueue(database), _dispatcher(database))
        assert await server.swept(task_id) is JobState.RUNNING
        clock.now += 61
        assert await server.swept(task_id) is JobState.QUEUED
    finally:
        await database.close()


def _dispatcher(database: Database) -> Dispatcher:
    return Dispatcher(database, find_result=find_nothing)
