"""The bucket agrees with the queue about how each task ended: the outbox, and the scan for orphans, on a real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime

import pytest
from pydantic import HttpUrl

from contract.errors import ErrorCode, JobFailure
from contract.result import Manifest, Tombstone, Verdict
from shim.queue.job import JobState
from shim.queue.orphans import Orphans
from shim.queue.outbox import Outbox
from shim.queue.sql import SqlQueue
from shim.tasks import StoredVideos
from storage import layout
from storage.bucket import Bucket
from storage.settings import BucketSettings
from storage.videos import Videos
from tests.support.queues import JOB, Bench, add_history, result, sql_bench
from tests.support.s3_servers import behind, client_of, new_bucket

OOM = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)
A, B = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


@pytest.fixture(scope="module")
def store(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@pytest.fixture
def videos(store: BucketSettings) -> Iterator[Videos]:
    yield Videos(client_of(store))
    for key in client_of(store).list_keys(""):
        client_of(store).delete(key)


@pytest.fixture
async def bench(database_url: str, store: BucketSettings) -> AsyncIterator[Bench]:
    async with sql_bench(database_url, bucket=store) as made:
        await made.worker()
        yield made


def orphans(bench: Bench, store: BucketSettings, grace: float = 0.0) -> Orphans:
    """A scan whose steps follow each other without a wait, three objects each."""
    objects = StoredVideos(client_of(store))
    return Orphans(bench.database, objects, page=3, step_seconds=0, scan_seconds=0, grace=grace)


async def scan(bench: Bench, store: BucketSettings, grace: float = 0.0) -> None:
    search = orphans(bench, store, grace)
    for _ in range(12):
        await search.step()
    bench.later(10)
    await bench.outbox.work_off()


async def task(bench: Bench) -> str:
    task_id = (await bench.queue.submit(JOB)).task_id
    assert await bench.take() == task_id
    return task_id


def manifest(task_id: str, attempt: str) -> Manifest:
    keys = {
        "video_key": layout.video_key(task_id, attempt),
        "poster_key": layout.poster_key(task_id, attempt),
        "sheet_key": layout.sheet_key(task_id, attempt),
    }
    return Manifest.model_validate({**result(task_id).model_dump(), **keys})


def store_attempt(store: BucketSettings, task_id: str, attempt: str, verdict: Verdict | None = None) -> None:
    """What a worker stores; `verdict` overwrites the one that is there, as on a store without conditional writes."""
    bucket = client_of(store)
    bucket.put_bytes(attempt.encode(), layout.video_key(task_id, attempt), content_type="video/mp4")
    for key in (layout.poster_key(task_id, attempt), layout.sheet_key(task_id, attempt)):
        bucket.put_bytes(attempt.encode(), key, content_type="image/jpeg")
    if verdict is not None:
        body = verdict.model_dump_json().encode()
        bucket.put_bytes(body, layout.manifest_key(task_id), content_type="application/json")


def files(store: BucketSettings, task_id: str) -> list[str]:
    return [key.removeprefix(f"videos/{task_id}") for key in client_of(store).list_keys(f"videos/{task_id}")]


async def stored_result(bench: Bench, task_id: str) -> Manifest:
    job = await bench.queue.get(task_id)
    assert job is not None
    assert job.result is not None
    assert job.result.video_key == layout.video_key(task_id, B)
    return job.result


async def completed_by_b(bench: Bench, store: BucketSettings) -> str:
    task_id = await task(bench)
    done = manifest(task_id, B)
    store_attempt(store, task_id, B, done)
    await bench.dispatcher.complete("w1", task_id, done.model_dump(mode="json"))
    return task_id


async def test_a_second_result_of_a_completed_task_is_removed_and_the_first_manifest_restored(
    bench: Bench, store: BucketSettings, videos: Videos
) -> None:
    task_id = await completed_by_b(bench, store)
    late = manifest(task_id, A)
    store_attempt(store, task_id, A, late)
    assert not await bench.dispatcher.complete("w2", task_id, late.model_dump(mode="json"))
    await bench.outbox.work_off()
    assert files(store, task_id) == [".json", f"/{B}.jpg", f"/{B}.mp4", f"/{B}.sheet.jpg"]
    assert videos.find(task_id) == await stored_result(bench, task_id)


async def test_a_worker_killed_after_it_replaced_the_manifest_is_found_by_the_scan(
    bench: Bench, store: BucketSettings, videos: Videos
) -> None:
    task_id = await completed_by_b(bench, store)
    store_attempt(store, task_id, A, manifest(task_id, A))
    await scan(bench, store)
    assert files(store, task_id) == [".json", f"/{B}.jpg", f"/{B}.mp4", f"/{B}.sheet.jpg"]
    assert videos.find(task_id) == await stored_result(bench, task_id)


async def test_a_manifest_over_a_tombstone_is_found_by_the_scan(
    bench: Bench, store: BucketSettings, videos: Videos
) -> None:
    task_id = await task(bench)
    await bench.queue.cancel(task_id)
    await bench.outbox.work_off()
    store_attempt(store, task_id, A, manifest(task_id, A))
    await scan(bench, store)
    assert files(store, task_id) == [".json"]
    verdict = videos.find_verdict(task_id)
    assert isinstance(verdict, Tombstone)
    assert verdict.status == "cancelled"


async def test_the_scan_leaves_running_tasks_young_objects_and_other_files_alone(
    bench: Bench, store: BucketSettings, videos: Videos
) -> None:
    running = await task(bench)
    store_attempt(store, running, A)
    store_attempt(store, "unknown-completed", B, manifest("unknown-completed", B))
    store_attempt(store, "unknown-completed", A)
    store_attempt(store, "unknown-lost", A)
    others = ["videos/old-layout.mp4", "videos/holiday/beach.mp4", "elsewhere/x.mp4"]
    for key in others:
        client_of(store).put_bytes(b"x", key, content_type="video/mp4")
    before = client_of(store).list_keys("")
    await scan(bench, store, grace=3600)
    assert client_of(store).list_keys("") == before
    await scan(bench, store, grace=-1)
    assert files(store, running) == [f"/{A}.jpg", f"/{A}.mp4", f"/{A}.sheet.jpg"]
    assert files(store, "unknown-completed") == [".json", f"/{B}.jpg", f"/{B}.mp4", f"/{B}.sheet.jpg"]
    assert files(store, "unknown-lost") == []
    assert set(others) <= set(client_of(store).list_keys(""))


async def test_a_completed_task_whose_video_was_deleted_gets_no_manifest_back(
    bench: Bench, store: BucketSettings, videos: Videos
) -> None:
    task_id = await completed_by_b(bench, store)
    videos.discard(task_id)
    store_attempt(store, task_id, A)
    await scan(bench, store)
    assert files(store, task_id) == []


async def test_the_end_of_a_task_is_stored_when_the_bucket_is_back(
    bench: Bench, store: BucketSettings, videos: Videos
) -> None:
    with behind(store) as proxy:
        away = Bucket(store.model_copy(update={"endpoint_url": HttpUrl(proxy.url)}), timeout=1, attempts=1)
        outbox = Outbox(bench.database, StoredVideos(away))
        task_id = await task(bench)
        store_attempt(store, task_id, A)
        await bench.dispatcher.fail("w1", task_id, OOM)
        with proxy.broken(refuse=True):
            await outbox.work_off()
            bench.later(30 * 24 * 3600)
            await bench.dispatcher.sweep()
            assert await bench.queue.get(task_id) is not None, "the queue remembers a task that is in the outbox"
            await outbox.work_off()
        bench.later(10)
        await outbox.work_off()
    assert files(store, task_id) == [".json"]
    verdict = videos.find_verdict(task_id)
    assert isinstance(verdict, Tombstone)
    assert verdict.failure == OOM
    await bench.dispatcher.sweep()
    assert await bench.queue.get(task_id) is None


async def test_a_failed_task_that_is_retried_has_no_tombstone(
    bench: Bench, store: BucketSettings, videos: Videos
) -> None:
    assert isinstance(bench.queue, SqlQueue)
    task_id = await task(bench)
    await bench.dispatcher.fail("w1", task_id, OOM)
    await bench.outbox.work_off()
    assert videos.find_verdict(task_id) is not None
    await bench.outbox.reopen(task_id)
    assert videos.find_verdict(task_id) is None
    await asyncio.gather(*(bench.outbox.work_off() for _ in range(3)))
    assert videos.find_verdict(task_id) is None, "nobody buries a task that is about to be retried"
    assert await bench.queue.retry(task_id)
    await bench.outbox.work_off()
    await scan(bench, store)
    assert videos.find_verdict(task_id) is None
    assert await bench.take() == task_id


async def test_a_retry_that_does_not_follow_its_preparation_leaves_the_task_failed(
    bench: Bench, store: BucketSettings, videos: Videos
) -> None:
    task_id = await task(bench)
    await bench.dispatcher.fail("w1", task_id, OOM)
    await bench.outbox.work_off()
    await bench.outbox.reopen(task_id)
    bench.later(200)
    await bench.outbox.work_off()
    assert isinstance(videos.find_verdict(task_id), Tombstone)


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
async def test_several_servers_work_the_outbox_off_together(
    bench: Bench, store: BucketSettings, videos: Videos
) -> None:
    task_ids = []
    for _ in range(9):
        task_ids.append(await task(bench))
        await bench.dispatcher.fail("w1", task_ids[-1], OOM)
    await asyncio.gather(*(bench.outbox.work_off() for _ in range(3)))
    assert all(videos.find_verdict(task_id) for task_id in task_ids)
    async with bench.database.read() as connection:
        left = await connection.exec_driver_sql("SELECT count(*) FROM jobs WHERE bucket_due_at IS NOT NULL")
        assert left.scalar() == 0


async def test_a_step_of_the_scan_costs_the_same_for_any_number_of_jobs(
    bench: Bench, store: BucketSettings, videos: Videos
) -> None:
    await completed_by_b(bench, store)
    await add_history(bench.database, 20_000)
    started = asyncio.get_running_loop().time()
    search = orphans(bench, store)
    for _ in range(10):
        await search.step()
        await bench.outbox.work_off()
    assert asyncio.get_running_loop().time() - started < 5


def test_a_manifest_of_an_older_release_names_the_keys_of_its_task() -> None:
    old = manifest("task-1", A).model_dump(mode="json", exclude={"video_key", "poster_key", "sheet_key"})
    assert (read := Manifest.model_validate(old)).video_key == "videos/task-1.mp4"
    assert (read.poster_key, read.sheet_key) == ("videos/task-1.jpg", None)


@pytest.mark.parametrize("key", ["videos/other.mp4", "secrets/key", "videos/task-10/a.mp4", "videos/task-1"])
def test_a_manifest_that_names_objects_of_another_task_is_invalid(key: str) -> None:
    with pytest.raises(ValueError, match="keys of the task"):
        Manifest.model_validate({**manifest("task-1", A).model_dump(), "video_key": key})
    with pytest.raises(ValueError, match="keys of the task"):
        Manifest.model_validate({**manifest("task-1", A).model_dump(), "sheet_key": key})


def test_a_tombstone_is_read_back(store: BucketSettings, videos: Videos) -> None:
    tombstone = Tombstone(
        task_id="t", status="failed", error="why", error_code=ErrorCode.OOM_ERROR, ended_at=datetime.now(UTC)
    )
    videos.bury(tombstone)
    assert videos.find_verdict("t") == tombstone
    assert videos.find("t") is None
    assert JobState(tombstone.status) is JobState.FAILED
