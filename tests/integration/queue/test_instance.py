"""Two servers on one PostgreSQL whose data directories hold the same instance id: one was copied."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psycopg
import pytest

from shim.queue import instance
from shim.queue.base import QueueUnavailableError
from shim.queue.engine import database_url, libpq_parameters
from shim.queue.instance import Instance
from tests.support.postgres import Postgres, running_postgres
from tests.support.queues import JOB, TOKEN
from tests.support.service import Service, eventually


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.create_database()


async def test_an_instance_id_is_held_by_one_server_at_a_time(url: str) -> None:
    here, there = Instance(url, "abcd1234"), Instance(url, "abcd1234")
    other = Instance(url, "another1")
    try:
        assert await here.claim()
        assert not await there.claim()
        assert await other.claim()
        await here.release()
        assert await there.claim()
    finally:
        for each in (here, there, other):
            await each.release()


async def test_a_sqlite_database_has_one_server_so_its_instance_id_is_its_own(tmp_path: Path) -> None:
    assert await Instance(f"sqlite:///{tmp_path}/queue.sqlite3", "abcd1234").claim()


async def test_a_claim_that_fails_after_the_connection_closes_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "_KEEPALIVES", "SELECT 1 / 0")
    with pytest.raises(QueueUnavailableError) as raised:  # and keeps the frames of the claim
        await Instance(url, "abcd1234").claim()
    assert isinstance(raised.value.__cause__, psycopg.Error)
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    async with await psycopg.AsyncConnection.connect(autocommit=True, **libpq_parameters(database_url(url))) as session:
        deadline = asyncio.get_running_loop().time() + 5
        while await (await session.execute(others)).fetchone() != (0,):
            assert asyncio.get_running_loop().time() < deadline, "the session is still open"
            await asyncio.sleep(0.05)


async def test_an_instance_id_is_claimed_again_after_the_database_was_away() -> None:
    with running_postgres() as server:
        url = server.create_database()
        here, there = Instance(url, "abcd1234"), Instance(url, "abcd1234")
        assert await here.claim()
        keeping = asyncio.create_task(here.keep(check_every=0.1))
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
        try:
            deadline = asyncio.get_running_loop().time() + 20
            while await there.claim():  # until `here` has it again
                await there.release()
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.3)
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
            await here.release()
            await there.release()


def test_a_server_with_a_copied_data_directory_takes_no_job_from_the_first(tmp_path: Path, url: str) -> None:
    settings = {"HUNYUAN_DATABASE_URL": url, "HUNYUAN_PLATFORM_TOKEN": TOKEN, "HUNYUAN_WORKERS": "0"}
    first, second = [Service(tmp_path / name, **settings) for name in ("first", "second")]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for service in (first, second):
        (service.directory / "data").mkdir(parents=True)
    instance_id = "abcd1234"
    for service in (first, second):
        (service.directory / "data" / "instance").write_text(instance_id)
    try:
        first.start(until_ready=False)
        task_id = first.http.post("/v2/local/run", json={"input": JOB.wire()}, headers=headers).json()["id"]
        taken = first.http.get(f"/v2/local/job-take/{instance_id}-0-12345678?a=b", headers=headers)
        assert taken.json()["id"] == task_id
        second.start(until_ready=False)

        def state() -> str:
            answer = second.http.get(f"/v2/local/status/{task_id}", headers=headers).json()
            return str(answer["status"])

        assert state() == "IN_PROGRESS"
        assert f"another server uses the instance id {instance_id}" in second.log.read_text()
        assert (second.directory / "data" / "instance").read_text() == instance_id

        # The first server's next start takes back its own job: its end has ended the claim.
        first.kill()
        first.start(until_ready=False)
        eventually("the job's return to the queue", lambda: state() == "IN_QUEUE")
    finally:
        for service in (first, second):
            service.http.close()
            if service.process is not None:
                service.stop()
