"""Workers that come back after their task has ended: no byte of a finished video changes, and no task ends twice.

Real workers (the SDK's loop in processes) render for our queue, on S3 servers with and without conditional writes. Each
render gives other bytes. The queue's clock is the test's.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import HttpUrl

from contract.result import Manifest
from shim.queue.job import JobState
from storage.bucket import Bucket
from storage.settings import BucketSettings
from storage.videos import Videos
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.full import full
from tests.support.mp4 import probe
from tests.support.queues import JOB, TOKEN, Bench, platform_bench
from tests.support.s3_servers import behind, juicefs, moto
from tests.support.worker_process import WorkerProcess

#: Seconds that a worker may take to start or to react, on a busy machine.
DEADLINE = 40.0
LEASE = 61.0
HISTORY = 8 * 24 * 3600.0

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", params=["juicefs", full("moto")])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketSettings]:
    server = {"juicefs": juicefs, "moto": moto}[request.param]
    with server(tmp_path_factory.mktemp("store")) as settings:
        yield settings


@dataclass
class Scene:
    """One server with a bucket, and its workers. Worker `late` reaches them through `platform` and `proxy`."""

    bench: Bench
    store: BucketSettings
    proxy: FaultProxy
    platform: FaultProxy
    http: httpx.AsyncClient
    directory: Path
    workers: list[WorkerProcess] = field(default_factory=list)

    def worker(self, name: str) -> WorkerProcess:
        platform, store = self.bench.address, self.store
        if name == "late":
            platform = self.platform.url
            store = store.model_copy(update={"endpoint_url": HttpUrl(self.proxy.url)})
        worker = WorkerProcess(self.directory, store, platform=platform, token=TOKEN, worker_id=name)
        worker.start("--step-seconds", "0.02")
        self.workers.append(worker)
        return worker

    def keys(self, task_id: str) -> list[str]:
        listing = Bucket(self.store)._client.list_objects_v2(Bucket=self.store.name, Prefix=f"videos/{task_id}")
        return [item["Key"] for item in listing.get("Contents", [])]

    def requested(self, method: str, task_id: str, extension: str) -> int:
        return sum(
            request.startswith(f"{method} ") and f"/{task_id}" in request and request.endswith(extension)
            for request in self.proxy.requests
        )

    async def until(self, what: str, look: Callable[[], Any], seconds: float = DEADLINE) -> Any:
        deadline = time.monotonic() + seconds
        while not (seen := await asyncio.to_thread(look)):
            assert time.monotonic() < deadline, f"{what} did not happen; {self.logs()}"
            await asyncio.sleep(0.05)
        return seen

    async def state(self, task_id: str, wanted: JobState) -> None:
        deadline = time.monotonic() + DEADLINE
        while (job := await self.bench.queue.get(task_id)) is None or job.state is not wanted:
            assert time.monotonic() < deadline, f"{job}; {self.logs()}"
            await asyncio.sleep(0.05)

    def cut_off(self, **how: bool) -> None:
        """The late worker reaches neither the server nor, in that way, the bucket."""
        self.platform.faults = Faults(refuse=True)
        self.proxy.faults = Faults(**how)

    def reconnect(self) -> None:
        self.proxy.heal()
        self.platform.heal()

    async def lose_lease(self) -> None:
        self.bench.later(LEASE)
        await self.bench.dispatcher.sweep()

    async def tidy(self) -> None:
        """What the server does every few seconds."""
        self.bench.later(10)
        await self.bench.outbox.work_off()

    async def tidied(self, task_id: str, extensions: list[str]) -> None:
        """The bucket has these objects of the task, after the server has tidied up."""
        deadline = time.monotonic() + DEADLINE
        while sorted(key.rpartition(".")[2] for key in self.keys(task_id)) != extensions:
            assert time.monotonic() < deadline, f"{self.keys(task_id)}; {self.logs()}"
            await self.tidy()
            await asyncio.sleep(0.1)

    async def submit(self) -> str:
        await self.bench.worker("ready")
        return (await self.bench.queue.submit(JOB)).task_id

    async def forget(self, task_id: str) -> None:
        """The queue deletes the ended task from its history, as soon as the bucket shows its end."""
        self.bench.later(HISTORY)
        deadline = time.monotonic() + DEADLINE
        while await self.bench.queue.get(task_id) is not None:
            assert time.monotonic() < deadline, self.logs()
            await self.tidy()
            await self.bench.dispatcher.sweep()

    async def status(self, task_id: str) -> dict[str, Any]:
        response = await self.http.get(f"/status/{task_id}")
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def assert_serves(self, task_id: str, result: Manifest) -> None:
        """The server gives the bytes of that result, whole, with its length and its ETag."""
        response = await self.http.get(f"/videos/{task_id}.mp4")
        assert response.status_code == 200
        assert response.headers["etag"] == f'"{result.sha256}"'
        assert response.headers["content-length"] == str(result.file_size)
        assert hashlib.sha256(response.content).hexdigest() == result.sha256
        path = self.directory / "downloaded.mp4"
        path.write_bytes(response.content)
        assert probe(path).num_frames == 121

    def logs(self) -> str:
        return "\n".join(f"--- {worker.worker_id}\n{worker.log.read_text()[-3000:]}" for worker in self.workers)


@pytest.fixture
async def scene(store: BucketSettings, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    limits = getattr(request, "param", {})
    with ExitStack() as stack:
        proxy = stack.enter_context(behind(store))
        url = f"sqlite:///{tmp_path}/queue.sqlite3"
        async with (
            platform_bench(url, bucket=store, **limits) as bench,
            httpx.AsyncClient(base_url=bench.address, timeout=30) as http,
        ):
            platform = stack.enter_context(FaultProxy(("127.0.0.1", int(bench.address.rpartition(":")[2]))))
            made = Scene(bench, store, proxy, platform, http, tmp_path)
            yield made
            for worker in made.workers:
                if worker.process is not None:
                    worker.thaw()
                    worker.kill()


ONE_ATTEMPT = pytest.mark.parametrize("scene", [{"max_attempts": 1}], indirect=True, ids=["one-attempt"])


async def result_of(scene: Scene, task_id: str) -> Manifest:
    await scene.state(task_id, JobState.COMPLETED)
    job = await scene.bench.queue.get(task_id)
    assert job is not None
    assert job.result is not None
    return job.result


async def test_a_worker_cut_off_in_its_upload_changes_nothing_of_the_video_that_another_one_completed(
    scene: Scene,
) -> None:
    task_id = await scene.submit()
    scene.proxy.answer(503, "SlowDown", times=10_000, method="PUT", target=".mp4")
    late = scene.worker("late")
    await scene.until("an upload", lambda: scene.requested("PUT", task_id, ".mp4"))
    scene.cut_off(refuse=True)

    await scene.lose_lease()
    scene.worker("second")
    result = await result_of(scene, task_id)
    await scene.assert_serves(task_id, result)

    scene.reconnect()
    await scene.until("the late worker's return", lambda: scene.requested("GET", task_id, ".json") > 1)
    await scene.until("the end of its job", lambda: "Finished" in late.log.read_text())
    await scene.tidied(task_id, ["jpg", "jpg", "json", "mp4"])
    await scene.assert_serves(task_id, result)
    assert Videos(Bucket(scene.store)).find(task_id) == result


async def test_a_worker_stopped_before_it_writes_the_manifest_does_not_replace_the_completed_video(
    scene: Scene,
) -> None:
    task_id = await scene.submit()
    scene.proxy.stall_at("PUT", ".jpg")
    late = scene.worker("late")
    await scene.until("the upload", lambda: scene.requested("PUT", task_id, ".jpg"))
    late.freeze()
    scene.proxy.heal()
    assert not scene.requested("PUT", task_id, ".json")

    await scene.lose_lease()
    scene.worker("second")
    result = await result_of(scene, task_id)

    late.thaw()
    await scene.until("the end of its job", lambda: "Finished" in late.log.read_text())
    await scene.tidied(task_id, ["jpg", "jpg", "json", "mp4"])
    await scene.assert_serves(task_id, result)
    assert Videos(Bucket(scene.store)).find(task_id) == result


@pytest.mark.full
@pytest.mark.parametrize("store", ["juicefs", "moto"], indirect=True)
async def test_a_manifest_that_is_written_although_another_worker_completed_the_task_is_replaced(
    scene: Scene,
) -> None:
    """The late worker has looked, and its PUT is held on the way: only a conditional write can refuse it."""
    task_id = await scene.submit()
    scene.proxy.stall_at("PUT", ".json")
    late = scene.worker("late")
    await scene.until("the manifest", lambda: scene.requested("PUT", task_id, ".json"))
    scene.cut_off(stall=True)

    await scene.lose_lease()
    scene.worker("second")
    result = await result_of(scene, task_id)

    scene.reconnect()
    await scene.until("the end of its job", lambda: "Finished" in late.log.read_text())
    await scene.tidied(task_id, ["jpg", "jpg", "json", "mp4"])
    await scene.assert_serves(task_id, await result_of(scene, task_id))
    assert await result_of(scene, task_id) == result
    assert Videos(Bucket(scene.store)).find(task_id) == result


async def test_a_task_cancelled_while_its_manifest_is_written_stays_cancelled(scene: Scene) -> None:
    task_id = await scene.submit()
    scene.proxy.stall_at("PUT", ".json")
    scene.worker("late")
    await scene.until("the manifest", lambda: scene.requested("PUT", task_id, ".json"))
    answer = (await scene.http.delete(f"/tasks/{task_id}")).json()
    assert answer["error_code"] == "CANCELLED"
    await scene.until("the end of its job", lambda: "cancelled" in scene.workers[0].log.read_text())
    scene.proxy.heal()
    await scene.tidied(task_id, ["json"])
    await scene.forget(task_id)
    assert await scene.status(task_id) == answer
    assert (await scene.http.get(f"/videos/{task_id}.mp4")).status_code == 404


@ONE_ATTEMPT
async def test_a_task_given_up_stays_failed_when_its_worker_comes_back(scene: Scene) -> None:
    task_id = await scene.submit()
    scene.proxy.stall_at("PUT", ".jpg")
    late = scene.worker("late")
    await scene.until("the upload", lambda: scene.requested("PUT", task_id, ".jpg"))
    late.freeze()
    scene.proxy.heal()
    await scene.lose_lease()
    await scene.state(task_id, JobState.FAILED)
    answer = await scene.status(task_id)
    await scene.tidy()

    late.thaw()
    await scene.until("the end of its job", lambda: "Finished" in late.log.read_text())
    await scene.tidied(task_id, ["json"])
    await scene.forget(task_id)
    assert await scene.status(task_id) == answer


@ONE_ATTEMPT
async def test_a_worker_killed_before_the_manifest_of_its_last_attempt_leaves_no_objects(scene: Scene) -> None:
    task_id = await scene.submit()
    scene.proxy.answer(503, "SlowDown", times=10_000, method="PUT", target=".jpg")
    late = scene.worker("late")
    await scene.until("the poster", lambda: scene.requested("PUT", task_id, ".jpg"))
    late.kill()
    assert [key.rpartition(".")[2] for key in scene.keys(task_id)] == ["mp4"]
    await scene.bench.dispatcher.release_worker("late")
    await scene.state(task_id, JobState.FAILED)
    answer = await scene.status(task_id)
    await scene.tidied(task_id, ["json"])
    await scene.forget(task_id)
    assert await scene.status(task_id) == answer
