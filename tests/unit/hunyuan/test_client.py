"""The clients against servers that lose answers, restart, refuse, and send events or do not."""

from __future__ import annotations

import base64
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import anyio
import pytest

import hunyuan
from contract.errors import ErrorCode
from contract.job import AspectRatio, JobRequest, Resolution
from hunyuan import AsyncClient, Client, FailedStatus, ProcessingStatus, RequestFields, TaskStatus, Video, errors
from hunyuan.operations import Operations
from shim.errors import ServerErrorCode
from tests.support.scripted_api import LOST, Answer, Request, events, refusal, scripted_api

PROMPT = "A paper boat on a rainy street"
ACCEPTED = Answer(202, {"task_id": "t1", "status": "processing", "estimated_time": 1})
RUNNING = {"task_id": "t1", "status": "processing", "progress": 40, "elapsed_time": 3, "stage": "denoising"}
COMPLETED = {
    **{"task_id": "t1", "status": "completed", "video_url": "http://x/t1.mp4", "duration": 5, "resolution": "720p"},
    **{"file_size": 5, "added_later": "kept"},
}
FAILED = {"task_id": "t1", "status": "failed", "error": "Out of memory", "error_code": "OOM_ERROR"}
VIDEO = b"0123456789" * 100


def in_turn(*answers: Answer) -> Callable[[Request], Answer]:
    """The answers one after another, and the last one for ever."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def of_old_server(*statuses: Answer) -> Callable[[Request], Answer]:
    """A server without events, whose task has these statuses."""
    polls = in_turn(*statuses)

    def answer(request: Request) -> Answer:
        return refusal(405, "METHOD_NOT_ALLOWED") if request.path.endswith("/events") else polls(request)

    return answer


# Requests


def test_a_request_whose_answer_was_lost_is_sent_again_under_the_same_key() -> None:
    with scripted_api(in_turn(LOST, ACCEPTED)) as api, Client(api.address) as client:
        assert client.generate(PROMPT, duration=5).task_id == "t1"
    keys = {request.headers["Idempotency-Key"] for request in api.requests}
    assert (len(api.requests), len(keys)) == (2, 1)
    assert api.requests[0].body == {"prompt": PROMPT, "duration": 5}


def test_every_task_has_a_key_of_its_own_unless_the_caller_has_one() -> None:
    with scripted_api(in_turn(ACCEPTED)) as api, Client(api.address) as client:
        client.generate(PROMPT)
        client.generate({"prompt": PROMPT, "seed": 3})
        client.generate(PROMPT, idempotency_key="mine")
    first, second, third = (request.headers["Idempotency-Key"] for request in api.requests)
    assert (first != second, third) == (True, "mine")
    assert api.requests[1].body == {"prompt": PROMPT, "seed": 3}


def test_an_unreachable_server_is_not_retried() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(hunyuan.UnreachableError):
        client.generate(PROMPT)


def test_a_busy_server_is_asked_again_only_for_as_long_as_the_caller_says() -> None:
    full = refusal(503, "QUEUE_FULL", Retry_After="0")
    with scripted_api(in_turn(full, ACCEPTED)) as api, Client(api.address) as client:
        with pytest.raises(errors.QueueFullError) as caught:
            client.generate(PROMPT)
        assert isinstance(caught.value, hunyuan.RefusedError)
        assert (caught.value.status, caught.value.retry_after, caught.value.error) == (503, 0, "no")
        assert client.generate(PROMPT, wait_if_busy=30).task_id == "t1"


def test_a_server_that_is_not_ours_is_named() -> None:
    with scripted_api(in_turn(Answer(200, b"<html>"))) as api, Client(api.address) as client:
        with pytest.raises(hunyuan.UnexpectedAnswerError, match=api.address):
            client.health()
        api.answer = in_turn(Answer(502, b"<html>"))
        with pytest.raises(hunyuan.RefusedError, match="502 Bad Gateway") as caught:
            client.health()
        assert caught.value.error_code is None


def test_the_key_of_the_environment_goes_to_the_server_of_the_environment_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    health = {"status": "healthy", "model_loaded": True, "gpu_available": False, "vram_free": "0.0 GB", "version": "1"}
    with scripted_api(in_turn(Answer(200, health))) as api:
        monkeypatch.setenv("HUNYUAN_SERVER", api.address)
        monkeypatch.setenv("HUNYUAN_API_KEY", "a-key-of-16-characters")
        with Client() as client:
            client.health()
        with Client(api.address) as client:
            client.health()
    assert [request.headers.get("Authorization") for request in api.requests] == ["Bearer a-key-of-16-characters", None]


def test_an_image_on_this_machine_is_sent_as_a_data_url(tmp_path: Path) -> None:
    path = tmp_path / "boat.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nrest")
    with scripted_api(in_turn(ACCEPTED)) as api, Client(api.address) as client:
        client.generate(PROMPT, image=path)
        client.generate(PROMPT, image="https://films.example/boat.png")
        path.write_bytes(b"text")
        with pytest.raises(ValueError, match=r"boat\.png is not a JPEG, PNG or WebP file"):
            client.generate(PROMPT, image=path)
    sent = [request.body["image"] for request in api.requests]
    assert base64.b64decode(sent[0].removeprefix("data:image/png;base64,")) == b"\x89PNG\r\n\x1a\nrest"
    assert sent[1:] == ["https://films.example/boat.png"]


def test_a_large_image_is_uploaded_and_an_uploaded_one_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "boat.jpg"
    path.write_bytes(b"\xff\xd8\xff" + bytes(40_000))
    stored = Answer(201, {"image": "upload:1", "expires_at": "2026-01-01T00:00:00Z"})
    answers = in_turn(refusal(503, "SERVER_BUSY", retry_after="0"), stored, ACCEPTED)
    with scripted_api(answers) as api, Client(api.address) as client:
        client.generate(PROMPT, image=path, wait_if_busy=30)
        client.generate(PROMPT, image="upload:2")
    assert api.paths("POST") == ["/images", "/images", "/generate", "/generate"]
    upload, first, second = api.requests[1:]
    assert (upload.headers["Content-Type"], upload.body) == ("image/jpeg", path.read_bytes())
    assert (first.body["image"], second.body["image"]) == ("upload:1", "upload:2")


def test_a_page_of_tasks_and_its_cursor() -> None:
    page = Answer(200, {"tasks": [RUNNING, COMPLETED, FAILED], "next_cursor": "c2"})
    with scripted_api(in_turn(page)) as api, Client(api.address) as client:
        found = client.list(status="failed", limit=3, cursor="c1")
    assert api.paths() == ["/tasks?status=failed&limit=3&cursor=c1"]
    assert ([task.status for task in found.tasks], found.next_cursor) == (["processing", "completed", "failed"], "c2")


# Waiting


def test_wait_continues_when_the_server_is_back() -> None:
    away = refusal(503, "QUEUE_UNAVAILABLE", Retry_After="0")
    with scripted_api(of_old_server(away, away, Answer(200, COMPLETED))) as api, Client(api.address) as client:
        status = client.wait("t1")
    assert api.paths() == ["/tasks/t1/events", *["/status/t1"] * 3]
    assert status.file_size == 5
    assert status.model_dump(exclude_unset=True)["added_later"] == "kept"


def test_events_are_followed_without_a_poll() -> None:
    seen: list[TaskStatus] = []
    with scripted_api(in_turn(events(RUNNING, RUNNING, COMPLETED))) as api, Client(api.address) as client:
        client.wait("t1", seen.append)
    assert api.paths() == ["/tasks/t1/events"]
    assert [status.status for status in seen] == ["processing", "completed"], "an unchanged status is not repeated"
    assert isinstance(seen[0], ProcessingStatus)
    assert (seen[0].progress, seen[0].stage) == (40, "denoising")


def test_a_stream_that_breaks_off_is_opened_again() -> None:
    cut = events(RUNNING)
    torn = Answer(200, cut.body, cut.headers, length=len(cut.body) + 1)
    streams = in_turn(torn, events(COMPLETED))

    def answer(request: Request) -> Answer:
        return streams(request) if request.path.endswith("/events") else Answer(200, RUNNING)

    with scripted_api(answer) as api, Client(api.address) as client:
        assert client.wait("t1").status == "completed"
    assert api.paths() == ["/tasks/t1/events", "/status/t1", "/tasks/t1/events"]


def test_events_whose_text_has_other_line_separators_are_read_whole() -> None:
    failed = {**FAILED, "error": "a\u2028b\x85c"}
    text = f"data: {hunyuan.FailedStatus(**failed).model_dump_json()}\n\n".encode()
    assert "\u2028".encode() in text
    stream = Answer(200, text, {"Content-Type": "text/event-stream; charset=utf-8"})
    with scripted_api(in_turn(stream)) as api, Client(api.address) as client:
        (status,) = client.stream_events("t1")
    assert isinstance(status, FailedStatus)
    assert status.error == "a\u2028b\x85c"


def test_a_task_that_failed_raises_the_class_of_its_code() -> None:
    with scripted_api(in_turn(events(FAILED))) as api, Client(api.address) as client:
        with pytest.raises(errors.OomError, match="Out of memory") as caught:
            client.wait("t1")
        assert isinstance(caught.value, hunyuan.TaskFailedError)
        assert caught.value.status.task_id == "t1"
        assert [status.status for status in client.stream_events("t1")] == ["failed"], "and as an event, it is no error"


def test_wait_ends_after_its_timeout_and_says_that_the_task_continues() -> None:
    with scripted_api(of_old_server(Answer(200, RUNNING))) as api, Client(api.address) as client:
        asked = time.monotonic()
        with pytest.raises(TimeoutError, match=r"within 0\.2 s; it continues"):
            client.wait("t1", timeout=0.2)
    assert time.monotonic() - asked < 5
    assert api.paths()[0] == "/status/t1"


def test_a_task_id_with_odd_characters_stays_one_part_of_the_path() -> None:
    with scripted_api(in_turn(Answer(200, RUNNING))) as api, Client(api.address) as client:
        client.status("../health?x=1")
    assert api.paths() == ["/status/..%2Fhealth%3Fx%3D1"]


# Videos


def of_interrupted_download(etags: list[str]) -> Callable[[Request], Answer]:
    """Sends 400 bytes and breaks off, and then what is asked for of the video with the next ETag."""
    parts = iter(etags)

    def answer(request: Request) -> Answer:
        etag = next(parts)
        if "Range" not in request.headers:
            return Answer(200, VIDEO[:400], {"ETag": etag}, length=len(VIDEO))
        start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if request.headers["If-Range"] != etag:
            return Answer(200, VIDEO[::-1], {"ETag": etag})
        return Answer(206, VIDEO[start:], {"ETag": etag})

    return answer


@pytest.mark.parametrize(("etags", "whole"), [(['"a"', '"a"'], VIDEO), (['"a"', '"b"'], VIDEO[::-1])])
def test_a_download_that_breaks_off_is_continued(tmp_path: Path, etags: list[str], whole: bytes) -> None:
    with scripted_api(of_interrupted_download(etags)) as api, Client(api.address) as client:
        video = client.download("t1", tmp_path)
    assert video.path == tmp_path / "t1.mp4"
    assert (video.path.read_bytes(), video.file_size) == (whole, len(VIDEO))
    assert [request.headers.get("Range") for request in api.requests] == [None, "bytes=400-"]
    assert [path.name for path in tmp_path.iterdir()] == ["t1.mp4"]


def test_a_file_is_replaced_only_if_the_caller_lets_it(tmp_path: Path) -> None:
    output = tmp_path / "boat.mp4"
    output.write_bytes(b"before")
    with scripted_api(in_turn(Answer(200, VIDEO))) as api, Client(api.address) as client:
        with pytest.raises(FileExistsError):
            client.download("t1", output, overwrite=False)
        assert (api.requests, output.read_bytes()) == ([], b"before")
        client.download("t1", str(output))
    assert output.read_bytes() == VIDEO


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    not_ready = refusal(404, "VIDEO_NOT_READY")
    with (
        scripted_api(in_turn(not_ready)) as api,
        Client(api.address) as client,
        pytest.raises(errors.VideoNotReadyError),
    ):
        client.download("t1", tmp_path / "boat.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_gets_the_video_itself(tmp_path: Path) -> None:
    path = tmp_path / "boat.mp4"
    path.write_bytes(VIDEO)
    shown = Video(task_id="t1", path=path, file_size=len(VIDEO))._repr_html_()
    assert shown is not None
    assert base64.b64encode(VIDEO).decode() in shown
    assert Video(task_id="t1", path=path, file_size=10**9)._repr_html_() is None, "too large to be stored in a notebook"


# Both clients


async def test_the_async_client_does_the_same(tmp_path: Path) -> None:
    def answer(request: Request) -> Answer:
        if request.path.endswith("/events"):
            return events(RUNNING, COMPLETED)
        return {"POST": ACCEPTED}.get(request.method, Answer(200, VIDEO))

    with scripted_api(answer) as api:
        async with AsyncClient(api.address) as client:
            task = await client.generate(PROMPT, seed=1)
            assert [status.status async for status in client.stream_events(task)] == ["processing", "completed"]
            status = await client.wait(task)
            video = await client.download(status, tmp_path / "boat.mp4")
    assert video.path.read_bytes() == VIDEO


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    def methods(kind: type) -> dict[str, Any]:
        return {
            name: inspect.signature(function).parameters
            for name, function in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)
    assert set(methods(Operations)) | {"close"} == set(methods(Client))
    assert all(getattr(Client, name).__doc__ for name in methods(Client))


def test_a_blocking_client_works_where_an_event_loop_runs_already() -> None:
    """As in a notebook."""

    async def cell(address: str) -> None:
        with Client(address) as client:
            assert client.wait("t1").status == "completed"

    with scripted_api(in_turn(events(RUNNING, COMPLETED))) as api:
        anyio.run(cell, api.address)


def test_every_error_code_has_its_class() -> None:
    assert set(errors.ERRORS) >= {code.value for code in (*ErrorCode, *ServerErrorCode)}
    for code, kind in errors.ERRORS.items():
        assert kind.code == code
        assert kind.__doc__
        words = "".join(word.capitalize() for word in code.removesuffix("_ERROR").split("_"))
        assert kind.__name__.removeprefix("Task") == f"{words.removeprefix('Task')}Error"


def test_a_code_of_a_newer_server_is_a_plain_refusal() -> None:
    with (
        scripted_api(in_turn(refusal(418, "TEAPOT", "short and stout"))) as api,
        Client(api.address) as client,
        pytest.raises(hunyuan.RefusedError, match=r"short and stout \(TEAPOT\)") as caught,
    ):
        client.status("t1")
    assert type(caught.value) is hunyuan.RefusedError


def test_the_typed_fields_are_those_of_a_request() -> None:
    hints = get_type_hints(RequestFields)
    assert set(hints) == set(JobRequest.model_fields) - {"prompt"}
    assert get_args(hints["resolution"]) == tuple(Resolution)
    assert get_args(hints["aspect_ratio"]) == tuple(AspectRatio)
