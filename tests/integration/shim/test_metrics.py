"""GET /metrics as Prometheus reads it: right numbers, few series, and a response while the queue is unavailable."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter
from pydantic import SecretStr

from contract.errors import ErrorCode, JobFailure
from contract.result import JobResult
from contract.worker import Gpu, WorkerState
from shim.app import create_app
from shim.host.supervisor import Launch, Supervised
from shim.metrics import Metrics
from shim.queue.runpod import RunPodQueue
from storage import layout
from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.http_server import serving
from tests.support.postgres import Postgres, running_postgres
from tests.support.prometheus import scrape
from tests.support.queues import JOB, NOWHERE, TOKEN, Bench, platform_bench, result, sql_bench
from tests.support.s3_servers import new_bucket

GIB = 1024**3
OOM = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with platform_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as made:
        yield made


@pytest.fixture
async def http(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=bench.address, timeout=30) as client:
        yield client


def timed(task_id: str) -> JobResult:
    timings = {"encoding_prompt": 2.0, "denoising": 20.0, "storing": 3.0, "total": 25.0, "no stage of ours": 9.0}
    return result(task_id).model_copy(update={"timings": timings})


async def generate(http: httpx.AsyncClient) -> str:
    response = await http.post("/generate", json=JOB.wire())
    assert response.status_code == 202, response.text
    task_id: str = response.json()["task_id"]
    return task_id


async def test_a_result_that_arrives_twice_counts_once(bench: Bench, http: httpx.AsyncClient) -> None:
    await bench.worker()
    task_id = await generate(http)
    bench.later(7)
    assert await bench.take() == task_id
    output = timed(task_id).model_dump(mode="json")
    for _ in range(2):
        await bench.dispatcher.complete("w1", task_id, output)
        await bench.dispatcher.fail("w1", task_id, OOM)
        await bench.queue.cancel(task_id)
    seen = await scrape(http)
    assert seen.value("hunyuan_tasks_submitted_total") == 1
    assert seen.value("hunyuan_tasks_ended_total", state="completed", error_code="") == 1
    assert sum(value for _, value in seen.samples["hunyuan_tasks_ended_total"]) == 1
    assert seen.value("hunyuan_task_wait_seconds_sum") == 7
    assert seen.value("hunyuan_task_render_seconds_count", resolution="720p", duration="5") == 1
    assert seen.value("hunyuan_task_render_seconds_sum", resolution="720p", duration="5") == 25
    assert seen.labels("hunyuan_task_stage_seconds_count", "stage") == {"encoding_prompt", "denoising", "storing"}
    assert seen.value("hunyuan_task_stage_seconds_sum", stage="denoising") == 20
    assert seen.value("hunyuan_task_stage_seconds_bucket", stage="denoising", le="10.0") == 0
    assert seen.value("hunyuan_task_stage_seconds_bucket", stage="denoising", le="20.0") == 1


async def test_each_terminal_state_has_its_count(bench: Bench, http: httpx.AsyncClient) -> None:
    await bench.worker()
    for output in (OOM, {"no": "video"}, None):
        task_id = await generate(http)
        if output is None:
            await bench.queue.cancel(task_id)
            await bench.queue.cancel(task_id)
            continue
        await bench.take()
        if isinstance(output, JobFailure):
            await bench.dispatcher.fail("w1", task_id, output)
            await bench.dispatcher.fail("w1", task_id, output)
        else:
            await bench.dispatcher.complete("w1", task_id, output)
    headers = {"Authorization": TOKEN}
    for _ in range(2):
        await http.post("/v2/local/run", json={"input": JOB.wire()}, headers=headers)
    await http.post("/v2/local/purge-queue", headers=headers)
    seen = await scrape(http)
    ended = {(found["state"], found["error_code"]): value for found, value in seen.samples["hunyuan_tasks_ended_total"]}
    assert ended == {
        ("completed", ""): 0,
        ("failed", "OOM_ERROR"): 1,
        ("failed", "GENERATION_FAILED"): 1,
        ("failed", "STORAGE_UNAVAILABLE"): 0,
        ("cancelled", "CANCELLED"): 3,
    }
    assert seen.value("hunyuan_tasks_submitted_total") == 5


async def test_a_task_whose_worker_is_lost_waits_once_and_ends_once(bench: Bench, http: httpx.AsyncClient) -> None:
    await bench.worker()
    await generate(http)
    for _ in range(3):
        await bench.take()
        await bench.dispatcher.release_worker("w1")
    seen = await scrape(http)
    assert seen.value("hunyuan_tasks_requeued_total") == 2
    assert seen.value("hunyuan_task_wait_seconds_count") == 1
    assert seen.value("hunyuan_tasks_ended_total", state="failed", error_code="GENERATION_FAILED") == 1


async def test_the_gauges_show_the_queue_and_the_workers_at_the_scrape(bench: Bench, http: httpx.AsyncClient) -> None:
    gpu = Gpu(name="H100", memory_total=80 * GIB, memory_free=66 * GIB)
    await bench.worker("w1", gpu=gpu, load_seconds={"imports": 4.5, "total": 31.0})
    await bench.worker("w2", WorkerState.LOADING)
    await bench.worker("w3", WorkerState.FAILED, error="no such checkpoint")
    for _ in range(3):
        await generate(http)
    await bench.take()
    seen = await scrape(http)
    assert seen.value("hunyuan_queue_up") == 1
    assert seen.value("hunyuan_queue_tasks", state="waiting") == 2
    assert seen.value("hunyuan_queue_tasks", state="running") == 1
    assert [seen.value("hunyuan_workers", state=state) for state in ("ready", "loading", "failed")] == [1, 1, 1]
    assert seen.value("hunyuan_worker_vram_size_bytes", worker_id="w1") == 80 * GIB
    assert seen.value("hunyuan_worker_vram_free_bytes", worker_id="w1") == 66 * GIB
    assert seen.labels("hunyuan_worker_vram_free_bytes", "worker_id") == {"w1"}, "the others reported no GPU"
    assert seen.value("hunyuan_worker_load_seconds", worker_id="w1", phase="imports") == 4.5
    assert seen.value("hunyuan_build_info", version="1.5.0") == 1
    assert seen.value("process_open_fds") > 0
    assert "python_info" in seen.samples
    await bench.dispatcher.release_worker("w1")
    gone = await scrape(http)
    assert gone.value("hunyuan_workers", state="ready") == 0
    assert gone.labels("hunyuan_worker_load_seconds", "worker_id") == set(), "the series of a lost worker end"


async def test_with_runpod_the_gauges_are_the_endpoints(bench: Bench) -> None:
    metrics = Metrics()
    queue = RunPodQueue(
        endpoint_id="local", api_key=TOKEN, base_url=f"{bench.address}/v2", clock=bench.clock, observer=metrics
    )
    app = create_app(queue, Bucket(NOWHERE), metrics=metrics)
    async with serving(app) as address, httpx.AsyncClient(base_url=address, timeout=30) as http:
        await bench.worker()
        task_id = await generate(http)
        await generate(http)
        await bench.take()
        bench.later()
        seen = await scrape(http)
        assert seen.value("hunyuan_queue_tasks", state="running") == 1
        assert seen.value("hunyuan_workers", state="ready") == 1
        await bench.dispatcher.complete("w1", task_id, timed(task_id).model_dump(mode="json"))
        for _ in range(3):
            bench.later()
            assert (await http.get(f"/status/{task_id}")).json()["status"] == "completed"
        seen = await scrape(http)
        assert seen.value("hunyuan_tasks_submitted_total") == 2
        assert seen.value("hunyuan_tasks_ended_total", state="completed", error_code="") == 1
        assert seen.value("hunyuan_task_render_seconds_sum", resolution="720p", duration="5") == 25
    await queue.close()


@pytest.fixture(scope="module")
def mortal_postgres() -> Iterator[Postgres]:
    """A server of this module's own, because a test freezes and kills it."""
    with running_postgres() as server:
        yield server


async def test_an_unavailable_database_fails_no_scrape(mortal_postgres: Postgres) -> None:
    async with (
        platform_bench(mortal_postgres.create_database()) as bench,
        httpx.AsyncClient(base_url=bench.address, timeout=30) as http,
    ):
        await bench.worker()
        await generate(http)
        for number in (signal.SIGSTOP, signal.SIGKILL):  # frozen; killed
            assert (await scrape(http)).value("hunyuan_queue_up") == 1
            mortal_postgres.send(number)
            started = time.monotonic()
            seen = await scrape(http)
            assert time.monotonic() - started < 8, "Prometheus gives up after 10 s"
            assert seen.value("hunyuan_queue_up") == 0
            assert "hunyuan_queue_tasks" not in seen.samples, "a missing value is better than a wrong one"
            assert seen.value("hunyuan_tasks_submitted_total") == 1
            if number == signal.SIGSTOP:
                mortal_postgres.send(signal.SIGCONT)


async def test_labels_have_few_values_for_any_requests(bench: Bench, http: httpx.AsyncClient) -> None:
    async def ask() -> None:
        for method in ("GET", "POST", "PROPFIND"):
            for path in ("{}", "status/{}!", "videos/{}!.mp4", "v2/{}/run", "v2/local/status/{}", "health?{}"):
                await http.request(method, "/" + path.format(secrets.token_hex(8)))

    await ask()
    await scrape(http)  # counts itself from the next one on
    before = await scrape(http)
    for _ in range(10):
        await ask()
    after = await scrape(http)
    assert {name: len(found) for name, found in after.samples.items()} == {
        name: len(found) for name, found in before.samples.items()
    }
    routes = after.labels("hunyuan_http_requests_total", "route")
    assert routes == {
        "/health",
        "/metrics",
        "/status/{task_id}",
        "/v2/local/status/{task_id}",
        "/videos/{file_name}",
        "other",
    }
    assert after.labels("hunyuan_http_requests_total", "method") == {"GET", "POST", "other"}


async def test_requests_are_counted_by_route_method_and_status(bench: Bench, http: httpx.AsyncClient) -> None:
    await generate_refused(http)
    await http.get("/v2/local/health")
    seen = await scrape(http)
    assert seen.value("hunyuan_http_requests_total", route="/generate", method="POST", status="503") == 1
    assert seen.value("hunyuan_http_requests_total", route="/v2/local/health", method="GET", status="401") == 1
    assert seen.value("hunyuan_http_request_duration_seconds_count", route="/generate", method="POST") == 1


async def generate_refused(http: httpx.AsyncClient) -> None:
    assert (await http.post("/generate", json=JOB.wire())).status_code == 503


async def test_an_unexpected_error_is_counted_as_a_500_and_has_its_request_id(tmp_path: Path) -> None:
    router = APIRouter()

    @router.get("/broken")
    async def broken() -> None:
        raise RuntimeError("on purpose")

    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench:
        app = create_app(bench.queue, Bucket(NOWHERE), routers=[router])
        async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
            response = await http.get("/broken", headers={"X-Request-ID": "r-1"})
            assert (response.status_code, response.headers["x-request-id"]) == (500, "r-1")
            seen = await scrape(http)
            assert seen.value("hunyuan_http_requests_total", route="/broken", method="GET", status="500") == 1


async def test_a_request_id_that_fits_a_log_line_is_kept(http: httpx.AsyncClient) -> None:
    assert (await http.get("/health", headers={"X-Request-ID": "a-Z.0_9"})).headers["x-request-id"] == "a-Z.0_9"
    made = set()
    for unfit in (b"", b"x" * 129, b"two words", b'a"b', "é".encode()):
        made.add((await http.get("/health", headers={b"X-Request-ID": unfit})).headers["x-request-id"])
    made.add((await http.get("/health")).headers["x-request-id"])
    assert len(made) == 6, "each request has its own id"
    assert all(len(request_id) == 32 for request_id in made)


@pytest.fixture(scope="module")
def bucket_settings(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


async def test_requests_to_the_bucket_are_measured_and_their_errors_counted(
    bucket_settings: BucketSettings, tmp_path: Path
) -> None:
    Bucket(bucket_settings).put_bytes(
        timed("done").model_dump_json().encode(), layout.manifest_key("done"), content_type="a/b"
    )
    Bucket(bucket_settings).put_bytes(b"0" * 1000, layout.video_key("done"), content_type="video/mp4")
    refused = bucket_settings.model_copy(update={"secret_access_key": SecretStr("wrong")})
    metrics = Metrics()
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench:
        for settings, statuses in ((bucket_settings, (200, 404)), (refused, (503, 503)), (NOWHERE, (503, 503))):
            app = create_app(bench.queue, Bucket(settings, observe=metrics.s3_request), metrics=metrics)
            async with serving(app) as address, httpx.AsyncClient(base_url=address, timeout=60) as http:
                answers = [await http.get(f"/videos/{task_id}.mp4") for task_id in ("done", "unknown")]
                assert tuple(answer.status_code for answer in answers) == statuses
                seen = await scrape(http)
    assert seen.value("hunyuan_s3_request_duration_seconds_count", operation="get_object") == 6
    assert seen.value("hunyuan_s3_request_duration_seconds_count", operation="get_video") == 1
    assert seen.value("hunyuan_s3_errors_total", operation="get_object", error="denied") == 2
    assert seen.value("hunyuan_s3_errors_total", operation="get_object", error="unavailable") == 2
    assert seen.value("hunyuan_s3_errors_total", operation="get_video", error="unavailable") == 0


async def test_restarts_of_our_processes_are_counted(bench: Bench, http: httpx.AsyncClient) -> None:
    async def launch() -> Launch:
        return Launch([sys.executable, "-c", "raise SystemExit(1)"], {}, ended)

    async def ended(code: int, asked: bool) -> None:
        assert code == 1

    process = Supervised("worker 0", launch, bench.metrics.supervise("worker 0"))
    assert (await scrape(http)).value("hunyuan_process_restarts_total", process="worker 0") == 0
    keeper = asyncio.create_task(process.run())
    deadline = time.monotonic() + 20
    while (await scrape(http)).value("hunyuan_process_restarts_total", process="worker 0") < 2:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    await process.stop(5)
    await keeper


async def test_the_free_space_of_the_data_directory_is_exported(tmp_path: Path) -> None:
    metrics = Metrics(data_directory=tmp_path / "data")
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench:
        app = create_app(bench.queue, Bucket(NOWHERE), metrics=metrics)
        async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
            assert "hunyuan_data_directory_size_bytes" not in (await scrape(http)).samples, (
                "the directory does not exist"
            )
            (tmp_path / "data").mkdir()
            seen = await scrape(http)
            free, size = (seen.value(f"hunyuan_data_directory_{name}_bytes") for name in ("free", "size"))
            assert 0 < free <= size


async def test_names_follow_the_conventions_of_prometheus(bench: Bench, http: httpx.AsyncClient) -> None:
    await http.get("/health")
    ours = {name: kind for name, kind in (await scrape(http)).families.items() if name.startswith("hunyuan_")}
    assert len(ours) >= 15
    for name, kind in ours.items():
        assert (kind == "histogram") is name.endswith("_seconds") or name == "hunyuan_worker_load_seconds", name
        assert not name.endswith(("_total", "_created", "_ms", "_milliseconds", "_mb", "_percent")), name


async def test_polls_that_succeed_are_logged_at_debug_and_those_that_fail_at_info(
    bench: Bench, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.worker()
    caplog.set_level(logging.DEBUG, "shim.http.access_log")
    task_id = await generate(http)
    polls = [f"/status/{task_id}", f"/v2/local/status/{task_id}", "/health", "/v2/local/health"]
    for path in (*polls, "/status/no-such-task"):
        await http.get(path, headers={"Authorization": f"Bearer {TOKEN}"})
    await http.delete(f"/tasks/{task_id}")
    records = [record for record in caplog.records if record.name == "shim.http.access_log"]
    logged = [(record.levelname, record.getMessage().rpartition(" in ")[0]) for record in records]
    assert logged == [
        ("INFO", "POST /generate 202"),
        ("DEBUG", "GET /status/{task_id} 200"),
        ("DEBUG", "GET /v2/local/status/{task_id} 200"),
        ("DEBUG", "GET /health 200"),
        ("DEBUG", "GET /v2/local/health 200"),
        ("INFO", "GET /status/{task_id} 503"),
        ("INFO", "DELETE /tasks/{task_id} 200"),
    ]
