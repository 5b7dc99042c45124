"""`webhook_url` in POST /generate, and the delivery in GET /status."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from contract.job import parse_input
from shim.app import create_app
from shim.queue.webhook_request import WebhookOptions
from storage.bucket import Bucket
from tests.support.http_server import serving
from tests.support.queues import JOB, NOWHERE, Bench, sql_bench

pytestmark = pytest.mark.anyio

URL = "https://receiver.example/videos?key=of-the-receiver"


@asynccontextmanager
async def running(directory: Path, webhooks: WebhookOptions | None) -> AsyncIterator[tuple[Bench, httpx.AsyncClient]]:
    async with sql_bench(f"sqlite:///{directory}/queue.sqlite3", webhooks=webhooks) as bench:
        await bench.worker()
        app = create_app(bench.queue, Bucket(NOWHERE))
        async with serving(app) as address, httpx.AsyncClient(base_url=address, timeout=30) as http:
            yield bench, http


def request(**fields: Any) -> dict[str, Any]:
    return {**JOB.wire(), **fields}


async def test_the_status_shows_the_delivery_and_neither_it_nor_the_worker_gets_the_url(tmp_path: Path) -> None:
    async with running(tmp_path, WebhookOptions(key=b"k" * 24)) as (bench, http):
        accepted = await http.post("/generate", json=request(webhook_url=URL))
        without = await http.post("/generate", json=request())
        assert (accepted.status_code, without.status_code) == (202, 202)
        assert set(accepted.json()) == set(without.json())
        answer = await http.get(f"/status/{accepted.json()['task_id']}")
        assert answer.json()["webhook"] == {
            "state": "pending",
            "attempts": 0,
            "last_status": None,
            "last_error": None,
            "next_attempt": None,
        }
        assert "webhook" not in (await http.get(f"/status/{without.json()['task_id']}")).json()
        deleted = await http.delete(f"/tasks/{accepted.json()['task_id']}")
        assert deleted.json()["webhook"]["state"] == "pending"
        assert "receiver" not in answer.text + deleted.text
        assert "webhook" not in (await http.delete(f"/tasks/{without.json()['task_id']}")).json()
        third = await http.post("/generate", json=request(webhook_url=URL))
        delivery = await bench.dispatcher.take("w1")
        assert delivery is not None
        assert delivery.task_id == third.json()["task_id"]
        assert parse_input(delivery.input) == JOB
        assert delivery.extras == {}


async def test_a_server_without_webhooks_refuses_a_request_for_one(tmp_path: Path) -> None:
    async with running(tmp_path, None) as (_, http):
        refused = await http.post("/generate", json=request(webhook_url=URL))
        assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_REQUEST")
        assert "HUNYUAN_WEBHOOK_SECRET" in refused.json()["error"]
        assert (await http.post("/generate", json=request(webhook_url=None))).status_code == 202


@pytest.mark.parametrize(
    "url",
    [
        *("", "receiver.example", "ftp://receiver.example/", "http://", "http://a b/", "http://x:99999/", 5),
        *(["http://x/"], "https://user:password@receiver.example/", "https://xn--/", "https://x/" + "x" * 2000),
    ],
)
async def test_a_url_that_can_not_be_used_is_refused_naming_the_field(tmp_path: Path, url: object) -> None:
    async with running(tmp_path, WebhookOptions(key=b"k" * 24)) as (_, http):
        refused = await http.post("/generate", json=request(webhook_url=url))
        assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_REQUEST")
        assert refused.json()["error"].startswith("webhook_url must be an http(s) URL")


async def test_the_webhook_is_part_of_the_request_that_an_idempotency_key_stands_for(tmp_path: Path) -> None:
    async with running(tmp_path, WebhookOptions(key=b"k" * 24)) as (_, http):
        key = {"Idempotency-Key": "one"}
        first, again = [await http.post("/generate", json=request(webhook_url=URL), headers=key) for _ in range(2)]
        assert first.json()["task_id"] == again.json()["task_id"]
        for other in (request(), request(webhook_url=f"{URL}2")):
            assert (await http.post("/generate", json=other, headers=key)).status_code == 409
