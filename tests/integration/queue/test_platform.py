"""RunPod's protocol over the SQL queue, with the requests of the SDK and its client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from contract.result import Stage
from contract.worker import WorkerReport, WorkerState
from storage.settings import BucketSettings
from tests.support.postgres import Postgres
from tests.support.queues import JOB, TOKEN, Bench, empty, platform_bench, result
from tests.support.s3_servers import new_bucket

INPUT = JOB.wire()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared_database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('queue')}/queue.sqlite3"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_database()


@pytest.fixture(scope="module")
def bucket(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@pytest.fixture(scope="module")
async def shared(shared_database_url: str, bucket: BucketSettings) -> AsyncIterator[Bench]:
    async with platform_bench(shared_database_url, bucket=bucket) as made:
        yield made


@pytest.fixture
async def bench(shared: Bench) -> Bench:
    await empty(shared.database)
    return shared


@pytest.fixture
async def http(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    """The client's side, with headers as `runpod.Endpoint` sends them."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=f"{bench.address}/v2/local", headers=headers, timeout=10) as client:
        yield client


@pytest.fixture
async def worker(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    """The worker's side, with headers as the SDK sends them: the key without Bearer."""
    headers = {"Authorization": TOKEN}
    async with httpx.AsyncClient(base_url=f"{bench.address}/v2/local", headers=headers, timeout=10) as client:
        yield client


async def run(http: httpx.AsyncClient, **extras: Any) -> str:
    response = await http.post("/run", json={"input": INPUT, **extras})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["status"] == "IN_QUEUE"
    task_id: str = answer["id"]
    return task_id


async def done(worker: httpx.AsyncClient, task_id: str, body: Any, worker_id: str = "w1") -> httpx.Response:
    """As the SDK sends it: JSON with the Content-Type of a form."""
    headers = {"Content-Type": "application/x-www-form-urlencoded", "X-Request-ID": task_id}
    path = f"/job-done/{worker_id}/{task_id}?source=hunyuan&isStream=false"
    return await worker.post(path, content=json.dumps(body), headers=headers)


async def status(http: httpx.AsyncClient, task_id: str) -> dict[str, Any]:
    response = await http.get(f"/status/{task_id}")
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    return answer


async def test_a_job_goes_from_run_to_completed(http: httpx.AsyncClient, worker: httpx.AsyncClient) -> None:
    task_id = await run(http, s3Config={"bucketName": "mine"}, webhook="http://127.0.0.1:9/")
    assert (await status(http, task_id))["status"] == "IN_QUEUE"
    taken = await worker.get("/job-take/w1?source=hunyuan&job_in_progress=0")
    assert taken.status_code == 200
    assert taken.headers["content-type"] == "application/json"
    job = taken.json()
    assert (job["id"], job["input"], job["s3Config"]) == (task_id, INPUT, {"bucketName": "mine"})

    progress = {"progress": 40, "stage": "denoising", "elapsed_time": 3.0}
    await done(worker, task_id, {"status": "IN_PROGRESS", "output": progress})
    seen = await status(http, task_id)
    assert seen["status"] == "IN_PROGRESS"
    assert seen["output"]["progress"] == 40

    output = result(task_id).model_dump(mode="json")
    response = await done(worker, task_id, {"output": output})
    assert response.status_code == 200
    assert response.headers["connection"] == "close", "the SDK loses a result on a stale connection"
    await done(worker, task_id, {"status": "IN_PROGRESS", "output": {**progress, "progress": 10}})
    ended = await status(http, task_id)
    assert (ended["status"], ended["output"]) == ("COMPLETED", output)
    assert ended["executionTime"] >= 0


async def test_failures_are_strings_without_tracebacks(http: httpx.AsyncClient, worker: httpx.AsyncClient) -> None:
    ours = json.dumps({"error": "Out of memory", "error_code": "OOM_ERROR"})
    for error, code in ((ours, "OOM_ERROR"), ("Traceback (most recent call last)", "GENERATION_FAILED")):
        task_id = await run(http)
        await worker.get("/job-take/w1?a=b")
        assert (await done(worker, task_id, {"error": error})).status_code == 200
        ended = await status(http, task_id)
        assert ended["status"] == "FAILED"
        assert json.loads(ended["error"])["error_code"] == code
        assert "Traceback" not in ended["error"]


async def test_an_empty_queue_answers_a_worker_late(
    worker: httpx.AsyncClient,
) -> None:
    for path in ("/job-take/w1?a=b", "/job-take-batch/w1?a=b&batch_size=4", "/job-stop/w1?a=b"):
        started = time.monotonic()
        assert (await worker.get(path)).status_code == 204
        assert time.monotonic() - started >= 0.25, path


async def test_a_long_poll_returns_a_new_job_at_once(database_url: str) -> None:
    async with platform_bench(database_url, hold=20) as bench:
        headers = {"Authorization": TOKEN}
        async with httpx.AsyncClient(base_url=f"{bench.address}/v2/local", headers=headers, timeout=30) as client:
            held = asyncio.create_task(client.get("/job-take/w1?a=b"))
            done, _ = await asyncio.wait([held], timeout=0.3)
            assert not done
            started = time.monotonic()
            task_id = await run(client)
            assert (await held).json()["id"] == task_id
            assert time.monotonic() - started < 1


async def test_job_take_batch_returns_one_job_in_a_list(http: httpx.AsyncClient, worker: httpx.AsyncClient) -> None:
    first, _ = await run(http), await run(http)
    batch = (await worker.get("/job-take-batch/w1?a=b&batch_size=4")).json()
    assert [job["id"] for job in batch] == [first]


async def test_job_stop_names_a_cancelled_job(http: httpx.AsyncClient, worker: httpx.AsyncClient) -> None:
    task_id = await run(http)
    await worker.get("/job-take/w1?a=b")
    assert (await http.post(f"/cancel/{task_id}")).json() == {"id": task_id, "status": "CANCELLED"}
    assert (await worker.get("/job-stop/w1?a=b")).json() == {"jobsToStop": [task_id]}
    assert (await status(http, task_id))["status"] == "CANCELLED"


async def test_a_failed_job_is_retried_with_its_other_fields(
    http: httpx.AsyncClient, worker: httpx.AsyncClient
) -> None:
    task_id = await run(http, s3Config={"bucketName": "mine"})
    assert (await http.post(f"/retry/{task_id}")).status_code == 400
    await worker.get("/job-take/w1?a=b")
    await done(worker, task_id, {"error": "bad luck"})
    assert (await http.post(f"/retry/{task_id}")).json() == {"id": task_id, "status": "IN_QUEUE"}
    assert (await worker.get("/job-take/w1?a=b")).json()["s3Config"] == {"bucketName": "mine"}


async def test_purging_the_queue_leaves_running_jobs(http: httpx.AsyncClient, worker: httpx.AsyncClient) -> None:
    running, waiting = await run(http), await run(http)
    await worker.get("/job-take/w1?a=b")
    assert (await http.post("/purge-queue")).json() == {"removed": 1, "status": "completed"}
    assert (await status(http, running))["status"] == "IN_PROGRESS"
    assert (await status(http, waiting))["status"] == "CANCELLED"


async def test_health_counts_jobs_and_workers(bench: Bench, http: httpx.AsyncClient, worker: httpx.AsyncClient) -> None:
    await bench.worker("w2", WorkerState.LOADING)
    first = await run(http)
    await run(http)
    await worker.get("/job-take/w1?a=b")
    health = (await http.get("/health")).json()
    assert health["jobs"] == {"completed": 0, "failed": 0, "inProgress": 1, "inQueue": 1, "retried": 0}
    assert (health["workers"]["running"], health["workers"]["initializing"]) == (1, 1)
    await done(worker, first, {"output": result(first).model_dump(mode="json")})
    health = (await http.get("/health")).json()
    assert (health["jobs"]["completed"], health["workers"]["idle"]) == (1, 1)


async def test_runsync_answers_when_the_job_ends(http: httpx.AsyncClient, worker: httpx.AsyncClient) -> None:
    waiting = asyncio.create_task(http.post("/runsync", json={"input": INPUT}))
    taken = await worker.get("/job-take/w1?a=b")
    task_id = taken.json()["id"]
    await done(worker, task_id, {"output": {"any": "thing"}})
    answer = (await waiting).json()
    assert (answer["id"], answer["status"], answer["output"]) == (task_id, "COMPLETED", {"any": "thing"})


async def test_a_full_queue_is_503_with_retry_after(http: httpx.AsyncClient) -> None:
    for _ in range(3):
        await run(http)
    response = await http.post("/run", json={"input": INPUT})
    assert response.status_code == 503
    assert response.json()["error_code"] == "QUEUE_FULL"
    assert int(response.headers["retry-after"]) > 0


async def test_worker_reports_reach_health(bench: Bench, worker: httpx.AsyncClient) -> None:
    report = WorkerReport(state=WorkerState.FAILED, model="x", error="no such checkpoint")
    assert (await worker.post("/worker-report/w7", json=report.model_dump(mode="json"))).status_code == 200
    workers = (await bench.queue.summary()).workers
    assert (workers.failed, workers.reports) == (1, [report])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'{"input": 3}', b'{"inputs": {}}', b"[" * 100_000])
async def test_an_invalid_run_is_400(http: httpx.AsyncClient, body: bytes) -> None:
    response = await http.post("/run", content=body)
    assert response.status_code == 400
    assert response.json()["error_code"] == "INVALID_REQUEST"


@pytest.mark.parametrize("body", [b"", b"{", b"3", b"null"])
async def test_an_invalid_result_is_400_and_the_job_goes_on(
    http: httpx.AsyncClient, worker: httpx.AsyncClient, body: bytes
) -> None:
    task_id = await run(http)
    await worker.get("/job-take/w1?a=b")
    assert (await worker.post(f"/job-done/w1/{task_id}?a=b", content=body)).status_code == 400
    assert (await status(http, task_id))["status"] == "IN_PROGRESS"


async def test_invalid_progress_is_ignored(http: httpx.AsyncClient, worker: httpx.AsyncClient) -> None:
    task_id = await run(http)
    await worker.get("/job-take/w1?a=b")
    for output in (None, "half way", {"progress": 400}, {"progress": -1, "stage": Stage.DENOISING}):
        assert (await done(worker, task_id, {"status": "IN_PROGRESS", "output": output})).status_code == 200
    assert (await status(http, task_id))["output"]["progress"] == 0


async def test_unknown_jobs_are_404(http: httpx.AsyncClient) -> None:
    for method, path in (("GET", "status"), ("POST", "cancel"), ("POST", "retry")):
        response = await http.request(method, f"/{path}/no-such-job")
        assert response.status_code == 404
        assert response.json()["error_code"] == "TASK_NOT_FOUND"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/job-take/w1?a=b"),
        ("GET", "/job-take-batch/w1?a=b"),
        ("GET", "/job-stop/w1?a=b"),
        ("POST", "/job-done/w1/j1?a=b"),
        ("POST", "/job-stream/w1/j1?a=b"),
        ("GET", "/ping/w1?a=b"),
        ("POST", "/worker-report/w1"),
        ("POST", "/run"),
        ("POST", "/runsync"),
        ("GET", "/status/j1"),
        ("POST", "/cancel/j1"),
        ("POST", "/retry/j1"),
        ("POST", "/purge-queue"),
        ("GET", "/health"),
    ],
)
async def test_every_route_needs_the_platforms_token(bench: Bench, method: str, path: str) -> None:
    async with httpx.AsyncClient(base_url=f"{bench.address}/v2/local") as stranger:
        for key in (None, "wrong", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN[:-1], "Bearer é"):
            headers = {b"Authorization": key.encode()} if key else {}
            response = await stranger.request(method, path, headers=headers)
            assert response.status_code == 401, key
            assert response.json()["error_code"] == "UNAUTHORIZED"


async def test_a_ping_extends_the_lease_of_its_jobs(
    bench: Bench, http: httpx.AsyncClient, worker: httpx.AsyncClient
) -> None:
    task_id = await run(http)
    await worker.get("/job-take/w1?a=b")
    for _ in range(3):
        bench.later(40)
        assert (await worker.get(f"/ping/w1?a=b&job_id={task_id}&runpod_version=1.12.0")).status_code == 200
        await bench.dispatcher.sweep()
    assert (await status(http, task_id))["status"] == "IN_PROGRESS"
