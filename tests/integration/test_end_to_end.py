"""The whole service as its users start it: server, SDK worker, S3 gateway, ffmpeg. Only the weights are not real."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from PIL import Image

from contract.result import MAX_PREVIEW_BYTES
from tests.support.mp4 import picture, probe, shows_caption
from tests.support.service import RENDER_SECONDS, Service, eventually, running_service

pytestmark = pytest.mark.timeout(600)

#: A request whose video is rendered in the shortest time.
QUICK = {"duration": 5, "resolution": "720p", "num_inference_steps": 1}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One server for every test here; the last one kills and stops it, and starts it again."""
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="module")
def previews() -> dict[str, httpx.Response]:
    """The answers at each `preview_url` that `statuses` has seen."""
    return {}


@pytest.fixture(scope="module")
def statuses(service: Service, previews: dict[str, httpx.Response]) -> list[dict[str, Any]]:
    """Every status of a task, from its start to its completion."""
    task_id = service.generate(duration=5, resolution="720p")
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
        assert shows_caption(picture(path, frame), "demo model: A paper boat on a rainy street")
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
    token = (service.directory / "data" / "platform-token").read_text()
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
        [sys.executable, "-c", script, token], capture_output=True, text=True, timeout=RENDER_SECONDS, check=False
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
    token = (service.directory / "data" / "platform-token").read_text()
    headers = {"Authorization": f"Bearer {token}"}
    task_id = service.http.post("/v2/local/run", headers=headers, json={"input": {"prompt": "short"}}).json()["id"]
    failed = service.finished(task_id)
    assert failed["status"] == "failed"
    assert failed["error_code"] == "INVALID_PROMPT"
    assert "10-500" in failed["error"]


def test_a_server_in_front_of_a_runpod_endpoint_has_no_queue_and_no_worker_of_its_own(
    service: Service, tmp_path: Path
) -> None:
    """As in front of RunPod's cloud; here the endpoint is the other server's, which has the same API."""
    kept = service.directory / "data"
    environment = {
        "RUNPOD_ENDPOINT_ID": "local",
        "RUNPOD_API_KEY": (kept / "platform-token").read_text(),
        "RUNPOD_ENDPOINT_BASE_URL": f"{service.address}/v2",
        "BUCKET_ENDPOINT_URL": f"http://127.0.0.1:{(kept / 'bucket' / 'port').read_text()}",
        "BUCKET_ACCESS_KEY_ID": (kept / "bucket" / "access-key").read_text(),
        "BUCKET_SECRET_ACCESS_KEY": (kept / "bucket" / "secret-key").read_text(),
    }
    with running_service(tmp_path, **environment) as front:
        assert front.descendants() == []
        assert front.http.get("/health").json()["model_loaded"] is True
        task_id = front.generate(**QUICK)
        completed = front.finished(task_id)
        assert completed["video_url"] == f"{front.address}/videos/{task_id}.mp4"
        assert len(front.http.get(completed["video_url"]).content) == completed["file_size"]
        assert service.status(task_id)["status"] == "completed", "the endpoint knows the same job"
        assert front.http.get("/status/no-such-task").status_code == 404
    with running_service(tmp_path, **environment) as front:
        assert front.status(task_id)["status"] == "completed", "the server keeps no state, and nothing is missing"


def test_hunyuan_generate_saves_a_video(service: Service, tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "hunyuan",
                "generate",
                "A paper boat on a rainy street",
                "--server",
                service.address,
            ),
            *("--duration", "5", "--resolution", "720p", "--output", str(tmp_path / "boat.mp4"), "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=RENDER_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["file_size"] == (tmp_path / "boat.mp4").stat().st_size
    assert "denoising" in run.stderr, "a progress bar with the stage"
    assert probe(tmp_path / "boat.mp4").num_frames == 121


def test_a_cancelled_job_stops_and_the_next_one_runs(service: Service) -> None:
    token = (service.directory / "data" / "platform-token").read_text()
    headers = {"Authorization": f"Bearer {token}"}
    task_id = service.generate(duration=10, resolution="1080p")
    eventually("the render's start", lambda: service.status(task_id)["progress"] > 0, RENDER_SECONDS)
    worker = service.worker()
    service.http.post(f"/v2/local/cancel/{task_id}", headers=headers).raise_for_status()
    status = service.status(task_id)
    assert (status["status"], status["error_code"]) == ("failed", "CANCELLED")
    following = service.generate(**QUICK)
    assert service.finished(following)["status"] == "completed"
    assert service.worker().pid == worker.pid, "the same process continues"
    assert service.http.get(f"/videos/{task_id}.mp4").status_code == 404


def test_a_worker_killed_during_a_render_loses_no_task(service: Service) -> None:
    task_id = service.generate(**QUICK)
    eventually("the render's start", lambda: service.status(task_id)["progress"] > 0, RENDER_SECONDS)
    victim = service.worker()
    family = [victim, *victim.children(recursive=True)]
    victim.kill()
    assert service.finished(task_id)["status"] == "completed"
    assert service.worker().pid != victim.pid
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, "the dead worker left no process behind"
    assert gone


def test_a_killed_bucket_is_restarted_and_loses_no_task(service: Service) -> None:
    task_id = service.generate(**QUICK)
    eventually("the render's start", lambda: service.status(task_id)["progress"] > 0, RENDER_SECONDS)
    (gateway,) = [process for process in service.descendants() if "juicefs" in process.name()]
    gateway.kill()
    completed = service.finished(task_id)
    assert completed["status"] == "completed"
    assert len(service.http.get(completed["video_url"]).content) == completed["file_size"]


def test_a_killed_server_and_a_stopped_one_lose_no_task_and_leave_no_orphan(
    service: Service, statuses: list[dict[str, Any]]
) -> None:
    completed = statuses[-1]
    running, waiting = [service.generate(**{**QUICK, "num_inference_steps": 4}) for _ in range(2)]
    eventually("the render's start", lambda: service.status(running)["progress"] > 0, RENDER_SECONDS)
    children = service.descendants()
    service.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "the server's children died with it"

    service.start()
    assert service.status(completed["task_id"]) == completed
    assert service.http.get(completed["video_url"]).status_code == 200
    assert service.finished(running)["status"] == "completed"

    eventually("the next render's start", lambda: service.status(waiting)["progress"] > 0, RENDER_SECONDS)
    children = service.descendants()
    started = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started < 20
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    service.start(until_ready=False)
    assert service.status(waiting)["status"] == "processing", "the render was not finished"
    assert service.finished(waiting)["status"] == "completed"
