"""Our handler as the SDK calls it, and `python -m handler` as its users do."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from contract.worker import Gpu, WorkerExit, WorkerState
from handler.report import Reporter
from handler.serverless import make_handler
from handler.video_model.base import ModelOutOfMemoryError
from handler.worker import Worker
from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.full import full
from tests.support.s3_servers import new_bucket
from tests.support.scripted_model import ScriptedModel
from tests.support.service import eventually

pytestmark = pytest.mark.usefixtures("small_videos")

INPUT = {"prompt": "A paper boat on a rainy street", "duration": 5, "resolution": "720p"}


@pytest.fixture(scope="module")
def settings(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


def handler_of(model: ScriptedModel, settings: BucketSettings) -> Callable[[dict[str, Any]], Any]:
    return make_handler(Worker(model, Bucket(settings), version="1"), send_progress=False)


async def test_it_returns_plain_json_with_presigned_urls(settings: BucketSettings) -> None:
    output = await handler_of(ScriptedModel(), settings)({"id": "job-1", "input": INPUT})
    assert json.loads(json.dumps(output)) == output
    assert output["task_id"] == "job-1"
    async with httpx.AsyncClient() as store:
        assert (await store.get(output["video_url"])).status_code == 200


async def test_a_failure_is_a_short_json_string(settings: BucketSettings) -> None:
    handler = handler_of(ScriptedModel(), settings)
    output = await handler({"id": "job-2", "input": {"prompt": "short"}})
    assert set(output) == {"error"}
    failure = json.loads(output["error"])
    assert failure["error_code"] == "INVALID_PROMPT"
    malformed: Any
    for malformed in (None, [], "text", 3):
        failure = json.loads((await handler({"id": "job-2", "input": malformed}))["error"])
        assert failure["error_code"] == "INVALID_REQUEST"


async def test_out_of_memory_then_a_job_that_works(settings: BucketSettings) -> None:
    def no_memory(_: int) -> None:
        raise ModelOutOfMemoryError("CUDA out of memory")

    model = ScriptedModel(before_step=no_memory)
    handler = handler_of(model, settings)
    assert json.loads((await handler({"id": "job-3", "input": INPUT}))["error"])["error_code"] == "OOM_ERROR"
    model.before_step = lambda _: None
    assert (await handler({"id": "job-3", "input": INPUT}))["status"] == "completed"


async def test_an_exit_in_a_render_ends_the_job_and_not_the_worker(settings: BucketSettings) -> None:
    """The SDK would let SystemExit end the worker without a result."""
    model = ScriptedModel(before_step=lambda _: sys.exit("a library that exits"))
    handler = handler_of(model, settings)
    output = await handler({"id": "job-6", "input": INPUT})
    assert json.loads(output["error"])["error_code"] == "GENERATION_FAILED"
    model.before_step = lambda _: None
    assert (await handler({"id": "job-6", "input": INPUT}))["status"] == "completed"


async def test_a_result_names_the_video_and_carries_no_data(settings: BucketSettings) -> None:
    """RunPod rejects results larger than 10 MB, and values that JSON can't express, such as NaN or bytes."""
    picture = io.BytesIO()
    Image.effect_noise((700, 700), 100).save(picture, "PNG")
    image = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    assert len(image) > 300_000
    output = await handler_of(ScriptedModel(), settings)({"id": "job-7", "input": {**INPUT, "image": image}})
    assert len(json.dumps(output, allow_nan=False)) < 10_000


@pytest.mark.parametrize("times", [full(1), 2])
async def test_a_cancelled_job_has_ended_when_the_next_one_starts(
    settings: BucketSettings, caplog: pytest.LogCaptureFixture, times: int
) -> None:
    """The platform repeats the cancellation of a job that has not ended after some seconds."""
    caplog.set_level("INFO")
    in_step, go_on = threading.Event(), threading.Event()

    def before_step(step: int) -> None:
        in_step.set()
        assert go_on.wait(20)

    model = ScriptedModel(before_step=before_step)
    handler = handler_of(model, settings)
    job = asyncio.ensure_future(handler({"id": "job-4", "input": INPUT}))
    await asyncio.to_thread(in_step.wait)
    for _ in range(times):
        job.cancel()
        done, _ = await asyncio.wait([job], timeout=0.2)
        assert not done, "the render thread is still busy"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert "render cancelled" in caplog.text
    assert Bucket(settings).list_keys("videos/job-4") == []
    assert (await handler({"id": "job-5", "input": INPUT}))["status"] == "completed"


async def test_each_test_job_has_an_id_of_its_own(settings: BucketSettings) -> None:
    handler = handler_of(ScriptedModel(), settings)
    first, second = [await handler({"id": "local_test", "input": INPUT}) for _ in range(2)]
    assert first["task_id"] != second["task_id"]


class Platform(HTTPServer):
    """Records the reports that a worker sends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), PlatformRequest)
        self.reports: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/worker-report/w1"

    def states(self) -> list[str]:
        return [report["state"] for report in self.reports]


class PlatformRequest(BaseHTTPRequestHandler):
    server: Platform

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.keys.add(self.headers["Authorization"])
        self.server.reports.append(json.loads(body))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class WithGpu(ScriptedModel):
    def gpu(self) -> Gpu | None:
        return Gpu(name="H100", memory_total=80, memory_free=70)


def test_the_reporter_reports_each_state_at_once(platform: Platform) -> None:
    with Reporter(platform.url, key="the-key", model="demo") as reporter:
        eventually("the first report", lambda: platform.states() == [WorkerState.LOADING], 3)
        reporter.ready(WithGpu(), {"imports": 1.5})
        eventually("the second report", lambda: platform.states()[-1] == WorkerState.READY, 3)
    assert platform.reports[-1] == {
        "state": "ready",
        "model": "scripted",
        "models": ["HunyuanVideo-1.5"],
        "takes_images": True,
        "limits": [],
        "loras": [],
        "attention": "none",
        "gpu": {"name": "H100", "memory_total": 80, "memory_free": 70},
        "error": None,
        "load_seconds": {"imports": 1.5},
        "estimates": [],
    }
    assert platform.keys == {"the-key"}


def test_a_failed_load_is_reported_before_the_worker_exits(platform: Platform) -> None:
    with Reporter(platform.url, key="", model="x") as reporter:
        reporter.failed("no such checkpoint")
    assert platform.reports[-1]["state"] == "failed"
    assert platform.reports[-1]["error"] == "no such checkpoint"


def test_an_unavailable_platform_does_not_delay_the_worker() -> None:
    started = time.monotonic()
    with Reporter("http://127.0.0.1:9/", key="", model="x") as reporter:
        reporter.ready(ScriptedModel(), {})
    assert time.monotonic() - started < 3


def run_worker(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("BUCKET_", "RUNPOD_", "HUNYUAN_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "handler", *arguments],
        env={**clean, "HUNYUAN_MODEL_PATH": "demo", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HUNYUAN_OFFLOAD_CPU", "perhaps"),
        full("HUNYUAN_ENABLE_FLASH_ATTN", "3"),
        full("BUCKET_ENDPOINT_URL", "not a url"),
        ("BUCKET_ACCESS_KEY_ID", "alone"),
    ],
)
def test_an_invalid_setting_ends_the_start_and_is_named(variable: str, value: str) -> None:
    run = run_worker(**{variable: value})
    assert run.returncode == WorkerExit.BAD_SETTINGS
    assert ("BUCKET_SECRET_ACCESS_KEY" if variable == "BUCKET_ACCESS_KEY_ID" else variable) in run.stderr
    assert "Traceback" not in run.stderr


def bucket_environment(settings: BucketSettings, **change: str) -> dict[str, str]:
    return {
        "BUCKET_ENDPOINT_URL": str(settings.endpoint_url),
        "BUCKET_ACCESS_KEY_ID": settings.access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": settings.secret_access_key.get_secret_value(),
        "BUCKET_NAME": settings.name,
        **change,
    }


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        full("BUCKET_ACCESS_KEY_ID", "nobody"),
        ("BUCKET_SECRET_ACCESS_KEY", "wrong-and-secret"),
        full("BUCKET_NAME", "no-such-bucket"),
    ],
)
def test_a_bucket_that_denies_access_ends_the_start_and_is_reported(
    platform: Platform, settings: BucketSettings, variable: str, value: str
) -> None:
    environment = bucket_environment(settings, **{variable: value})
    run = run_worker(HUNYUAN_WORKER_REPORT_URL=platform.url, **environment)
    assert run.returncode == WorkerExit.NO_MODEL_OR_BUCKET, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: bucket")
    assert variable in last
    assert "wrong-and-secret" not in run.stderr
    assert platform.reports[-1]["state"] == "failed"
    assert variable in platform.reports[-1]["error"]


@pytest.mark.full
def test_an_unavailable_bucket_does_not_end_the_start(settings: BucketSettings) -> None:
    environment = bucket_environment(settings, BUCKET_ENDPOINT_URL="http://127.0.0.1:9", HUNYUAN_STORE_PATIENCE="0")
    run = run_worker("--test_input", json.dumps({"input": {**INPUT, "num_inference_steps": 1}}), **environment)
    assert run.returncode == WorkerExit.TEST_JOB_FAILED, run.stdout + run.stderr
    assert "the bucket is unavailable; loading the model meanwhile" in run.stderr
    assert "STORAGE_UNAVAILABLE" in run.stdout + run.stderr


@pytest.mark.full
def test_a_model_that_can_not_be_loaded_is_named_and_reported(platform: Platform, tmp_path: Path) -> None:
    directory = str(tmp_path)
    run = run_worker(HUNYUAN_MODEL_PATH=directory, HUNYUAN_WORK_DIR=directory, HUNYUAN_WORKER_REPORT_URL=platform.url)
    assert run.returncode == WorkerExit.NO_MODEL_OR_BUCKET
    assert run.stderr.strip().splitlines()[-1].startswith("error: HUNYUAN_MODEL_PATH")
    assert platform.states()[-1] == "failed"
    assert "HUNYUAN_MODEL_PATH" in platform.reports[-1]["error"]
