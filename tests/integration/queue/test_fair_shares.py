"""Clients with API keys share the workers: a queue's length each, and one task each in turn."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import httpx
import pytest

from contract.errors import ErrorCode, JobFailure
from shim.access import Access, parse_api_keys
from shim.app import create_app
from shim.queue.base import QueueFullError
from shim.queue.sql import SqlQueue
from storage.bucket import Bucket
from tests.support.full import full
from tests.support.http_server import serving
from tests.support.queues import JOB, NOWHERE, Bench, sql_bench

LIMIT = 10
FAILURE = JobFailure(error="bad luck", error_code=ErrorCode.OOM_ERROR)


@pytest.fixture
async def bench(database_url: str) -> AsyncIterator[Bench]:
    async with sql_bench(database_url, max_queue_size=LIMIT) as made:
        await made.worker()
        yield made


async def submit(bench: Bench, client: str) -> str:
    return (await bench.queue.submit(JOB, client=client)).task_id


async def fail_next(bench: Bench) -> str:
    """Takes the next job and ends it."""
    task_id = await bench.take("w1")
    await bench.dispatcher.fail("w1", task_id, FAILURE)
    return task_id


async def test_a_client_that_fills_its_queue_leaves_the_others_theirs(bench: Bench) -> None:
    for _ in range(LIMIT):
        await submit(bench, "greedy")
    with pytest.raises(QueueFullError, match=f"{LIMIT}"):
        await submit(bench, "greedy")
    for _ in range(LIMIT):
        await submit(bench, "modest")
    with pytest.raises(QueueFullError):
        await submit(bench, "modest")
    assert (await bench.queue.summary()).waiting == 2 * LIMIT


async def test_the_limit_of_each_client_holds_for_requests_at_the_same_moment(bench: Bench) -> None:
    calls = [submit(bench, client) for client in ("a", "b") for _ in range(LIMIT + 4)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(outcome, QueueFullError) for outcome in outcomes) == 2 * 4


async def test_clients_take_turns(bench: Bench) -> None:
    greedy = [await submit(bench, "greedy") for _ in range(4)]
    modest = [await submit(bench, "modest") for _ in range(2)]
    expected = [greedy[0], modest[0], greedy[1], modest[1], greedy[2], greedy[3]]
    assert [await fail_next(bench) for _ in expected] == expected


async def test_a_client_that_has_waited_before_gets_no_more_turns_than_the_others(bench: Bench) -> None:
    greedy = [await submit(bench, "greedy") for _ in range(6)]
    await fail_next(bench)
    await fail_next(bench)
    late = [await submit(bench, "late") for _ in range(3)]
    expected = [greedy[2], late[0], greedy[3], late[1], greedy[4], late[2], greedy[5]]
    assert [await fail_next(bench) for _ in expected] == expected


async def test_a_job_that_lost_its_worker_returns_to_the_front_whosever_it_is(bench: Bench) -> None:
    first = [await submit(bench, "a") for _ in range(3)]
    for _ in range(2):
        await fail_next(bench)
    lost = await bench.take("w1")
    assert lost == first[2]
    others = [await submit(bench, client) for client in ("b", "a", "c")]
    await bench.dispatcher.release_worker("w1", count_attempt=False)
    assert [await fail_next(bench) for _ in range(4)] == [lost, *others]


async def test_positions_and_backlogs_follow_the_turns(bench: Bench) -> None:
    greedy = [await submit(bench, "greedy") for _ in range(4)]
    submission = await bench.queue.submit(JOB, client="modest")
    assert submission.job.queue_position == 2
    assert len(submission.backlog.waiting) == 1, "the estimate counts the jobs that are rendered before it"
    order = [greedy[0], submission.task_id, *greedy[1:]]
    jobs = [await bench.queue.get(task_id) for task_id in order]
    assert [job.queue_position for job in jobs if job is not None] == [1, 2, 3, 4, 5]


async def test_without_clients_the_queue_is_one_line(bench: Bench) -> None:
    task_ids = [(await bench.queue.submit(JOB)).task_id for _ in range(LIMIT)]
    with pytest.raises(QueueFullError):
        await bench.queue.submit(JOB)
    assert [await fail_next(bench) for _ in task_ids] == task_ids


async def test_a_retry_counts_in_the_queue_of_its_client(bench: Bench) -> None:
    assert isinstance(bench.queue, SqlQueue)
    mine = await submit(bench, "a")
    await fail_next(bench)
    for _ in range(LIMIT):
        await submit(bench, "b")
    assert await bench.queue.retry(mine)
    await fail_next(bench)
    for _ in range(LIMIT):
        await submit(bench, "a")
    with pytest.raises(QueueFullError):
        await bench.queue.retry(mine)


async def test_a_client_that_retries_waits_for_its_turn(bench: Bench) -> None:
    assert isinstance(bench.queue, SqlQueue)
    mine = [await submit(bench, "a") for _ in range(3)]
    for _ in mine:
        await fail_next(bench)
    theirs = [await submit(bench, "b") for _ in range(2)]
    for task_id in mine:
        assert await bench.queue.retry(task_id)
    assert [await fail_next(bench) for _ in range(5)] == [mine[0], theirs[0], mine[1], theirs[1], mine[2]]


@pytest.mark.parametrize("seed", [0, *map(full, range(1, 4))])
async def test_no_client_gets_a_third_job_while_another_waits_for_its_first(bench: Bench, seed: int) -> None:
    """Whatever was submitted when. A client with nothing waiting may join the turn that has just served it."""
    choose = random.Random(seed)
    waiting: dict[str, str] = {}
    served_while_waiting = {(one, other): 0 for one in "abc" for other in "abc"}
    for _ in range(60):
        if choose.random() < 0.6 or not waiting:
            client = choose.choice("aaabbc")
            if list(waiting.values()).count(client) < LIMIT:
                waiting[await submit(bench, client)] = client
            continue
        served = waiting.pop(await fail_next(bench))
        for other in set("abc") - {served}:
            is_waiting = other in waiting.values()
            served_while_waiting[served, other] = served_while_waiting[served, other] + 1 if is_waiting else 0
            served_while_waiting[other, served] = 0
            assert served_while_waiting[served, other] <= 2, f"seed {seed}"


async def test_a_key_whose_queue_is_full_refuses_no_other_key(database_url: str) -> None:
    """Over HTTP, with two API keys."""
    keys = {name: f"{name}-key-0123456789abcdef" for name in ("greedy", "modest")}
    access = Access(parse_api_keys(",".join(f"{name}:{key}" for name, key in keys.items())))
    async with sql_bench(database_url, max_queue_size=2) as bench:
        await bench.worker()
        app = create_app(bench.queue, Bucket(NOWHERE), access=access)
        async with serving(app) as address, httpx.AsyncClient(base_url=address, timeout=30) as http:

            async def generate(name: str) -> httpx.Response:
                return await http.post("/generate", json=JOB.wire(), headers={"X-API-Key": keys[name]})

            assert [(await generate("greedy")).status_code for _ in range(3)] == [202, 202, 503]
            answers = [await generate("modest") for _ in range(2)]
            assert [answer.status_code for answer in answers] == [202, 202]
            headers = {"X-API-Key": keys["modest"]}
            position = (await http.get(f"/status/{answers[0].json()['task_id']}", headers=headers)).json()
            assert position["queue_position"] == 2, "the first task of one key, then the first of the other"
            refused = await generate("greedy")
            assert refused.json()["error_code"] == "QUEUE_FULL"
            assert "2 tasks of this API key" in refused.json()["error"]
