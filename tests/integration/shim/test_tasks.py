"""GET /tasks, GET /tasks/{id}, its retry and the poster, on a real queue and a real bucket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from contract.errors import ErrorCode, JobFailure
from contract.result import Progress, Stage, Tombstone
from shim.access import OPEN_TO_ALL, Access, parse_api_keys
from shim.app import create_app
from shim.errors import AnyErrorCode, ServerErrorCode
from shim.queue.runpod import RunPodQueue
from shim.queue.schema import jobs
from storage import layout
from storage.bucket import Bucket
from storage.settings import BucketSettings
from storage.videos import Videos
from tests.support.http_server import serving
from tests.support.queues import JOB, NOWHERE, Bench, result, sql_bench
from tests.support.s3_servers import juicefs

OOM = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)
KEYS = {"alice": "alices-key-0123456789", "bob": "bobs-key-01234567890"}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketSettings]:
    with juicefs(tmp_path_factory.mktemp("juicefs")) as made:
        yield made


@dataclass
class Site:
    bench: Bench
    http: httpx.AsyncClient

    async def task(self, **headers: str) -> str:
        response = await self.http.post("/generate", json=JOB.wire(), headers=headers)
        assert response.status_code == 202, response.text
        task_id: str = response.json()["task_id"]
        return task_id

    async def completed(self, **headers: str) -> str:
        task_id = await self.task(**headers)
        assert await self.bench.take() == task_id
        await self.bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
        return task_id

    async def failed(self, **headers: str) -> str:
        task_id = await self.task(**headers)
        assert await self.bench.take() == task_id
        await self.bench.dispatcher.fail("w1", task_id, OOM)
        return task_id

    async def get(self, path: str, **headers: str) -> dict[str, Any]:
        response = await self.http.get(path, headers=headers)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def listed(self, query: str = "", **headers: str) -> list[str]:
        return [task["task_id"] for task in (await self.get(f"/tasks?{query}", **headers))["tasks"]]


@asynccontextmanager
async def running(
    url: str, bucket: BucketSettings = NOWHERE, access: Access = OPEN_TO_ALL, **limits: Any
) -> AsyncIterator[Site]:
    async with sql_bench(url, bucket=bucket, max_queue_size=30, **limits) as bench:
        await bench.worker()
        app = create_app(bench.queue, Bucket(bucket), access=access)
        async with serving(app) as address, httpx.AsyncClient(base_url=address, timeout=30) as http:
            yield Site(bench, http)


@pytest.fixture
async def site(tmp_path: Path, bucket: BucketSettings) -> AsyncIterator[Site]:
    async with running(f"sqlite:///{tmp_path}/queue.db", bucket) as made:
        yield made


def assert_error(response: httpx.Response, status: int, code: AnyErrorCode, words: str = "") -> None:
    assert (response.status_code, response.json()["error_code"]) == (status, code), response.text
    assert words in response.json()["error"]


# The list


async def test_pages_have_every_task_once_newest_first_while_others_are_submitted(database_url: str) -> None:
    async with running(database_url) as site:
        ids = [await site.task() for _ in range(7)]
        seen: list[str] = []
        query = "limit=3"
        for _ in range(3):
            page = await site.get(f"/tasks?{query}")
            seen += [task["task_id"] for task in page["tasks"]]
            query = f"limit=3&cursor={page['next_cursor']}"
            await site.task()
        assert seen == ids[::-1]
        assert page["next_cursor"] is None
        assert page["tasks"][0] == await site.get(f"/status/{page['tasks'][0]['task_id']}")


async def test_the_filter_agrees_with_the_status_that_is_shown(database_url: str) -> None:
    async with running(database_url) as site:
        done, deleted, without_video = [await site.completed() for _ in range(3)]
        failed, cancelled, waiting = await site.failed(), await site.task(), await site.task()
        running_now = await site.task()
        await site.bench.queue.cancel(cancelled)
        await site.bench.queue.delete_video(deleted)
        async with site.bench.database.write() as connection:  # as releases before this one left it
            await connection.execute(update(jobs).where(jobs.c.task_id == without_video).values(output={}))
        assert await site.bench.take() == waiting
        expected = {
            "processing": [running_now, waiting],
            "completed": [done],
            "failed": [cancelled, failed, deleted],
        }
        for status, ids in expected.items():
            assert await site.listed(f"status={status}") == ids
            statuses = [task["status"] for task in (await site.get(f"/tasks?status={status}"))["tasks"]]
            assert statuses == [status] * len(ids)
        assert len(await site.listed()) == 7


async def test_each_key_sees_its_own_tasks(tmp_path: Path) -> None:
    access = Access(parse_api_keys(",".join(f"{name}:{key}" for name, key in KEYS.items())))
    async with running(f"sqlite:///{tmp_path}/queue.db", access=access) as site:
        alice, bob = [{"X-API-Key": key} for key in KEYS.values()]
        mine, theirs = await site.task(**alice), await site.task(**bob)
        assert await site.listed(**alice) == [mine]
        assert await site.listed(**bob) == [theirs]
        assert (await site.get(f"/tasks/{theirs}", **alice))["task_id"] == theirs, "as GET /status"
        assert_error(await site.http.get("/tasks"), 401, ServerErrorCode.UNAUTHORIZED)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        *((f"limit={value}", "limit must be an integer from 1 to 100") for value in ("0", "101", "-1", "x", "", "1.0")),
        *((f"status={value}", "status must be one of") for value in ("", "queued", "COMPLETED")),
        *((f"cursor={value}", "cursor must be the next_cursor of a page") for value in ("", "x", "-1", "9" * 19)),
    ],
)
async def test_a_wrong_parameter_is_400_and_named(site: Site, query: str, words: str) -> None:
    assert_error(await site.http.get(f"/tasks?{query}"), 400, ErrorCode.INVALID_REQUEST, words)


async def test_in_front_of_runpod_the_list_is_501_and_says_what_to_use() -> None:
    queue = RunPodQueue(endpoint_id="none", api_key="none", base_url="http://127.0.0.1:9")
    app = create_app(queue, Bucket(NOWHERE))
    async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
        assert_error(await http.get("/tasks"), 501, ServerErrorCode.NOT_SUPPORTED, "GET /tasks/{task_id}")
    await queue.close()


# One task


async def test_a_task_has_its_request_attempts_stages_and_events(database_url: str) -> None:
    async with running(database_url) as site:
        image = "data:image/png;base64," + "A" * 1000
        request = {**JOB.wire(), "image": image, "seed": 7}
        task_id = (await site.http.post("/generate", json=request)).json()["task_id"]
        await site.bench.take("w1")
        await site.bench.dispatcher.record_progress("w1", task_id, Progress(progress=2, stage=Stage.ENCODING_PROMPT))
        await site.bench.dispatcher.release_worker("w1")
        await site.bench.worker("w2")
        await site.bench.take("w2")
        for progress in (10, 20, 30):
            site.bench.later(10)
            await site.bench.dispatcher.record_progress(
                "w2", task_id, Progress(progress=progress, stage=Stage.DENOISING)
            )
        running_now = await site.get(f"/tasks/{task_id}")
        await site.bench.dispatcher.complete("w2", task_id, result(task_id).model_dump(mode="json"))
        done = await site.get(f"/tasks/{task_id}")

        assert running_now["input"] == {**JOB.wire(), "seed": 7}, "without the image's data"
        assert (running_now["worker"], running_now["attempts"], running_now["lost_attempts"]) == ("w2", 2, 1)
        assert running_now["settings"] is None
        assert running_now["stages"][-1]["seconds"] is None
        assert [(one["stage"], one["attempt"], one["seconds"]) for one in done["stages"]] == [
            *(("queued", 0, 0.0), ("queued", 1, 2.0), ("encoding_prompt", 1, 0.0), ("queued", 1, 2.0)),
            *(("encoding_prompt", 2, 12.0), ("denoising", 2, 20.0)),
        ]
        assert [one["number"] for one in done["events"]] == list(range(1, 8))
        assert [one["worker"] for one in done["events"]] == [None, "w1", "w1", None, "w2", "w2", "w2"]
        assert [one["status"] for one in done["events"]] == ["processing"] * 6 + ["completed"]
        assert done["settings"]["num_frames"] == 121
        status = await site.get(f"/status/{task_id}")
        assert {name: done[name] for name in status} == status
        assert done["submitted_at"] < done["started_at"] < done["finished_at"]


async def test_a_task_of_an_older_release_has_no_events(site: Site) -> None:
    task_id = await site.completed()
    async with site.bench.database.write() as connection:
        await connection.exec_driver_sql("DELETE FROM events")
        await connection.execute(update(jobs).values(last_event=0, estimated_time=None))
    assert (await site.get(f"/tasks/{task_id}"))["events"] == []
    waiting = await site.task()
    async with site.bench.database.write() as connection:
        await connection.exec_driver_sql("DELETE FROM events")
        await connection.execute(update(jobs).values(last_event=0, estimated_time=None))
    assert (await site.get(f"/status/{waiting}"))["remaining_time"] is None
    await site.bench.take()
    assert [one["number"] for one in (await site.get(f"/tasks/{waiting}"))["events"]] == [1]


async def test_a_task_that_only_the_bucket_has_shows_its_manifest(site: Site, bucket: BucketSettings) -> None:
    manifest = result("only-stored")
    await asyncio.to_thread(Videos(Bucket(bucket)).put_manifest, manifest)
    task = await site.get("/tasks/only-stored")
    assert (task["status"], task["input"], task["attempts"], task["events"]) == ("completed", JOB.wire(), None, [])
    assert task["settings"]["fps"] == 24


async def show(site: Site, task_id: str, jpeg: bytes, progress: int) -> None:
    report = Progress(progress=progress, stage=Stage.DENOISING).model_copy(update={"preview": jpeg})
    await site.bench.dispatcher.record_progress("w1", task_id, report)


async def test_a_running_task_has_a_preview_until_it_ends(site: Site) -> None:
    task_id = await site.task()
    path = f"/tasks/{task_id}/preview.jpg"
    assert_error(await site.http.get(path), 404, ServerErrorCode.NO_PREVIEW, "the stage is queued")
    assert await site.bench.take() == task_id
    assert "preview_url" not in await site.get(f"/status/{task_id}")
    urls = []
    for progress, jpeg in ((10, b"one"), (20, b"two")):
        await show(site, task_id, jpeg, progress)
        status = await site.get(f"/status/{task_id}")
        urls.append(status["preview_url"])
        assert (await site.get(f"/tasks/{task_id}"))["preview_url"] == urls[-1]
        shown = await site.http.get(status["preview_url"])
        assert (shown.status_code, shown.content, shown.headers["content-type"]) == (200, jpeg, "image/jpeg")
        assert (shown.headers["cache-control"], shown.headers["x-content-type-options"]) == ("no-store", "nosniff")
        assert (await site.http.get(path)).content == jpeg
    assert urls[0] != urls[1]
    await site.bench.dispatcher.fail("w1", task_id, OOM)
    assert_error(await site.http.get(path), 404, ServerErrorCode.NO_PREVIEW, "The task has ended")
    assert_error(await site.http.get("/tasks/unknown/preview.jpg"), 404, ServerErrorCode.TASK_NOT_FOUND)


async def test_a_preview_needs_a_key_and_is_listed_for_the_key_of_its_task_only(tmp_path: Path) -> None:
    access = Access(parse_api_keys(",".join(f"{name}:{key}" for name, key in KEYS.items())))
    async with running(f"sqlite:///{tmp_path}/queue.db", access=access) as site:
        alice, bob = [{"X-API-Key": key} for key in KEYS.values()]
        task_id = await site.task(**alice)
        assert await site.bench.take() == task_id
        await show(site, task_id, b"alices", 10)
        (listed,) = (await site.get("/tasks", **alice))["tasks"]
        assert (await site.http.get(listed["preview_url"], headers=alice)).content == b"alices"
        assert_error(await site.http.get(listed["preview_url"]), 401, ServerErrorCode.UNAUTHORIZED)
        assert (await site.get("/tasks", **bob))["tasks"] == []


async def test_an_unknown_task_is_404(site: Site) -> None:
    for path in ("/tasks/no-such-task", "/tasks/", "/tasks/a/b", "/tasks/no-such-task/events"):
        assert_error(await site.http.get(path), 404, ServerErrorCode.TASK_NOT_FOUND)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/tasks", "GET"), ("/tasks/1", "DELETE, GET"), ("/tasks/1/events", "GET"), ("/tasks/1/retry", "POST")],
)
async def test_each_path_names_its_own_methods(site: Site, path: str, allowed: str) -> None:
    response = await site.http.patch(path)
    assert_error(response, 405, ServerErrorCode.METHOD_NOT_ALLOWED)
    assert response.headers["allow"] == allowed


# The remaining time


async def test_the_remaining_time_follows_the_estimate_and_then_the_pace(site: Site) -> None:
    task_id = await site.task()
    estimate = 25
    assert (await site.get(f"/status/{task_id}"))["remaining_time"] == estimate
    site.bench.later(10)
    assert (await site.get(f"/status/{task_id}"))["remaining_time"] == estimate - 10
    await site.bench.take()
    site.bench.later(18)
    running_now = await site.get(f"/status/{task_id}")
    assert running_now["remaining_time"] is None, "the estimate has passed, and no pace is known"
    assert running_now["started_at"] == datetime.fromtimestamp(site.bench.clock.now - 20, UTC).isoformat().replace(
        "+00:00", "Z"
    )
    await site.bench.dispatcher.record_progress("w1", task_id, Progress(progress=40, stage=Stage.DENOISING))
    assert (await site.get(f"/status/{task_id}"))["remaining_time"] == 30, "40 % took 20 s"


# The retry


async def test_a_failed_task_is_queued_again_under_its_id(site: Site, bucket: BucketSettings) -> None:
    key = {"Idempotency-Key": "order 1"}
    task_id = await site.failed(**key)
    await site.bench.outbox.work_off()
    videos = Videos(Bucket(bucket))
    assert isinstance(await asyncio.to_thread(videos.find_verdict, task_id), Tombstone)
    for _ in range(2):  # the answer of the first may have been lost
        response = await site.http.post(f"/tasks/{task_id}/retry")
        assert response.status_code == 202
        assert (response.json()["task_id"], response.json()["status"]) == (task_id, "processing")
    assert await asyncio.to_thread(videos.find_verdict, task_id) is None, "a tombstone would stop the worker"
    assert await site.task(**key) == task_id, "the request is still the one that made the task"
    assert await site.bench.take() == task_id
    assert await site.bench.dispatcher.take("w2") is None
    await site.bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
    task = await site.get(f"/tasks/{task_id}")
    assert [one["error_code"] for one in task["events"]] == [None, None, "OOM_ERROR", None, None, None]


async def test_only_a_failed_task_can_be_retried(site: Site, bucket: BucketSettings) -> None:
    done, cancelled = await site.completed(), await site.task()
    await site.bench.queue.cancel(cancelled)
    forgotten = Tombstone.of("forgotten", OOM)
    await asyncio.to_thread(Videos(Bucket(bucket)).bury, forgotten)
    for task_id, words in ((done, "is completed"), (cancelled, "was cancelled"), ("forgotten", "has deleted")):
        response = await site.http.post(f"/tasks/{task_id}/retry")
        assert_error(response, 409, ServerErrorCode.NOT_RETRYABLE, words)
    assert_error(await site.http.post("/tasks/no-such-task/retry"), 404, ServerErrorCode.TASK_NOT_FOUND)


async def test_a_retry_counts_for_the_rate_limit_and_a_repeated_one_does_not(
    tmp_path: Path, bucket: BucketSettings
) -> None:
    async with running(f"sqlite:///{tmp_path}/queue.db", bucket, Access(rate_limit=2)) as site:
        first = await site.failed()
        for _ in range(3):
            assert (await site.http.post(f"/tasks/{first}/retry")).status_code == 202
        await site.bench.take()
        await site.bench.dispatcher.fail("w1", first, OOM)
        assert_error(await site.http.post(f"/tasks/{first}/retry"), 429, ServerErrorCode.RATE_LIMITED)


# The poster


async def test_the_poster_is_at_its_url_until_the_video_is_deleted(site: Site, bucket: BucketSettings) -> None:
    task_id = await site.completed()
    poster = (await site.get(f"/status/{task_id}"))["poster_url"]
    assert_error(await site.http.get(poster), 404, ServerErrorCode.VIDEO_NOT_READY)
    store = Bucket(bucket)
    await asyncio.to_thread(store.put_bytes, b"JPEG", layout.poster_key(task_id), content_type="image/jpeg")
    response = await site.http.get(poster)
    assert (response.status_code, response.content) == (200, b"JPEG")
    assert response.headers["content-type"] == "image/jpeg"
    etag = {"If-None-Match": response.headers["etag"]}
    assert (await site.http.get(poster, headers=etag)).status_code == 304
    assert (await site.http.delete(f"/videos/{task_id}.mp4")).status_code == 204
    assert_error(await site.http.get(poster), 404, ErrorCode.VIDEO_DELETED)
