"""What polls read: it is never older than the request, costs one statement, and survives a lost database."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest
from sqlalchemy import event, text

from benchmarks.http import Target, load
from contract.errors import ErrorCode, JobFailure
from contract.result import Progress, Stage
from contract.worker import WorkerState
from shim.app import create_app
from shim.queue import postgres_reader, sql, sqlite_reader
from shim.queue.base import QueueUnavailableError
from shim.queue.job import JobSnapshot, JobState
from shim.queue.postgres_reader import PostgresReader
from shim.queue.reader import Batched
from shim.queue.schema import jobs
from shim.queue.sql import SqlQueue
from shim.queue.sqlite_reader import SqliteReader
from storage.bucket import Bucket
from tests.support.http_server import serving
from tests.support.postgres import Postgres, running_postgres
from tests.support.queues import JOB, NOWHERE, Bench, add_history, result, sql_bench

FAILURE = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)


@pytest.fixture
async def bench(each_database_url: str) -> AsyncIterator[Bench]:
    async with sql_bench(each_database_url, max_queue_size=20) as made:
        await made.worker()
        yield made


async def in_a_transaction(bench: Bench, task_id: str) -> JobSnapshot | None:
    """The job as the writing side reads it."""
    assert isinstance(bench.queue, SqlQueue)
    async with bench.database.read() as connection:
        return await bench.queue._find(connection, jobs.c.task_id == task_id)


async def test_polls_and_transactions_read_the_same_through_the_life_of_jobs(bench: Bench) -> None:
    ids = [(await bench.queue.submit(JOB)).task_id for _ in range(4)]
    output = result(ids[0]).model_dump(mode="json")
    seen: set[JobState] = set()

    async def compare() -> None:
        for task_id in (*ids, "no-such-job"):
            polled = await bench.queue.get(task_id)
            assert polled == await in_a_transaction(bench, task_id)
            if polled is not None:
                seen.add(polled.state)
        summary = await bench.queue.summary()
        async with bench.database.read() as connection:
            waiting, running = await sql._read_waiting(connection), await sql._read_running(connection)
            alive = await sql._read_workers(connection, bench.database.is_alive())
        assert (summary.waiting, summary.running) == (len(waiting), len(running))
        assert summary.workers == alive

    await compare()
    assert [job.queue_position for task_id in ids if (job := await bench.queue.get(task_id))] == [1, 2, 3, 4]
    await bench.take("w1")
    await compare()
    await bench.dispatcher.record_progress("w1", ids[0], Progress(progress=40, stage=Stage.DENOISING))
    await compare()
    await bench.dispatcher.complete("w1", ids[0], output)
    await bench.take("w1")
    await bench.dispatcher.fail("w1", ids[1], FAILURE)
    await bench.queue.cancel(ids[2])
    await bench.worker("w2", WorkerState.LOADING)
    await compare()
    assert seen == set(JobState)
    bench.later(61)
    await compare()


@pytest.mark.full
async def test_a_change_is_seen_by_every_poll_that_follows_it(bench: Bench, each_database_url: str) -> None:
    """On PostgreSQL also by the polls of another server. While others poll, so that polls are joined."""
    async with sql_bench(each_database_url) as other:
        readers = [bench.queue] if each_database_url.startswith("sqlite") else [bench.queue, other.queue]
        ids = [(await bench.queue.submit(JOB)).task_id for _ in range(20)]
        stop = asyncio.Event()

        async def poll_on(reader: int) -> None:
            while not stop.is_set():
                await readers[reader % len(readers)].get(ids[reader % len(ids)])
                await asyncio.sleep(0)

        pollers = [asyncio.create_task(poll_on(number)) for number in range(40)]
        for number, task_id in enumerate(ids):
            if number % 2:
                await bench.queue.cancel(task_id)
            else:
                await bench.take("w1")
                await bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
            polled = await asyncio.gather(*(reader.get(task_id) for reader in readers * 10))
            assert {job.state for job in polled if job} == {JobState.CANCELLED if number % 2 else JobState.COMPLETED}
        stop.set()
        await asyncio.gather(*pollers)


async def test_500_polls_at_once_all_get_an_answer(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    app = create_app(bench.queue, Bucket(NOWHERE), metrics=bench.metrics)
    async with serving(app) as address:
        port = int(address.rpartition(":")[2])
        for path in (f"/status/{task_id}", "/health"):
            measured = await load(Target(port, path), connections=500, seconds=1.0, warm_up=0)
            assert measured.failures == 0
            assert measured.requests_per_second >= 500, "each connection has at least one answer"
        async with httpx.AsyncClient(base_url=address) as http:
            status, health = [(await http.get(path)).json() for path in (f"/status/{task_id}", "/health")]
    assert (status["status"], status["queue_position"]) == ("processing", 1)
    assert health["queue"] == {"waiting": 1, "running": 0}


async def test_polls_run_no_statement_in_a_thread_or_in_a_transaction(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.queue.get(task_id)
    sent: list[str] = []
    event.listen(bench.database._engine.sync_engine, "before_cursor_execute", lambda *each: sent.append(each[2]))
    threads = threading.active_count()
    await bench.queue.get(task_id)
    await bench.queue.summary()
    assert sent == []
    assert threading.active_count() == threads


async def test_polls_find_their_rows_by_index(bench: Bench) -> None:
    await add_history(bench.database, 20_000)
    on_sqlite = isinstance(bench.database.reader, SqliteReader)
    if on_sqlite:
        statements = [sql.replace("?", "0") for sql in (sqlite_reader._JOB, sqlite_reader._COUNTS)]
    else:
        values = "'{a,b}'", "0"
        statements = [
            sql.replace("$1", value)
            for sql, value in zip((postgres_reader._JOBS, postgres_reader._COUNTS), values, strict=True)
        ]
    async with bench.database.read() as connection:
        for sql in statements:
            explain = "EXPLAIN QUERY PLAN" if on_sqlite else "EXPLAIN"
            plan = [str(step) for step in await connection.exec_driver_sql(f"{explain} {sql}")]
            assert not [step for step in plan if "Seq Scan on jobs" in step or step.endswith("SCAN jobs')")], plan


@pytest.mark.parametrize("task_id", ['"', "\\", "{}", "a,b", "NULL", "it's", "Ünïcode", "nul\0", ""])
async def test_any_text_is_a_task_id_that_may_be_unknown(bench: Bench, task_id: str) -> None:
    known = (await bench.queue.submit(JOB)).task_id
    found = await asyncio.gather(bench.queue.get(task_id), bench.queue.get(known))
    assert found[0] is None
    assert found[1] is not None


# SQLite


async def test_a_locked_sqlite_file_is_waited_for_in_a_thread(tmp_path: Path) -> None:
    async with sql_bench(f"sqlite:///{tmp_path}/queue.db") as bench:
        await bench.worker()
        task_id = (await bench.queue.submit(JOB)).task_id
        reader = SqliteReader(str(tmp_path / "copy.db"), timeout=10)
        with sqlite3.connect(tmp_path / "queue.db") as source, sqlite3.connect(tmp_path / "copy.db") as copy:
            source.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")
        copy.execute("BEGIN EXCLUSIVE")  # without a write-ahead log a writer locks readers out
        asked = asyncio.create_task(reader.job(task_id))
        done, _ = await asyncio.wait([asked], timeout=0.3)
        assert not done, "it waits, and the event loop does not"
        copy.rollback()
        row = await asyncio.wait_for(asked, 10)
        assert row is not None
        assert row.queue_position == 1
        await reader.close()
        source.close()
        copy.close()


async def test_a_sqlite_queue_without_its_table_is_unavailable(tmp_path: Path) -> None:
    async with sql_bench(f"sqlite:///{tmp_path}/queue.db") as bench:
        async with bench.database.write() as connection:
            await connection.execute(text("DROP TABLE workers"))
        with pytest.raises(QueueUnavailableError):
            await bench.queue.summary()


# PostgreSQL


async def test_the_first_poll_after_a_restart_of_postgresql_succeeds() -> None:
    with running_postgres() as server:
        async with sql_bench(server.create_database()) as bench:
            await bench.worker()
            task_id = (await bench.queue.submit(JOB)).task_id
            assert await bench.queue.get(task_id)
            assert (await bench.queue.summary()).waiting == 1
            server.kill()
            with pytest.raises(QueueUnavailableError):
                await bench.queue.get(task_id)
            await asyncio.to_thread(server.start)
            assert await bench.queue.get(task_id)
            server.kill()  # this time nobody polls while it is down
            await asyncio.to_thread(server.start)
            assert await bench.queue.get(task_id)
            assert (await bench.queue.summary()).waiting == 1


async def test_polls_of_one_server_take_two_connections_of_postgresql(postgres: Postgres) -> None:
    async with sql_bench(postgres.create_database()) as bench:
        await bench.worker()
        task_id = (await bench.queue.submit(JOB)).task_id
        assert isinstance(bench.database.reader, PostgresReader)

        async def sessions() -> int:
            async with bench.database.read() as connection:
                query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                return int(await connection.scalar(text(query)))

        before = await sessions()
        await asyncio.gather(*(bench.queue.get(task_id) for _ in range(200)))
        await asyncio.gather(*(bench.queue.summary() for _ in range(200)))
        assert await sessions() == before + 2


# Joined calls


async def test_calls_that_arrive_during_a_load_share_one_that_begins_after_them() -> None:
    loads: list[list[str]] = []
    gate = asyncio.Event()

    async def load(keys: Sequence[str]) -> Mapping[str, int]:
        loads.append(list(keys))
        await gate.wait()
        return {key: len(loads) for key in keys if key != "unknown"}

    batched = Batched(load)
    first = asyncio.create_task(batched.get("a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    later = [asyncio.create_task(batched.get(key)) for key in ("a", "b", "a", "unknown")]
    given_up = asyncio.create_task(batched.get("c"))
    await asyncio.sleep(0)
    given_up.cancel()
    gate.set()
    assert await first == 1
    assert await asyncio.gather(*later) == [2, 2, 2, None]
    assert loads == [["a"], ["a", "b", "unknown", "c"]]


async def test_when_a_load_fails_the_calls_that_wait_fail_with_it_and_the_next_call_loads_again() -> None:
    gate = asyncio.Event()
    broken = True

    async def load(keys: Sequence[str]) -> Mapping[str, str]:
        await gate.wait()
        if broken:
            raise QueueUnavailableError("away")
        return {key: key for key in keys}

    batched = Batched(load)
    calls = [asyncio.create_task(batched.get("a"))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    calls.append(asyncio.create_task(batched.get("b")))
    await asyncio.sleep(0)
    gate.set()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [QueueUnavailableError] * 2
    broken = False
    assert await batched.get("c") == "c"


async def test_closing_fails_the_calls_that_wait() -> None:
    async def load(keys: Sequence[str]) -> Mapping[str, str]:
        await asyncio.Event().wait()
        return {}

    batched = Batched(load)
    call = asyncio.create_task(batched.get("a"))
    await asyncio.sleep(0)
    await batched.close()
    with pytest.raises(QueueUnavailableError):
        await call
