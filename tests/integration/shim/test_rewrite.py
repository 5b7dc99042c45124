"""Requests with `enhance_prompt`: the chat model is a server of the test, all else is real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from contract.job import MAX_REWRITTEN_LENGTH, InvalidInputError, QueuedInput, parse_queued
from shim.access import OPEN_TO_ALL, Access
from shim.app import create_app
from shim.queue.base import IdempotencyConflictError, QueueFullError
from shim.rewrite import Rewriter
from shim.settings import ShimSettings
from shim.tasks import StoredVideos, Tasks
from storage.bucket import Bucket
from tests.support.chat_model import ChatModel, chat_model, completion
from tests.support.http_server import serving
from tests.support.queues import JOB, NOWHERE, Bench, empty, runpod_bench, sql_bench

REWRITTEN = "A small boat folded from white paper drifts along a flooded street while heavy rain falls."
ANSWER = f"<prompt>{REWRITTEN}</prompt>"
KEY = "a-secret-key-of-the-chat-model"
ENHANCED = JOB.model_copy(update={"enhance_prompt": True})


@pytest.fixture
def chat() -> Iterator[ChatModel]:
    with chat_model() as made:
        made.answers.append(ANSWER)
        yield made


@pytest.fixture(params=["sql", "runpod"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    url = f"sqlite:///{tmp_path}/queue.sqlite3"
    async with runpod_bench(url) if request.param == "runpod" else sql_bench(url) as made:
        await made.worker()
        yield made


@asynccontextmanager
async def tasks(bench: Bench, chat: ChatModel, time_limit: float = 5.0) -> AsyncIterator[Tasks]:
    rewriter = Rewriter(chat.base_url, "a-chat-model", KEY, time_limit=time_limit)
    try:
        yield Tasks(bench.queue, StoredVideos(Bucket(NOWHERE)), rewriter=rewriter)
    finally:
        await rewriter.close()


async def taken(bench: Bench, worker_id: str = "w1") -> QueuedInput:
    """The input of the next job, as its worker reads it."""
    delivery = await bench.dispatcher.take(worker_id)
    assert delivery is not None
    return parse_queued(delivery.input)


async def test_a_job_carries_the_requests_prompt_and_the_rewritten_one(bench: Bench, chat: ChatModel) -> None:
    async with tasks(bench, chat) as made:
        await made.submit(ENHANCED)
    queued = await taken(bench)
    assert queued.request == ENHANCED
    assert queued.rewritten_prompt == REWRITTEN == queued.rendered.prompt
    assert queued.warnings == ()
    [(path, headers, body)] = chat.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "a-chat-model"
    system, user = body["messages"]
    assert user == {"role": "user", "content": JOB.prompt}
    assert "fits 5 seconds" in system["content"]
    assert "image" not in system["content"]


async def test_a_request_without_it_is_not_sent_to_the_chat_model(bench: Bench, chat: ChatModel) -> None:
    async with tasks(bench, chat) as made:
        await made.submit(JOB)
    assert (await taken(bench)).rendered == JOB
    assert chat.requests == []


async def test_the_chat_model_learns_that_the_video_starts_from_an_image(bench: Bench, chat: ChatModel) -> None:
    async with tasks(bench, chat) as made:
        await made.submit(ENHANCED.model_copy(update={"image": "https://example.com/x.png"}))
    assert "starts from an image" in chat.requests[0][2]["messages"][0]["content"]


UNUSABLE = {
    "an error": ((500, b"down: " + KEY.encode()), "status 500"),
    "a wrong key": ((401, KEY.encode()), "status 401"),
    "no JSON": ((200, b"<html>"), "no chat completion"),
    "other JSON": ((200, b'{"choices": []}'), "no chat completion"),
    "JSON that is nested too deeply": ((200, b"[" * 200_000), "no chat completion"),
    "no text": ((200, completion(None)), "no text"),
    "megabytes": ((200, completion("x" * 300_000)), "too long"),
    "a refusal": ("I am sorry, but I can't help with that.", "has no prompt"),
    "an empty prompt": ("<prompt> \n </prompt>", "0 characters"),
    "a prompt that is too long": (f"<prompt>{'x' * (MAX_REWRITTEN_LENGTH + 1)}</prompt>", "1501 characters"),
    "no Unicode": ("<prompt>A paper boat \ud800 on a street</prompt>", "no text"),
}


@pytest.mark.parametrize(("answer", "reason"), UNUSABLE.values(), ids=UNUSABLE.keys())
async def test_an_unusable_answer_costs_a_warning(
    tmp_path: Path, chat: ChatModel, caplog: pytest.LogCaptureFixture, answer: Any, reason: str
) -> None:
    chat.answers[0] = answer
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench, tasks(bench, chat) as made:
        await bench.worker()
        await made.submit(ENHANCED)
        queued = await taken(bench)
    assert queued.rendered.prompt == JOB.prompt
    assert queued.rewritten_prompt is None
    [warning] = queued.warnings
    assert warning.startswith("The prompt was not rewritten: the chat model")
    assert reason in warning
    assert "HUNYUAN_REWRITE_BASE_URL" in caplog.text
    for text in (warning, caplog.text):
        assert KEY not in text
        assert chat.base_url not in text


@pytest.mark.parametrize(
    ("prompt", "answer", "is_kept"),
    [
        ('A shop sign that says "OPEN" in the rain', "A red sign says “OPEN” over a wet door.", True),
        ('A shop sign that says "OPEN" in the rain', 'A red sign says "CLOSED" over a wet door.', False),
        ("招牌上写着“营业中”，下着雨，街道很安静", "雨夜里，红色招牌上写着“营业中”，水珠滑落。", True),
        ("招牌上写着“营业中”，下着雨，街道很安静", "In the rain, a red sign says that it is open.", False),
    ],
)
async def test_a_prompt_that_lost_its_quoted_text_is_not_used(
    tmp_path: Path, chat: ChatModel, prompt: str, answer: str, is_kept: bool
) -> None:
    chat.answers[0] = f"<prompt>{answer}</prompt>"
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench, tasks(bench, chat) as made:
        await bench.worker()
        await made.submit(ENHANCED.model_copy(update={"prompt": prompt}))
        queued = await taken(bench)
    assert queued.rendered.prompt == (answer if is_kept else prompt)
    assert bool(queued.warnings) is not is_kept


async def test_the_reasoning_of_a_chat_model_is_dropped(tmp_path: Path, chat: ChatModel) -> None:
    chat.answers[0] = (
        f"<think>Shall I write <prompt>this one</prompt>?</think>\n<prompt>\n{REWRITTEN}\n</prompt> Enjoy!"
    )
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench, tasks(bench, chat) as made:
        await bench.worker()
        await made.submit(ENHANCED)
        assert (await taken(bench)).rewritten_prompt == REWRITTEN


async def test_an_error_that_passes_is_retried_once(tmp_path: Path, chat: ChatModel) -> None:
    chat.answers.appendleft((503, b""))
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench, tasks(bench, chat) as made:
        await bench.worker()
        await made.submit(ENHANCED)
        assert (await taken(bench)).rewritten_prompt == REWRITTEN
    assert len(chat.requests) == 2


async def test_other_tasks_are_accepted_while_the_chat_model_works(database_url: str, chat: ChatModel) -> None:
    chat.answering.clear()
    async with sql_bench(database_url) as bench, tasks(bench, chat, time_limit=60.0) as made:
        await empty(bench.database)
        await bench.worker()
        slow = asyncio.create_task(made.submit(ENHANCED))
        assert await asyncio.to_thread(chat.asked.wait, 30)
        quick = await made.submit(JOB)
        assert await bench.take("w1") == quick.task_id
        assert await bench.dispatcher.take("w2") is None
        chat.answering.set()
        assert await bench.queue.get((await slow).task_id) is not None
        assert (await taken(bench, "w2")).rewritten_prompt == REWRITTEN


async def test_a_slow_chat_model_costs_a_warning_after_its_time_limit(tmp_path: Path, chat: ChatModel) -> None:
    chat.answering.clear()
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench, tasks(bench, chat, time_limit=0.2) as made:
        await bench.worker()
        await made.submit(ENHANCED)
        assert (await taken(bench)).warnings == (
            "The prompt was not rewritten: the chat model did not answer within 0.2 s",
        )


async def test_a_repeated_request_gets_its_task_and_is_not_rewritten_again(bench: Bench, chat: ChatModel) -> None:
    async with tasks(bench, chat) as made:
        first, again = [await made.submit(ENHANCED, "a key") for _ in range(2)]
        assert again.task_id == first.task_id
        with pytest.raises(IdempotencyConflictError):
            await made.submit(ENHANCED.model_copy(update={"seed": 1}), "a key")
    assert len(chat.requests) == 1


async def test_a_request_that_is_refused_is_not_rewritten(bench: Bench, chat: ChatModel) -> None:
    async with tasks(bench, chat) as made:
        for _ in range(3):
            await made.submit(JOB)
        with pytest.raises(QueueFullError):
            await made.submit(ENHANCED)
    assert chat.requests == []


async def test_a_server_without_a_chat_model_says_so(tmp_path: Path) -> None:
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench, _client(bench, None) as http:
        answer = await http.post("/generate", json=ENHANCED.wire())
        health = await http.get("/health")
    assert answer.status_code == 400
    assert answer.json()["error_code"] == "INVALID_REQUEST"
    assert answer.json()["error"].startswith("enhance_prompt: this server rewrites no prompts")
    assert health.json()["rewrites_prompts"] is False


async def test_over_http_each_rewriting_takes_one_rate_token(tmp_path: Path, chat: ChatModel) -> None:
    rewriter = Rewriter(chat.base_url, "a-chat-model")
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench:
        await bench.worker()
        async with _client(bench, rewriter, Access((), 2, (), None)) as http:
            assert (await http.get("/health")).json()["rewrites_prompts"] is True
            statuses = [
                (await http.post("/generate", json=ENHANCED.wire(), headers={"Idempotency-Key": key})).status_code
                for key in ("a", "a", "b", "c", "a")
            ]
    assert statuses == [202, 202, 202, 429, 202]
    assert len(chat.requests) == 2
    assert "Authorization" not in chat.requests[0][1]


@asynccontextmanager
async def _client(bench: Bench, rewriter: Rewriter | None, access: Access = OPEN_TO_ALL) -> AsyncIterator[Any]:
    app = create_app(bench.queue, Bucket(NOWHERE), access=access, rewriter=rewriter)
    async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
        yield http


def test_a_job_that_no_server_has_rewritten_is_refused_by_its_worker() -> None:
    with pytest.raises(InvalidInputError, match="enhance_prompt: our server rewrites prompts"):
        parse_queued(ENHANCED.wire())


def test_address_and_model_need_each_other() -> None:
    with pytest.raises(ValidationError, match="set both HUNYUAN_REWRITE_BASE_URL and HUNYUAN_REWRITE_MODEL"):
        ShimSettings(rewrite_model="a-chat-model")
