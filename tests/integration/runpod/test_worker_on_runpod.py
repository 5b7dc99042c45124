"""The worker as RunPod starts it, without our server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from contract.worker import WorkerExit
from handler.inline import RESULT_LIMIT
from storage.settings import BucketSettings
from tests.support.http_server import serving
from tests.support.mp4 import probe
from tests.support.s3_servers import new_bucket
from tests.support.unprivileged import make_read_only, make_writable, respect_permissions
from tests.support.worker_process import bucket_environment

ROOT = Path(__file__).parents[3]
HUB_TESTS = json.loads((ROOT / ".runpod" / "tests.json").read_text())
HUB_ENVIRONMENT = {variable["key"]: variable["value"] for variable in HUB_TESTS["config"]["env"]}
KEY = "a-key-of-the-platform"
POD = "k2x9w8podid7"
ENDPOINT = "4m7x2k9q"


@pytest.fixture(scope="module")
def bucket(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


def environment(bucket: BucketSettings | None, **more: str) -> dict[str, str]:
    """The environment of a RunPod endpoint with these settings, on a machine without network."""
    keys = {} if bucket is None else bucket_environment(bucket)
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("BUCKET_", "RUNPOD_", "HUNYUAN_", "HF_"))
    }
    return {**clean, **HUB_ENVIRONMENT, **keys, **more}


@dataclass
class RunPod:
    """The endpoints of RunPod's platform that runpod-python 1.12 uses."""

    jobs: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    progress: list[Any] = field(default_factory=list)
    pings: list[str | None] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    results: asyncio.Queue[tuple[str, Any]] = field(default_factory=asyncio.Queue)

    def app(self) -> FastAPI:
        app = FastAPI()
        base = f"/v2/{ENDPOINT}"
        app.add_api_route(f"{base}/job-take/{POD}", self._take, response_model=None)
        app.add_api_route(f"{base}/job-stop/{POD}", self._nothing_for_a_while, response_model=None)
        app.add_api_route(f"{base}/ping/{POD}", self._ping, response_model=None)
        app.add_api_route(f"{base}/job-done/{POD}/{{job_id}}", self._done, methods=["POST"], response_model=None)
        return app

    def environment(self, address: str) -> dict[str, str]:
        base = f"{address}/v2/{ENDPOINT}"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=NVIDIA+GeForce+RTX+4090",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=NVIDIA+GeForce+RTX+4090",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=NVIDIA+GeForce+RTX+4090",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=NVIDIA+GeForce+RTX+4090",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_POD_ID": POD,
            "RUNPOD_AI_API_KEY": KEY,
            "RUNPOD_ENDPOINT_ID": ENDPOINT,
            # RunPod does not set these: the SDK's start-up checks need a name server on the internet, and a GPU.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    async def _take(self, request: Request) -> Response:
        self.keys.add(request.headers.get("authorization"))
        try:
            return JSONResponse(await asyncio.wait_for(self.jobs.get(), 2))
        except TimeoutError:
            return Response(status_code=204)

    async def _nothing_for_a_while(self) -> Response:
        await asyncio.sleep(2)
        return Response(status_code=204)

    async def _ping(self, request: Request) -> Response:
        self.pings.append(request.query_params.get("job_id"))
        return Response()

    async def _done(self, request: Request, job_id: str) -> Response:
        body = json.loads(await request.body())
        if body.get("status") == "IN_PROGRESS":
            self.progress.append(body["output"])
        else:
            await self.results.put((job_id, body))
        return JSONResponse({"ok": True})


@asynccontextmanager
async def worker(log: Path, environment: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """The worker process, started as in the image."""
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", "-m", "handler"), env=environment, stdout=file, stderr=file
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.full
async def test_the_hubs_job_succeeds_with_nothing_but_the_hubs_environment(tmp_path: Path) -> None:
    """No bucket: the result carries the video. SIGTERM then ends the worker."""
    (case,) = HUB_TESTS["tests"]
    job = {"id": "2f5a8c1e-41d0-4c3f-8d0a-6d9c5f1b7a10-u1", "input": case["input"], "webhook": None}
    runpod, log = RunPod(), tmp_path / "worker.log"
    async with (
        serving(runpod.app()) as address,
        worker(log, environment(None, **runpod.environment(address), RUNPOD_INIT_TIMEOUT="1")) as process,
    ):
        await runpod.jobs.put(job)
        job_id, body = await asyncio.wait_for(runpod.results.get(), case["timeout"] / 1000)
        process.terminate()
        code = await asyncio.wait_for(process.wait(), 30)
    text = log.read_text()
    assert code == 0, text
    assert job_id == job["id"]
    output = body["output"]
    assert (output["task_id"], output["model"], output["seed"]) == (job["id"], "demo", case["input"]["seed"])
    assert max(report["progress"] for report in runpod.progress) <= 99
    assert len({report["stage"] for report in runpod.progress}) > 2
    assert job["id"] in runpod.pings
    assert runpod.keys == {KEY}, "the raw key, with no Bearer"

    video = base64.b64decode(output["video_base64"])
    assert hashlib.sha256(video).hexdigest() == output["sha256"]
    assert len(json.dumps(body)) < RESULT_LIMIT
    assert output.keys().isdisjoint({"video_url", "poster_url", "video_key", "poster_key"})
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    assert (probe(path).width, probe(path).height, probe(path).num_frames) == (1280, 720, 121)
    assert KEY not in text
    assert "Traceback" not in text
    first, second = text.splitlines()[:2]
    assert "host memory" in first
    assert "limit of the container" in first
    assert "/runpod-volume" in second
    assert "raise RUNPOD_INIT_TIMEOUT" in text, "the load took longer than half a second"


class Hub(BaseHTTPRequestHandler):
    """A hub that has moved on: it has neither the repository nor its revisions."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A volume of another user with a checkpoint in the layout of RunPod's cached models, in small sizes."""
    from benchmarks import random_model  # late: the other tests here need no PyTorch in this process

    volume = tmp_path_factory.mktemp("volume")
    folder = volume / "hub" / "models--owner--a-checkpoint"
    snapshot = folder / "snapshots" / "0123abcd"
    pipeline = random_model.build_pipeline()
    pipeline.transformer.register_to_config(target_size=64)
    pipeline.save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("4567ef01")  # the hub's main at that time; RunPod has another snapshot
    make_read_only(volume)
    yield volume
    make_writable(volume)


def of_volume(volume: Path, hub: str, path: str) -> dict[str, str]:
    return {"HUNYUAN_MODEL_PATH": path, "HF_HUB_CACHE": str(volume / "hub"), "HF_ENDPOINT": hub}


def run_worker(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-u", "-m", "handler", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        preexec_fn=respect_permissions,
    )


@pytest.mark.full
def test_a_checkpoint_in_a_volume_of_root_renders_after_the_hub_has_moved_on(
    bucket: BucketSettings, volume: Path, hub: str
) -> None:
    job = {"prompt": "A paper boat on a rainy street at night", "duration": 5, "resolution": "720p"}
    small = {"input": {**job, "num_inference_steps": 1, "guidance_scale": 1.0}}
    Hub.asked.clear()
    run = run_worker(
        environment(bucket, **of_volume(volume, hub, "owner/a-checkpoint")), "--test_input", json.dumps(small)
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert Hub.asked == []
    assert f"owner/a-checkpoint: using the complete copy in {volume}" in run.stderr
    url = re.search(r"'video_url': '([^']+)'", run.stdout)
    assert url is not None, run.stdout
    video = httpx.get(url[1])
    assert video.status_code == 200
    assert video.content[4:8] == b"ftyp"
    assert bucket.secret_access_key.get_secret_value() not in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr


@pytest.mark.full
def test_a_checkpoint_that_is_nowhere_ends_the_start_with_a_sentence(volume: Path, hub: str, tmp_path: Path) -> None:
    settings = of_volume(volume, hub, "owner/a-moved-checkpoint")
    run = run_worker(environment(None, **settings, HOME=str(tmp_path)))
    assert run.returncode == WorkerExit.NO_MODEL_OR_BUCKET
    assert f"cannot write to {volume}/hub" in run.stderr
    assert f"downloading to {tmp_path}/.cache/huggingface/hub" in run.stderr
    assert run.stderr.strip().splitlines()[-1].startswith("error: HUNYUAN_MODEL_PATH: owner/a-moved-checkpoint")
    assert Hub.asked != []
    assert "Traceback" not in run.stderr


def test_a_reference_to_a_secret_that_runpod_has_not_replaced_is_named(bucket: BucketSettings) -> None:
    literal = {"BUCKET_SECRET_ACCESS_KEY": "{{ RUNPOD_SECRET_hunyuan_bucket }}", "HF_TOKEN": "x{{RUNPOD_SECRET_hf}}"}
    run = run_worker(environment(bucket, **literal))
    assert run.returncode == WorkerExit.BAD_SETTINGS
    first, second = run.stderr.strip().splitlines()
    assert first.startswith("error: BUCKET_SECRET_ACCESS_KEY: its value is the literal text {{ RUNPOD_SECRET_hunyuan")
    assert second.startswith("HF_TOKEN: its value is the literal text {{RUNPOD_SECRET_hf}}")
    assert "set the value itself" in first


def test_the_file_that_the_hub_looks_for_is_the_worker(bucket: BucketSettings) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / ".runpod" / "handler.py")],
        env=environment(bucket, HUNYUAN_OFFLOAD_CPU="perhaps"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: HUNYUAN_OFFLOAD_CPU")
