"""A server that is killed between the end of a task and its webhook sends the webhook after its restart."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest

from tests.support.receiver import SECRET, Receiver, receiving
from tests.support.service import Service, eventually

pytestmark = pytest.mark.timeout(600)

TOKEN = "platform-token-of-the-test"


def cancelled_task(service: Service) -> str:
    """A task that has ended, without a worker."""
    body = {"input": {"prompt": "A paper boat on a rainy street"}}
    answer = service.http.post("/v2/local/run", json=body, headers={"Authorization": TOKEN})
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["id"]
    assert service.http.delete(f"/tasks/{task_id}").status_code == 200
    return task_id


def tasks_of(receiver: Receiver) -> set[str]:
    return {one.verified()["data"]["task_id"] for one in receiver.received}


def test_a_killed_server_loses_no_webhook(tmp_path: Path) -> None:
    released = threading.Event()
    with receiving(lambda _: released.wait(60)) as receiver:
        service = Service(
            tmp_path,
            HUNYUAN_WORKERS="0",
            HUNYUAN_PLATFORM_TOKEN=TOKEN,
            HUNYUAN_WEBHOOK_SECRET=SECRET,
            HUNYUAN_WEBHOOK_URL=f"{receiver.url}?key=of-the-receiver",
            HUNYUAN_WEBHOOK_TIMEOUT="1",
            HUNYUAN_WEBHOOK_RETRIES=",".join(["1"] * 60),
            HUNYUAN_PUBLIC_URL="https://films.example",
        )
        try:
            # 1. Kill the server while the receiver has not answered a webhook, and just after other tasks have ended.
            service.start(until_ready=False)
            task_ids = {cancelled_task(service)}
            eventually("the first attempt", lambda: receiver.received)
            task_ids |= {cancelled_task(service) for _ in range(3)}
            service.kill()
            # 2. After the restart, the receiver answers.
            receiver.answer = lambda request: request.reply(204)
            released.set()
            before = len(receiver.received)
            service.start(until_ready=False)
            eventually("the webhooks of all tasks", lambda: tasks_of(receiver) == task_ids, 60)
            for task_id in task_ids:
                eventually("delivery", partial(is_delivered, service, task_id), 60)
        finally:
            service.http.close()
            if service.process is not None:
                assert service.stop() == 0, service.log.read_text()
        again = {one.webhook_id for one in receiver.received[before:]}
        assert len(again) == len(task_ids), "none was delivered before"
        assert {one.webhook_id for one in receiver.received[:before]} <= again
    log = service.log.read_text()
    for secret in (SECRET.removeprefix("whsec_"), "of-the-receiver", TOKEN):
        assert secret not in log


def is_delivered(service: Service, task_id: str) -> bool:
    state: str = service.status(task_id)["webhook"]["state"]
    return state == "delivered"
