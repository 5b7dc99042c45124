"""The whole service while its parts are killed, stopped and put in front of each other, with the demo model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.mp4 import probe
from tests.support.service import QUICK, RENDER_SECONDS, Service, eventually, running_service

pytestmark = [pytest.mark.timeout(600), pytest.mark.full]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One server for every test here; the last one kills and stops it, and starts it again."""
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


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
    service: Service,
) -> None:
    completed = service.finished(service.generate(**QUICK))
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
