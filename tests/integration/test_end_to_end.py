"""The whole service as its users start it: server, SDK worker, S3 gateway, ffmpeg. Only the weights are not real."""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import requests
from PIL import Image

from contract.result import MAX_PREVIEW_BYTES
from tests.support.mp4 import picture, probe, shows_caption
from tests.support.service import QUICK, RENDER_SECONDS, Service, eventually, running_service

pytestmark = pytest.mark.timeout(600)

KEY = f"api-key-{secrets.token_hex(8)}"
WRONG_KEY = f"wrong-key-{secrets.token_hex(8)}"
TOKEN = f"platform-token-{secrets.token_hex(8)}"
S3_SECRET = f"s3-secret-{secrets.token_hex(8)}"
S3_ID = f"s3-id-{secrets.token_hex(8)}"
WORD = secrets.token_hex(8)
PROMPT = f"A paper boat named {WORD} on a rainy street"
IMAGE = f"https://user:{S3_SECRET}@images.example/{WORD}.png"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One server for every test here."""
    settings = {"HUNYUAN_API_KEYS": f"alice:{KEY}", "HUNYUAN_PLATFORM_TOKEN": TOKEN}
    log = {"HUNYUAN_LOG_FORMAT": "json", "HUNYUAN_LOG_LEVEL": "debug"}
    with running_service(tmp_path_factory.mktemp("service"), **settings, **log) as running:
        running.http.headers["X-API-Key"] = KEY
        yield running


@pytest.fixture(scope="module")
def previews() -> dict[str, httpx.Response]:
    """The answers at each `preview_url` that `statuses` has seen."""
    return {}


@pytest.fixture(scope="module")
def statuses(service: Service, previews: dict[str, httpx.Response]) -> list[dict[str, Any]]:
    """Every status of a task, from its start to its completion."""
    task_id = service.generate(prompt=PROMPT)
    seen: list[dict[str, Any]] = []

    def look() -> bool:
        seen.append(service.status(task_id))
        url = seen[-1].get("preview_url")
        if url is not None and url not in previews:
            previews[url] = service.http.get(url)
        return str(seen[-1]["status"]) != "processing"

    eventually("completion", look, RENDER_SECONDS)
    return seen


def test_health_names_the_model_and_the_documented_fields(service: Service) -> None:
    health = service.http.get("/health").json()
    assert health["status"] == "healthy"
    assert health["model_loaded"] is True
    assert health["version"] == "1.5.0"
    assert health["model"] == "demo"
    if not health["gpu_available"]:
        assert health["vram_free"] == "0.0 GB"


def test_a_prompt_becomes_a_video(service: Service, statuses: list[dict[str, Any]], tmp_path: Path) -> None:
    *seen, completed = statuses
    task_id = completed["task_id"]
    documented = {
        "task_id": task_id,
        "status": "completed",
        "video_url": f"{service.address}/videos/{task_id}.mp4",
        "duration": 5,
        "resolution": "720p",
        "file_size": completed["file_size"],
    }
    assert {name: completed[name] for name in documented} == documented
    assert service.http.get(completed["poster_url"]).content.startswith(b"\xff\xd8"), "a JPEG"
    progress = [status["progress"] for status in seen]
    assert progress == sorted(progress)
    assert max(progress) <= 99
    assert len(set(progress)) > 2, "progress moved"
    elapsed = [status["elapsed_time"] for status in seen]
    assert elapsed == sorted(elapsed)

    response = service.http.get(completed["video_url"])
    assert response.headers["content-type"] == "video/mp4"
    assert len(response.content) == completed["file_size"]
    path = tmp_path / "video.mp4"
    path.write_bytes(response.content)
    video = probe(path)
    assert (video.codec, video.pixel_format) == ("h264", "yuv420p")
    assert (video.width, video.height, video.fps, video.num_frames) == (1280, 720, 24.0, 121)
    assert "bt709" in video.color
    for frame in (0, 60, 120):
        assert shows_caption(picture(path, frame), f"demo model: {PROMPT}")
    assert video.is_faststart
    assert response.headers["etag"] == f'"{hashlib.sha256(response.content).hexdigest()}"'


def test_its_picture_is_seen_forming_before_it_is_complete(
    service: Service, statuses: list[dict[str, Any]], previews: dict[str, httpx.Response]
) -> None:
    *_, completed = statuses
    poster = picture_of(service.http.get(completed["poster_url"]).content)
    shown = [answer for answer in previews.values() if answer.status_code == 200]  # one may be too late
    assert shown
    assert all(len(answer.content) <= MAX_PREVIEW_BYTES for answer in shown)
    last = picture_of(shown[-1].content)
    assert np.abs(last - poster).mean() < 40
    gone = service.http.get(f"/tasks/{completed['task_id']}/preview.jpg")
    assert (gone.status_code, gone.json()["error_code"]) == (404, "NO_PREVIEW")


def picture_of(jpeg: bytes) -> npt.NDArray[np.float64]:
    """The JPEG at a size that shows no detail."""
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB").resize((32, 18), Image.Resampling.BOX), dtype=float)


def test_runpods_own_client_drives_a_job(service: Service) -> None:
    """`runpod.Endpoint(...).run()` against our /v2, in a separate process because the SDK has global state."""
    script = f"""
import json, sys, time, runpod
runpod.endpoint_url_base = "{service.address}/v2"
job = runpod.Endpoint("local", api_key=sys.argv[1]).run(
    {{"prompt": "A paper boat on a rainy street", **{QUICK}}}
)
states = []
while not states or states[-1] in ("IN_QUEUE", "IN_PROGRESS"):
    states.append(job.status())
    time.sleep(0.2)
print(json.dumps({{"id": job.job_id, "states": states, "output": job.output()}}))
"""
    run = subprocess.run(
        [sys.executable, "-c", script, TOKEN], capture_output=True, text=True, timeout=RENDER_SECONDS, check=False
    )
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["states"][-1] == "COMPLETED"
    output = answer["output"]
    assert output["task_id"] == answer["id"]
    assert output["model"] == "demo"
    video = service.http.get(output["video_url"]).content
    assert hashlib.sha256(video).hexdigest() == output["sha256"]
    assert service.http.get(output["poster_url"]).content[:2] == b"\xff\xd8"
    assert service.status(answer["id"])["status"] == "completed", "REST knows the same job"


def test_the_platform_refuses_requests_without_its_key(service: Service) -> None:
    for key in ("", "Bearer wrong", "wrong"):
        headers = {"Authorization": key} if key else {}
        assert service.http.get("/v2/local/health", headers=headers).status_code == 401
        assert service.http.get("/v2/local/job-take/w?a=b", headers=headers).status_code == 401


def test_an_invalid_job_submitted_under_v2_fails_with_the_documented_code(service: Service) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    task_id = service.http.post("/v2/local/run", headers=headers, json={"input": {"prompt": "short"}}).json()["id"]
    failed = service.finished(task_id)
    assert failed["status"] == "failed"
    assert failed["error_code"] == "INVALID_PROMPT"
    assert "10-500" in failed["error"]


# The log: one search finds all lines of a task, and no line contains a prompt or a secret


def drive(service: Service) -> list[str]:
    """Sends valid and invalid requests of every kind; the ids of the tasks."""
    http = httpx.Client(base_url=service.address, timeout=30)
    good = {"prompt": PROMPT, "duration": 5, "resolution": "720p", "num_inference_steps": 1}
    with_key = {"Authorization": f"Bearer {KEY}"}
    task_ids = []
    for body in (
        {"prompt": WORD[:9]},
        {**good, WORD: 1},
        {**good, "image": IMAGE},
        {**good, "negative_prompt": [WORD]},
    ):
        assert http.post("/generate", json=body, headers=with_key).status_code == 400
    assert http.post("/generate", content=f"{{{WORD}".encode(), headers=with_key).status_code == 400
    for headers in ({"Authorization": f"Bearer {WRONG_KEY}"}, {"X-API-Key": WRONG_KEY}, {"Authorization": WRONG_KEY}):
        assert http.post("/generate", json=good, headers=headers).status_code == 401
        assert http.post("/v2/local/run", json={"input": good}, headers=headers).status_code == 401
    assert http.get(f"/status/none?key={KEY}&prompt={WORD}", headers=with_key).status_code == 404
    s3_config = {
        "endpointUrl": "http://127.0.0.1:9",
        "bucketName": "films",
        "accessId": S3_ID,
        "accessSecret": S3_SECRET,
    }
    for extras in (
        {"s3Config": s3_config},
        {"s3Config": {**s3_config, "endpointUrl": S3_SECRET}},
        {"s3Config": S3_SECRET},
    ):
        answer = http.post("/v2/local/run", json={"input": good, **extras}, headers={"Authorization": TOKEN})
        task_ids.append(answer.json()["id"])
    bad = {"input": {"prompt": WORD, "image": IMAGE}, "s3Config": s3_config}
    task_ids.append(http.post("/v2/local/run", json=bad, headers={"Authorization": TOKEN}).json()["id"])
    http.close()
    return task_ids


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
    return httpx.Client(base_url=f"{service.address}/v2/local", headers={"Authorization": TOKEN})


@pytest.fixture(scope="module")
def finished_task(service: Service, statuses: list[dict[str, Any]]) -> str:
    """The id of a task that is completed and whose video was downloaded."""
    completed = statuses[-1]
    service.http.get(completed["video_url"]).raise_for_status()
    task_id: str = completed["task_id"]
    lines_with(service, task_id, "Finished.")
    return task_id


@pytest.fixture(scope="module")
def refused_tasks(service: Service) -> list[str]:
    """The ended tasks of `drive`."""
    driven = drive(service)
    # The worker retries the upload to an unavailable bucket for minutes, so cancel that task.
    service.http.delete(f"/tasks/{driven[0]}")
    for task_id in driven[1:]:
        assert service.finished(task_id)["status"] == "failed"
    eventually("a line for the last job", lambda: driven[-1] in service.log.read_text())
    return driven


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
    # RunPod's SDK sends the id of its last job as X-Request-ID of its next requests.
    about = [line for line in lines(service) if finished_task in json.dumps({**line, "request_id": None})]
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
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\n"
                f"X-Request-ID: {request_id}\r\n{close}\r\n".encode()
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


@pytest.mark.usefixtures("refused_tasks")
def test_no_log_contains_a_key_a_token_a_signature_or_a_prompt(service: Service, finished_task: str) -> None:
    assert len(lines_with(service, finished_task, "accepted from alice")) == 1
    made = (service.directory / "data" / "bucket" / "secret-key").read_text().strip()
    logs = [path for path in service.directory.rglob("*") if path.suffix == ".log"]
    assert service.log in logs
    for path in logs:
        text = path.read_text(errors="replace")
        # A presigned URL gives access to its object.
        for secret in (KEY, WRONG_KEY, TOKEN, S3_SECRET, S3_ID, made, WORD, "X-Amz-Signature"):
            assert secret not in text, f"{path.name} contains {secret}"


def test_the_documented_clients_work_with_a_key(service: Service, finished_task: str, tmp_path: Path) -> None:
    """As in the README: curl with a header, requests with a session's header. The video is that of an earlier task."""
    session = requests.Session()
    session.headers["X-API-Key"] = KEY
    answer = session.post(f"{service.address}/generate", json={"prompt": PROMPT, "duration": 5, "resolution": "720p"})
    assert answer.status_code == 202
    service.http.delete(f"/tasks/{answer.json()['task_id']}").raise_for_status()
    video_url = service.status(finished_task)["video_url"]
    by_requests = session.get(video_url)
    assert by_requests.status_code == 200
    assert requests.get(video_url, timeout=30).status_code == 401
    path = tmp_path / "video.mp4"
    bearer = f"Authorization: Bearer {KEY}"
    subprocess.run(["curl", "-sSf", "-H", bearer, "-o", str(path), video_url], check=True, timeout=60)
    assert path.read_bytes() == by_requests.content
    refused = subprocess.run(["curl", "-sf", "-o", str(path), video_url], check=False, timeout=60)
    assert refused.returncode == 22
    session.close()


@pytest.mark.full
def test_prompts_are_in_the_log_if_the_setting_asks_for_them(tmp_path: Path) -> None:
    with running_service(tmp_path, HUNYUAN_LOG_PROMPTS="true") as service:
        task_id = service.generate(prompt=f"{PROMPT}\nand a second line")
        service.finished(task_id)
        shown = [line for line in service.log.read_text().splitlines() if WORD in line]
        token = (service.directory / "data" / "platform-token").read_text().strip()
        assert token not in service.log.read_text()
    assert len(shown) == 2, "one when the server accepts the task, one when the render begins"
    for line in shown:
        assert task_id in line
        assert rf'prompt="A paper boat named {WORD} on a rainy street\nand a second line"' in line
