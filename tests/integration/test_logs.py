"""The log of a whole service: one search finds all lines of a task, and no line contains a prompt or a secret."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.service import Service, eventually, running_service

pytestmark = pytest.mark.timeout(600)

PROMPT = "A paper boat on a rainy street at midnight"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(
        tmp_path_factory.mktemp("service"), HUNYUAN_LOG_FORMAT="json", HUNYUAN_LOG_LEVEL="debug"
    ) as running:
        yield running


def lines(service: Service) -> list[dict[str, Any]]:
    """Every log line of the server and its worker. Fails if a line is not a JSON object."""
    parsed = [json.loads(line) for line in service.log.read_text().splitlines()]
    assert all(isinstance(line, dict) for line in parsed)
    return parsed


def lines_of_task(service: Service, task_id: str) -> list[dict[str, Any]]:
    return [line for line in lines(service) if line.get("task_id") == task_id]


def lines_with(service: Service, task_id: str, words: str) -> list[dict[str, Any]]:
    """The task's lines that contain these words. Waits until there is one."""
    return eventually(
        f"a line with {words!r}", lambda: [line for line in lines_of_task(service, task_id) if words in line["message"]]
    )


def request_lines(service: Service, *request_ids: str) -> list[dict[str, Any]]:
    """The lines about these requests. Waits for one of each: it is written after the response."""

    def found() -> list[dict[str, Any]] | None:
        about = [line for line in lines(service) if "route" in line and line.get("request_id") in request_ids]
        return about if {line["request_id"] for line in about} == set(request_ids) else None

    return eventually(f"lines of the requests {request_ids}", found)


def platform(service: Service) -> httpx.Client:
    token = (service.directory / "data" / "platform-token").read_text()
    return httpx.Client(base_url=f"{service.address}/v2/local", headers={"Authorization": token})


@pytest.fixture(scope="module")
def finished_task(service: Service) -> str:
    """The id of a task that is completed and whose video was downloaded."""
    task_id = service.generate(prompt=PROMPT, num_inference_steps=1)
    service.http.get(service.finished(task_id)["video_url"]).raise_for_status()
    lines_with(service, task_id, "Finished.")
    return task_id


def test_one_search_finds_every_step_of_a_task(service: Service, finished_task: str) -> None:
    found = lines_of_task(service, finished_task)
    steps = (
        ("shim.tasks", "accepted"),
        ("shim.queue.dispatch", "taken by worker"),
        ("runpod", "Started."),
        ("handler.worker", "begins"),
        ("handler.meter", "encoding_prompt took"),
        ("handler.meter", "denoising took"),
        ("handler.meter", "next is storing"),
        ("handler.worker", "done in"),
        ("shim.queue.dispatch", "completed by worker"),
    )
    places = [
        next(i for i, line in enumerate(found) if line["logger"] == logger and words in line["message"])
        for logger, words in steps
    ]
    assert places == sorted(places), found
    (worker_id,) = {line["worker_id"] for line in found if line["logger"].startswith(("handler.", "runpod"))}
    assert lines_with(service, finished_task, "taken by")[0]["worker_id"] == worker_id


def test_every_line_about_a_task_has_its_id(service: Service, finished_task: str) -> None:
    about = [line for line in lines(service) if finished_task in json.dumps(line)]
    assert len(about) > 10
    assert [line for line in about if line.get("task_id") != finished_task] == []
    assert {line["level"] for line in about if line["logger"] != "shim.http.access_log"} == {"INFO"}  # polls are DEBUG


def test_server_and_worker_both_log_a_failed_task_with_its_error_code(service: Service) -> None:
    with platform(service) as http:
        task_id = http.post("/run", json={"input": {"prompt": "short"}}).json()["id"]
    loggers = {line["logger"] for line in lines_with(service, task_id, "failed with INVALID_PROMPT")}
    eventually(
        "a line of both", lambda: len({line["logger"] for line in lines_with(service, task_id, "failed with")}) == 2
    )
    assert loggers <= {"handler.serverless", "shim.queue.dispatch"}


def test_server_and_worker_both_log_a_cancelled_task(service: Service) -> None:
    task_id = service.generate(prompt=PROMPT, duration=10, resolution="1080p")
    eventually("the render's start", lambda: service.status(task_id)["progress"] > 0, 60)
    with platform(service) as http:
        http.post(f"/cancel/{task_id}").raise_for_status()
    assert {line["logger"] for line in lines_with(service, task_id, "cancelled")} >= {"shim.queue.sql"}
    eventually(
        "a line of the worker",
        lambda: "handler.serverless" in {line["logger"] for line in lines_with(service, task_id, "cancelled")},
        90,
    )


def test_requests_are_logged_by_route_with_their_id_and_no_query(service: Service) -> None:
    service.http.get("/status/no-such-task?secret=hush", headers={"X-Request-ID": "status"})
    service.http.get("/nowhere/at/all?secret=hush", headers={"X-Request-ID": "nowhere"})
    found = request_lines(service, "status", "nowhere")
    assert [(line["route"], line["method"], line["status"]) for line in found] == [
        ("/status/{task_id}", "GET", 404),
        ("other", "GET", 404),
    ]
    assert found[0]["task_id"] == "no-such-task"
    assert found[0]["duration_ms"] >= 0
    assert "hush" not in service.log.read_text()


def test_a_pipelined_request_inherits_nothing_from_the_one_before_it(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        for path, request_id in (("/status/no-such-task", "first"), ("/nowhere", "second"), ("/ready", "last")):
            close = "Connection: close\r\n" if request_id == "last" else ""
            connection.sendall(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: {request_id}\r\n{close}\r\n".encode()
            )
        while connection.recv(65536):
            pass
    by_id = {line["request_id"]: line for line in request_lines(service, "first", "second")}
    assert by_id["first"]["task_id"] == "no-such-task"
    assert "task_id" not in by_id["second"]


def test_requests_of_programs_are_logged_at_debug_and_those_of_people_at_info(service: Service) -> None:
    service.http.get("/health", headers={"X-Request-ID": "of-a-program"})
    service.http.get("/status/no-such-task", headers={"X-Request-ID": "of-a-person"})
    levels = {line["route"]: line["level"] for line in request_lines(service, "of-a-program", "of-a-person")}
    assert levels == {"/health": "DEBUG", "/status/{task_id}": "INFO"}
    reports = [line for line in lines(service) if line.get("route") == "/v2/local/worker-report/{worker_id}"]
    assert {line["level"] for line in reports} == {"DEBUG"}


def test_neither_prompts_nor_secrets_are_in_the_log(service: Service, finished_task: str) -> None:
    log = service.log.read_text()
    assert "midnight" not in log
    data = service.directory / "data"
    for secret in ("platform-token", "bucket/secret-key"):
        assert (data / secret).read_text().strip() not in log
    assert "X-Amz-Signature" not in log, "a presigned URL gives access to its object"


@pytest.mark.full
def test_prompts_are_in_the_log_if_the_setting_asks_for_them(tmp_path: Path) -> None:
    with running_service(tmp_path, HUNYUAN_LOG_PROMPTS="true") as service:
        task_id = service.generate(prompt=f"{PROMPT}\nand a second line")
        service.finished(task_id)
        shown = [line for line in service.log.read_text().splitlines() if "midnight" in line]
    assert len(shown) == 2, "one when the server accepts the task, one when the render begins"
    for line in shown:
        assert task_id in line
        assert r'prompt="A paper boat on a rainy street at midnight\nand a second line"' in line
