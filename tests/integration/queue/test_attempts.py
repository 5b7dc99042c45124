"""Attempts count the renders that a worker began and lost. Deliveries and restarts of the server do not count."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from contract.errors import ErrorCode
from contract.result import Progress, Stage
from shim.queue.job import JobState
from shim.queue.sql import SqlQueue
from tests.support.queues import JOB, Bench, sql_bench

BEGUN = Progress(progress=0, stage=Stage.ENCODING_PROMPT)


@pytest.fixture
async def bench(database_url: str) -> AsyncIterator[Bench]:
    async with sql_bench(database_url) as made:
        await made.worker()
        yield made


async def state(bench: Bench, task_id: str) -> JobState:
    job = await bench.queue.get(task_id)
    assert job is not None
    return job.state


async def let_the_lease_expire(bench: Bench) -> None:
    bench.later(61)
    await bench.dispatcher.sweep()


@pytest.mark.parametrize("begun", [False, True])
async def test_a_job_survives_any_number_of_kills_of_its_server(database_url: str, begun: bool) -> None:
    async with sql_bench(database_url) as bench:
        await bench.worker()
        task_id = (await bench.queue.submit(JOB)).task_id
    for number in range(5):
        async with sql_bench(database_url) as bench:
            await bench.dispatcher.release_workers("w")
            assert await state(bench, task_id) is JobState.QUEUED
            assert await bench.take(f"w{number}") == task_id
            if begun:
                await bench.dispatcher.record_progress(f"w{number}", task_id, BEGUN)
    async with sql_bench(database_url) as bench:
        await bench.dispatcher.release_workers("w")
        assert await state(bench, task_id) is JobState.QUEUED


async def test_a_job_whose_deliveries_are_lost_is_delivered_again(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    for _ in range(4):
        assert await bench.take("w1") == task_id
        assert await bench.take("w1") == task_id, "a worker that asks again has not received it"
        await let_the_lease_expire(bench)
    assert await state(bench, task_id) is JobState.QUEUED


@pytest.mark.parametrize("sign", ["progress", "ping"])
async def test_a_job_whose_workers_go_silent_after_they_began_it_fails_after_three_attempts(
    bench: Bench, sign: str
) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    for number in range(3):
        assert await state(bench, task_id) is JobState.QUEUED
        await bench.take(f"w{number}")
        if sign == "progress":
            await bench.dispatcher.record_progress(f"w{number}", task_id, BEGUN)
        else:
            await bench.dispatcher.ping(f"w{number}", [task_id])
        await let_the_lease_expire(bench)
    job = await bench.queue.get(task_id)
    assert job is not None
    assert job.failure is not None
    assert job.failure.error_code is ErrorCode.GENERATION_FAILED
    assert "3 times" in job.failure.error


async def test_a_job_whose_worker_processes_exit_before_their_first_progress_fails_after_three_attempts(
    bench: Bench,
) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    for number in range(3):
        assert await state(bench, task_id) is JobState.QUEUED
        await bench.take(f"w{number}")
        await bench.dispatcher.release_worker(f"w{number}")
    assert await state(bench, task_id) is JobState.FAILED


async def test_a_job_that_no_worker_begins_does_not_hold_up_the_queue_for_ever(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    following = (await bench.queue.submit(JOB)).task_id
    deliveries = 0
    while await state(bench, task_id) is JobState.QUEUED:
        assert await bench.take("w1") == task_id
        await let_the_lease_expire(bench)
        deliveries += 1
        assert deliveries <= 10
    assert await state(bench, task_id) is JobState.FAILED
    assert await bench.take("w1") == following


async def test_deliveries_that_a_worker_began_end_a_row_of_deliveries_that_none_began(database_url: str) -> None:
    async with sql_bench(database_url, max_attempts=100) as bench:
        await bench.worker()
        task_id = (await bench.queue.submit(JOB)).task_id
        for number in range(24):
            assert await bench.take("w1") == task_id
            if number % 8 == 0:
                await bench.dispatcher.record_progress("w1", task_id, BEGUN)
            await let_the_lease_expire(bench)
        assert await state(bench, task_id) is JobState.QUEUED


async def test_a_retried_job_begins_again_with_all_its_attempts(bench: Bench) -> None:
    assert isinstance(bench.queue, SqlQueue)
    task_id = (await bench.queue.submit(JOB)).task_id
    for _ in range(2):
        for number in range(3):
            await bench.take(f"w{number}")
            await bench.dispatcher.release_worker(f"w{number}")
        assert await state(bench, task_id) is JobState.FAILED
        assert await bench.queue.retry(task_id)
    assert await state(bench, task_id) is JobState.QUEUED
