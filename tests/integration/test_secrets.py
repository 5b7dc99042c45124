"""A whole server with keys: the documented clients work with a key, and no log contains a secret or a prompt."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import requests

from tests.support.service import Service, eventually, running_service

pytestmark = pytest.mark.timeout(600)

KEY = f"api-key-{secrets.token_hex(8)}"
WRONG_KEY = f"wrong-key-{secrets.token_hex(8)}"
TOKEN = f"platform-token-{secrets.token_hex(8)}"
S3_SECRET = f"s3-secret-{secrets.token_hex(8)}"
S3_ID = f"s3-id-{secrets.token_hex(8)}"
WORD = secrets.token_hex(8)
PROMPT = f"A paper boat named {WORD} on a rainy street"
IMAGE = f"https://user:{S3_SECRET}@images.example/{WORD}.png"


def drive(service: Service) -> list[str]:
    """Send valid and invalid requests of every kind; the ids of the tasks."""
    http = httpx.Client(base_url=service.address, timeout=30)
    good = {"prompt": PROMPT, "duration": 5, "resolution": "720p", "num_inference_steps": 1}
    with_key = {"Authorization": f"Bearer {KEY}"}
    task_ids = [http.post("/generate", json=good, headers=with_key).json()["task_id"]]
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


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {"HUNYUAN_API_KEYS": f"alice:{KEY}", "HUNYUAN_PLATFORM_TOKEN": TOKEN}
    with running_service(tmp_path_factory.mktemp("service"), **settings) as made:
        made.http.headers["X-API-Key"] = KEY
        yield made


@pytest.fixture(scope="module")
def task_ids(service: Service) -> list[str]:
    """The tasks of `drive`. The first one is completed."""
    driven = drive(service)
    assert service.finished(driven[0])["status"] == "completed"
    return driven


def test_no_log_contains_a_key_a_token_a_signature_or_a_prompt(service: Service, task_ids: list[str]) -> None:
    assert service.http.get(f"/videos/{task_ids[0]}.mp4").status_code == 200
    # The worker retries the upload to an unavailable bucket for minutes, so cancel that task.
    service.http.delete(f"/tasks/{task_ids[1]}")
    for task_id in task_ids[2:]:
        assert service.finished(task_id)["status"] == "failed"
    eventually("a line for the last job", lambda: task_ids[-1] in service.log.read_text())
    accepted = [line for line in service.log.read_text().splitlines() if "accepted from alice" in line]
    assert f"task_id={task_ids[0]}" in accepted[0]
    logs = [path for path in service.directory.rglob("*") if path.suffix == ".log"]
    assert service.log in logs
    for path in logs:
        text = path.read_text(errors="replace")
        for secret in (KEY, WRONG_KEY, TOKEN, S3_SECRET, S3_ID, WORD, "X-Amz-Signature"):
            assert secret not in text, f"{path.name} contains {secret}"


def test_the_documented_clients_work_with_a_key(service: Service, task_ids: list[str], tmp_path: Path) -> None:
    """As in the README: curl with a header, requests with a session's header. The video is that of an earlier task."""
    session = requests.Session()
    session.headers["X-API-Key"] = KEY
    answer = session.post(f"{service.address}/generate", json={"prompt": PROMPT, "duration": 5, "resolution": "720p"})
    assert answer.status_code == 202
    service.http.delete(f"/tasks/{answer.json()['task_id']}").raise_for_status()
    video_url = service.status(task_ids[0])["video_url"]
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
