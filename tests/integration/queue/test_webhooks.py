"""Webhooks reach their receivers at least once, signed, whatever the receivers do."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from contract.errors import ErrorCode, JobFailure
from contract.worker import WorkerReport, WorkerState
from shim.api.status import status_of
from shim.queue.database import Database
from shim.queue.dispatch import Dispatcher
from shim.queue.job import JobSnapshot, WebhookState
from shim.queue.observer import JobObserver
from shim.queue.schema import jobs
from shim.queue.sql import SqlQueue
from shim.queue.webhook_request import WebhookOptions, signature
from shim.queue.webhooks import Webhooks
from shim.settings import ShimSettings
from tests.support.postgres import Postgres
from tests.support.queues import JOB, find_nothing, result
from tests.support.receiver import SECRET, Received, Receiver, Request, receiving

pytestmark = pytest.mark.anyio

OOM = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)


def options(**settings: Any) -> WebhookOptions:
    """Those of a server with these settings; private receivers are allowed."""
    fields = {"webhook_allow_private": True, "webhook_retries": "0.1,0.1,0.1,0.1", "webhook_timeout": 10, **settings}
    made = ShimSettings(webhook_secret=SecretStr(SECRET), **fields).webhooks
    assert made is not None
    return made


def describe(job: JobSnapshot) -> Mapping[str, Any]:
    return status_of(job, "https://films.example").model_dump(mode="json")


@dataclass
class Attempts(JobObserver):
    """The state of the webhook after each attempt."""

    states: list[str] = field(default_factory=list)

    def webhook_attempted(self, state: str) -> None:
        self.states.append(state)


@dataclass
class Server:
    """A queue with a ready worker, and the sender of its webhooks. `ahead` is how far its clock is in the future."""

    database: Database
    queue: SqlQueue
    dispatcher: Dispatcher
    webhooks: Webhooks
    observer: Attempts
    ahead: list[float] = field(default_factory=lambda: [0.0])

    async def task(self, receiver: Receiver | None, path: str = "") -> str:
        url = receiver.url + path if receiver is not None else None
        return (await self.queue.submit(JOB, webhook_url=url)).task_id

    async def cancelled(self, receiver: Receiver, path: str = "") -> str:
        """The quickest end of a task."""
        task_id = await self.task(receiver, path)
        await self.queue.cancel(task_id)
        return task_id

    async def state(self, task_id: str) -> WebhookState:
        job = await self.queue.get(task_id)
        assert job is not None
        assert job.webhook is not None
        return job.webhook

    async def until(self, task_id: str, holds: Callable[[WebhookState], object], what: str) -> WebhookState:
        deadline = time.monotonic() + 30
        while not holds(state := await self.state(task_id)):
            assert time.monotonic() < deadline, f"{what}: {state}"
            await asyncio.sleep(0.02)
        return state

    async def delivered(self, task_id: str) -> WebhookState:
        return await self.until(task_id, lambda state: state.state == "delivered", "delivery")

    async def given_up(self, task_id: str) -> WebhookState:
        return await self.until(task_id, lambda state: state.state == "failed", "the end of the attempts")

    async def later(self, seconds: float) -> None:
        """Moves the clock and makes the sender look at it."""
        self.ahead[0] += seconds
        async with self.database.write(notify=True):
            pass


@asynccontextmanager
async def running(url: str, how: WebhookOptions | None = None, *, sends: bool = True) -> AsyncIterator[Server]:
    ahead = [0.0]
    database = await Database.open(url, clock=lambda: time.time() + ahead[0], worker_timeout=3600)
    how = how or options()
    queue = SqlQueue(database, max_queue_size=200, webhooks=how)
    dispatcher = Dispatcher(database, find_result=find_nothing)
    observer = Attempts()
    webhooks = Webhooks(database, how, describe, observer)
    await dispatcher.report("w1", WorkerReport(state=WorkerState.READY, model="scripted"))
    sending = asyncio.create_task(webhooks.send_forever()) if sends else None
    try:
        yield Server(database, queue, dispatcher, webhooks, observer, ahead)
        assert sending is None or not sending.done(), "the sender has ended"
    finally:
        if sending is not None:
            sending.cancel()
            await asyncio.wait([sending])
        await database.close()


async def until(what: str, holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


def only(receiver: Receiver) -> Received:
    (received,) = receiver.received
    return received


# What is sent


def test_the_signature_is_that_of_the_standards_example() -> None:
    key = options().key
    made = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_each_end_of_a_task_is_an_event_with_the_status_of_the_task(database_url: str) -> None:
    with receiving() as receiver:
        async with running(database_url) as server:
            completed, failed, no_video, lost, waiting, purged = [await server.task(receiver) for _ in range(6)]
            for worker_id in ("w1", "w2", "w3", "w4"):
                await server.dispatcher.take(worker_id)
            await server.dispatcher.complete("w1", completed, result(completed).model_dump(mode="json"))
            await server.dispatcher.fail("w2", failed, OOM)
            await server.dispatcher.complete("w3", no_video, "no manifest")
            for attempt in range(3):  # HUNYUAN_MAX_ATTEMPTS
                assert attempt == 0 or await server.dispatcher.take("w4")
                await server.dispatcher.release_worker("w4")
            await server.queue.cancel(waiting)
            await server.queue.purge()
            for task_id in (completed, failed, no_video, lost, waiting, purged):
                await server.delivered(task_id)
    events = {event["data"]["task_id"]: event for event in (one.verified() for one in receiver.received)}
    assert {task_id: event["type"] for task_id, event in events.items()} == {
        completed: "task.completed",
        failed: "task.failed",
        no_video: "task.failed",
        lost: "task.failed",
        waiting: "task.cancelled",
        purged: "task.cancelled",
    }
    made = events[completed]["data"].pop("created_at")
    assert abs(datetime.fromisoformat(made) - datetime.now(UTC)) < timedelta(minutes=2)
    assert events[completed]["data"] == {
        "task_id": completed,
        "status": "completed",
        "video_url": f"https://films.example/videos/{completed}.mp4",
        "duration": 5,
        "resolution": "720p",
        "file_size": 1000,
        "poster_url": f"https://films.example/videos/{completed}.jpg",
        "prompt": "A paper boat on a rainy street",
        "model": "scripted",
        "seed": 1,
        "timings": {"total": 30.0},
    }
    assert events[failed]["data"] == {
        "task_id": failed,
        "status": "failed",
        "error": "Out of memory",
        "error_code": "OOM_ERROR",
    }
    assert events[waiting]["data"]["error_code"] == "CANCELLED"
    for event in events.values():
        assert set(event) == {"type", "timestamp", "data"}
        assert abs(datetime.fromisoformat(event["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=2)
    assert {one.headers["content-type"] for one in receiver.received} == {"application/json"}
    assert {one.headers["host"] for one in receiver.received} == {f"127.0.0.1:{receiver.port}"}


async def test_a_task_without_a_webhook_has_none(database_url: str) -> None:
    async with running(database_url) as server:
        task_id = await server.task(None)
        await server.queue.cancel(task_id)
        job = await server.queue.get(task_id)
        assert job is not None
        assert job.webhook is None
        assert await server.webhooks.next_due() is None


# Receivers that fail


async def test_a_receiver_that_is_down_for_a_minute_gets_it_with_the_schedule_of_the_standard(
    database_url: str,
) -> None:
    how = options(webhook_retries=ShimSettings.model_fields["webhook_retries"].default)
    with receiving() as receiver:
        receiver.close()
        async with running(database_url, how) as server:
            task_id = await server.cancelled(receiver)
            first = await server.until(task_id, lambda state: state.attempts == 1, "the first attempt")
            assert (first.state, first.last_status) == ("pending", None)
            assert first.last_error == "the connection failed (ConnectError)"
            assert 4 < _seconds_until(first, server) <= 5.5
            await server.later(6)
            second = await server.until(task_id, lambda state: state.attempts == 2, "the second attempt")
            assert 260 < _seconds_until(second, server) <= 330
            await server.later(60)
            receiver.open()
            assert (await server.state(task_id)).attempts == 2, "the receiver is back, and nothing is due"
            await server.later(280)
            third = await server.delivered(task_id)
    assert (third.attempts, third.last_status, third.last_error, third.next_attempt) == (3, 204, None, None)
    assert only(receiver).verified()["type"] == "task.cancelled"


def _seconds_until(state: WebhookState, server: Server) -> float:
    assert state.next_attempt is not None
    return state.next_attempt.timestamp() - server.database.clock()


async def test_a_receiver_that_answers_500_gets_it_again_under_the_same_id(database_url: str) -> None:
    statuses = iter([500, 404, 204])
    with receiving(lambda request: request.reply(next(statuses))) as receiver:
        async with running(database_url) as server:
            task_id = await server.cancelled(receiver)
            state = await server.delivered(task_id)
    assert (state.attempts, state.last_status) == (3, 204)
    assert len({one.webhook_id for one in receiver.received}) == 1
    assert len({one.body for one in receiver.received}) == 1
    for one in receiver.received:
        one.verified()


async def test_a_webhook_is_given_up_after_the_last_retry_and_the_task_says_so(database_url: str) -> None:
    with receiving(lambda request: request.reply(500)) as receiver:
        async with running(database_url, options(webhook_retries="0.1,0.1")) as server:
            state = await server.given_up(await server.cancelled(receiver))
            assert await server.webhooks.next_due() is None
            await until("the metric", lambda: server.observer.states == ["pending", "pending", "failed"])
    assert (state.attempts, state.last_status, state.next_attempt) == (3, 500, None)
    assert len(receiver.received) == 3


async def test_a_webhook_is_given_up_four_days_after_the_end_of_its_task(database_url: str) -> None:
    with receiving(lambda request: request.reply(500)) as receiver:
        async with running(database_url, options(webhook_retries="3600," * 200)) as server:
            task_id = await server.cancelled(receiver)
            await server.until(task_id, lambda state: state.attempts == 1, "the first attempt")
            await server.later(4 * 24 * 3600)
            assert (await server.given_up(task_id)).attempts == 2


async def test_a_receiver_that_is_gone_gets_nothing_more(database_url: str) -> None:
    with receiving(lambda request: request.reply(410)) as receiver:
        async with running(database_url) as server:
            assert (await server.given_up(await server.cancelled(receiver))).attempts == 1


async def test_a_receiver_may_ask_for_a_longer_wait(database_url: str) -> None:
    with receiving(lambda request: request.reply(429, Retry_After="120")) as receiver:
        async with running(database_url) as server:
            task_id = await server.cancelled(receiver)
            state = await server.until(task_id, lambda state: state.attempts == 1, "the first attempt")
            assert 110 < _seconds_until(state, server) <= 120


async def test_slow_receivers_hold_up_no_other_receiver(database_url: str) -> None:
    """One answers nothing, and has more webhooks than are sent at the same time. One sends a byte now and then."""
    released = threading.Event()
    with (
        receiving(lambda _: released.wait(60)) as silent,
        receiving(lambda request: drip(request, released)) as dripping,
        receiving() as quick,
    ):
        async with running(database_url, options(webhook_timeout=60)) as server:
            for _ in range(66):
                await server.task(silent)
            for _ in range(5):
                await server.task(dripping)
            await server.queue.purge()
            await until("four requests to each", lambda: len(silent.received) >= 4 and len(dripping.received) >= 4)
            assert (await server.delivered(await server.cancelled(quick))).attempts == 1
            assert len(silent.received) == len(dripping.received) == 4
        released.set()


async def test_a_receiver_that_sends_byte_by_byte_is_cut_off(database_url: str) -> None:
    released = threading.Event()
    with receiving(lambda request: drip(request, released)) as receiver:
        async with running(database_url, options(webhook_retries="1000", webhook_timeout=1)) as server:
            task_id = await server.cancelled(receiver)
            state = await server.until(task_id, lambda state: state.attempts == 1, "the end of the attempt")
        released.set()
    assert state.last_error == "no answer within 1 s"


def drip(request: Request, released: threading.Event) -> None:
    while not released.wait(0.1):
        request.wfile.write(b"H")
        request.wfile.flush()


# Addresses


async def test_a_redirect_is_a_failure_and_is_not_followed(database_url: str) -> None:
    with receiving() as internal, receiving(lambda request: request.reply(302, Location=internal.url)) as receiver:
        async with running(database_url, options(webhook_retries="0.1")) as server:
            state = await server.given_up(await server.cancelled(receiver))
    assert (state.attempts, state.last_status) == (2, 302)
    assert internal.received == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
async def test_a_private_address_gets_nothing(database_url: str, host: str) -> None:
    with receiving() as receiver:
        async with running(database_url, options(webhook_allow_private=False, webhook_retries="0.1")) as server:
            task_id = (await server.queue.submit(JOB, webhook_url=f"http://{host}:{receiver.port}/")).task_id
            await server.queue.cancel(task_id)
            state = await server.given_up(task_id)
    assert state.last_error == "the receiver's host is not on the public internet"
    assert receiver.received == []


async def test_the_operators_own_url_may_be_private_and_gets_what_names_no_other(database_url: str) -> None:
    with receiving() as receiver, receiving() as other:
        how = options(webhook_allow_private=False, webhook_url=receiver.url, webhook_retries="0.1")
        async with running(database_url, how) as server:
            enqueued = await server.queue.enqueue({"prompt": "any"}, {})
            submitted = await server.task(None)
            elsewhere = await server.task(other)
            await server.queue.purge()
            for task_id in (enqueued, submitted):
                await server.delivered(task_id)
            await server.given_up(elsewhere)
    assert {one.verified()["data"]["task_id"] for one in receiver.received} == {enqueued, submitted}
    assert other.received == []


async def test_a_resolver_that_does_not_answer_counts_against_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = threading.Event(), threading.Event()

    def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
        asked.set()
        answered.wait(20)
        return []

    how = options(webhook_retries="1000", webhook_timeout=1)
    async with running(f"sqlite:///{tmp_path}/queue.sqlite3", how) as server:
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        task_id = (await server.queue.submit(JOB, webhook_url="http://receiver.example/")).task_id
        await server.queue.cancel(task_id)
        state = await server.until(task_id, lambda state: state.attempts == 1, "the end of the attempt")
        assert state.last_error == "no answer within 1 s"
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "resolve"]
        answered.set()
        thread.join(10)  # an error in it fails the test
    assert asked.is_set()


# The outbox


async def test_several_servers_send_each_webhook_once(postgres: Postgres) -> None:
    url = postgres.create_database()
    with receiving() as receiver:
        async with running(url) as one, running(url), running(url):
            task_ids = [await one.task(receiver, f"?{number}") for number in range(40)]
            await one.queue.purge()
            for task_id in task_ids:
                await one.delivered(task_id)
    assert Counter(one.path for one in receiver.received) == Counter(f"/hook?{number}" for number in range(40))


async def test_an_attempt_that_a_killed_server_made_is_made_again(database_url: str) -> None:
    released = threading.Event()
    with receiving(lambda _: released.wait(30)) as receiver:
        async with running(database_url) as server:
            task_id = await server.cancelled(receiver)
            await until("the first attempt", lambda: receiver.received)
        released.set()
        receiver.answer = lambda request: request.reply(204)
        async with running(database_url) as server:
            assert (await server.state(task_id)).attempts == 0
            await server.later(21)  # its time limit, and 10 s
            await server.delivered(task_id)
    first, second = receiver.received
    assert first.webhook_id == second.webhook_id
    assert first.verified() == second.verified()


async def test_the_queue_remembers_a_task_until_its_webhook_is_sent(database_url: str) -> None:
    with receiving() as receiver:
        receiver.close()
        async with running(database_url, options(webhook_retries="1000,1000")) as server:
            task_id = await server.cancelled(receiver)
            await server.until(task_id, lambda state: state.attempts == 1, "the first attempt")
            forgetful = Dispatcher(server.database, find_result=find_nothing, history_ttl=10)
            await _without_bucket_outbox(server.database)
            await server.later(20)
            await forgetful.sweep()
            assert (await server.state(task_id)).attempts == 1
            receiver.open()
            await server.later(1200)
            await server.delivered(task_id)
            await forgetful.sweep()
            assert await server.queue.get(task_id) is None


async def _without_bucket_outbox(database: Database) -> None:
    async with database.write() as connection:
        await connection.execute(jobs.update().values(bucket_due_at=None))


async def test_a_task_that_is_retried_sends_an_event_of_its_new_end(database_url: str) -> None:
    with receiving() as receiver:
        async with running(database_url) as server:
            task_id = await server.task(receiver)
            await server.dispatcher.take("w1")
            await server.dispatcher.fail("w1", task_id, OOM)
            await server.delivered(task_id)
            assert await server.queue.retry(task_id)
            assert await server.state(task_id) == WebhookState()
            await server.dispatcher.take("w1")
            await server.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
            await server.delivered(task_id)
    assert [one.verified()["type"] for one in receiver.received] == ["task.failed", "task.completed"]
    assert len({one.webhook_id for one in receiver.received}) == 2


async def test_an_event_that_can_not_be_made_stops_no_other(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken: list[str] = []

    def fragile(job: JobSnapshot) -> Mapping[str, Any]:
        if job.task_id in broken:
            raise RuntimeError("boom")
        return describe(job)

    with receiving() as receiver:
        async with running(database_url, sends=False) as server:
            webhooks = Webhooks(server.database, options(webhook_retries="0.1"), fragile)
            sending = asyncio.create_task(webhooks.send_forever())
            broken.append(await server.task(receiver))
            await server.queue.cancel(broken[0])
            await server.delivered(await server.cancelled(receiver))
            state = await server.given_up(broken[0])
            sending.cancel()
            await asyncio.wait([sending])
    assert state.last_error == "the server could not send it (RuntimeError)"
    assert "RuntimeError: boom" in caplog.text


async def test_logs_name_the_receivers_host_and_neither_the_secret_nor_the_path(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "shim")
    statuses = iter([500, 204, 410])
    with receiving(lambda request: request.reply(next(statuses))) as receiver:
        async with running(database_url) as server:
            await server.delivered(await server.cancelled(receiver, "?key=of-the-receiver"))
            await server.given_up(await server.cancelled(receiver, "?key=of-the-receiver"))
    assert f"delivered to 127.0.0.1:{receiver.port}" in caplog.text
    assert "of-the-receiver" not in caplog.text
    assert SECRET.removeprefix("whsec_") not in caplog.text
    assert "of-the-receiver" not in repr(options(webhook_url=f"{receiver.url}?key=of-the-receiver"))
