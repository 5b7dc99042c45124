"""The worker as RunPod starts it, without our server, with the jobs of .runpod/tests.json."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.http_server import serving
from tests.support.mp4 import probe
from tests.support.s3_servers import juicefs

ROOT = Path(__file__).parents[3]
HUB_TESTS = json.loads((ROOT / ".runpod" / "tests.json").read_text())
HUB_ENVIRONMENT = {variable["key"]: variable["value"] for variable in HUB_TESTS["config"]["env"]}
RENDER_SECONDS = 180.0
KEY = "a-key-of-the-platform"
POD = "k2x9w8podid7"
ENDPOINT = "4m7x2k9q"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketSettings]:
    with juicefs(tmp_path_factory.mktemp("juicefs")) as made:
        yield made


def environment(bucket: BucketSettings, **more: str) -> dict[str, str]:
    """The environment of a RunPod endpoint with these settings, on a machine without network."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("BUCKET_", "RUNPOD_", "HUNYUAN_"))
    }
    return {
        **clean,
        **HUB_ENVIRONMENT,
        "BUCKET_ENDPOINT_URL": str(bucket.endpoint_url),
        "BUCKET_ACCESS_KEY_ID": bucket.access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": bucket.secret_access_key.get_secret_value(),
        "BUCKET_NAME": bucket.name,
        **more,
    }


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


async def test_a_job_from_runpods_platform_is_rendered_into_the_bucket(bucket: BucketSettings, tmp_path: Path) -> None:
    (case,) = HUB_TESTS["tests"]
    job = {"id": "2f5a8c1e-41d0-4c3f-8d0a-6d9c5f1b7a10-u1", "input": case["input"], "webhook": None}
    runpod, log = RunPod(), tmp_path / "worker.log"
    async with (
        serving(runpod.app()) as address,
        worker(log, environment(bucket, **runpod.environment(address))) as process,
    ):
        await runpod.jobs.put(job)
        job_id, body = await asyncio.wait_for(runpod.results.get(), RENDER_SECONDS)
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

    async with httpx.AsyncClient() as store:
        video = (await store.get(output["video_url"])).content
    assert hashlib.sha256(video).hexdigest() == output["sha256"]
    assert Bucket(bucket).get_bytes(output["video_key"]) == video
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    assert (probe(path).width, probe(path).height, probe(path).num_frames) == (1280, 720, 121)
    for secret in (KEY, bucket.secret_access_key.get_secret_value()):
        assert secret not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("case", HUB_TESTS["tests"], ids=lambda case: case["name"])
def test_each_job_of_the_hubs_tests_renders_within_its_timeout(bucket: BucketSettings, case: dict[str, Any]) -> None:
    run = subprocess.run(
        [sys.executable, "-u", "-m", "handler", "--test_input", json.dumps({"input": case["input"]})],
        env=environment(bucket),
        capture_output=True,
        text=True,
        timeout=case["timeout"] / 1000,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    url = re.search(r"'video_url': '([^']+)'", run.stdout)
    assert url is not None, run.stdout
    video = httpx.get(url[1])
    assert video.status_code == 200
    assert video.content[4:8] == b"ftyp"
    assert bucket.secret_access_key.get_secret_value() not in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr


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
