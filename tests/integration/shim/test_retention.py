"""Videos are deleted by a client, by HUNYUAN_VIDEO_TTL and by `hunyuan prune`: with everything that belongs to them."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from pydantic import HttpUrl
from typer.testing import CliRunner, Result

from hunyuan.cli.main import app
from storage.bucket import Bucket
from storage.settings import BucketSettings
from storage.videos import Videos
from tests.support.queues import JOB, Bench, platform_bench, result
from tests.support.s3_servers import behind, new_bucket
from tests.support.service import Service, eventually

ATTEMPT = "0123456789ab"


@pytest.fixture(scope="module")
def settings(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


def store(bucket: Bucket, task_id: str, *, age: timedelta = timedelta()) -> None:
    """Stores a task's objects as a worker does, with a manifest of that age."""
    keys = {"video_key": f"videos/{task_id}/{ATTEMPT}.mp4", "poster_key": f"videos/{task_id}/{ATTEMPT}.jpg"}
    manifest = result(task_id).model_copy(update={**keys, "created_at": datetime.now(UTC) - age})
    for key in keys.values():
        bucket.put_bytes(b"bytes", key, content_type="video/mp4")
    Videos(bucket).put_manifest(manifest)


async def completed(bench: Bench, bucket: Bucket) -> str:
    """A task that the queue has as completed, and the bucket as well."""
    await bench.worker()
    await bench.queue.submit(JOB)
    task_id = await bench.take()
    store(bucket, task_id)
    manifest = Videos(bucket).find(task_id)
    assert manifest is not None
    assert await bench.dispatcher.complete("w1", task_id, manifest.model_dump(mode="json"))
    return task_id


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error_code"]


@pytest.mark.anyio
async def test_a_deleted_video_leaves_no_object_and_no_task_that_is_still_completed(
    settings: BucketSettings, database_url: str
) -> None:
    bucket = Bucket(settings)
    async with platform_bench(database_url, bucket=settings) as bench:
        task_id = await completed(bench, bucket)
        async with httpx.AsyncClient(base_url=bench.address) as http:
            deleted = await http.delete(f"/videos/{task_id}.mp4")
            assert (deleted.status_code, deleted.content) == (204, b"")
            assert bucket.list_keys(f"videos/{task_id}") == []
            for method in ("GET", "DELETE"):
                assert code(await http.request(method, f"/videos/{task_id}.mp4")) == (404, "VIDEO_DELETED")
            status = (await http.get(f"/status/{task_id}")).json()
            assert (status["status"], status["error_code"]) == ("failed", "VIDEO_DELETED")


@pytest.mark.anyio
async def test_a_late_worker_does_not_bring_a_deleted_video_back(settings: BucketSettings, database_url: str) -> None:
    bucket = Bucket(settings)
    async with platform_bench(database_url, bucket=settings) as bench:
        task_id = await completed(bench, bucket)
        async with httpx.AsyncClient(base_url=bench.address) as http:
            assert (await http.delete(f"/videos/{task_id}.mp4")).status_code == 204
            await bench.outbox.work_off()
            store(bucket, task_id)
            late = result(task_id).model_dump(mode="json")
            assert not await bench.dispatcher.complete("w2", task_id, late)
            await bench.outbox.work_off()
            assert bucket.list_keys(f"videos/{task_id}") == []
            assert (await http.get(f"/status/{task_id}")).json()["error_code"] == "VIDEO_DELETED"


@pytest.mark.anyio
async def test_a_video_is_deleted_later_if_the_bucket_is_unavailable(settings: BucketSettings, tmp_path: Path) -> None:
    bucket = Bucket(settings)
    with behind(settings) as proxy:
        proxied = settings.model_copy(update={"endpoint_url": HttpUrl(proxy.url)})
        async with platform_bench(f"sqlite:///{tmp_path}/q.sqlite3", bucket=proxied) as bench:
            task_id = await completed(bench, bucket)
            proxy.answer(503, "SlowDown", times=1000)
            async with httpx.AsyncClient(base_url=bench.address, timeout=60) as http:
                assert (await http.delete(f"/videos/{task_id}.mp4")).status_code == 204
                assert code(await http.get(f"/videos/{task_id}.mp4")) == (404, "VIDEO_DELETED")
            assert len(bucket.list_keys(f"videos/{task_id}")) == 3
            proxy.heal()
            await bench.outbox.work_off()
            assert bucket.list_keys(f"videos/{task_id}") == []


@pytest.mark.anyio
async def test_only_a_finished_video_can_be_deleted(settings: BucketSettings, tmp_path: Path) -> None:
    bucket = Bucket(settings)
    async with platform_bench(f"sqlite:///{tmp_path}/q.sqlite3", bucket=settings) as bench:
        store(bucket, "forgotten")
        await bench.worker()
        submission = await bench.queue.submit(JOB)
        async with httpx.AsyncClient(base_url=bench.address) as http:
            for path, expected in (
                ("unknown.mp4", (404, "TASK_NOT_FOUND")),
                ("unknown", (404, "NOT_FOUND")),
                ("..%2Fx.mp4", (404, "TASK_NOT_FOUND")),
                (f"{submission.task_id}.mp4", (404, "VIDEO_NOT_READY")),
            ):
                assert code(await http.delete(f"/videos/{path}")) == expected
            assert (await http.get(f"/status/{submission.task_id}")).json()["status"] == "processing"
            assert (await http.delete("/videos/forgotten.mp4")).status_code == 204
            assert code(await http.get("/status/forgotten")) == (404, "TASK_NOT_FOUND")
            assert bucket.list_keys("videos/forgotten") == []


def prune(service: Service, *arguments: str) -> Result:
    ours = [name for name in os.environ if name.startswith(("BUCKET_", "RUNPOD_", "HUNYUAN_"))]
    environment = {**dict.fromkeys(ours), "HUNYUAN_DATA_DIR": str(service.directory / "data")}
    return CliRunner().invoke(app, ["prune", *arguments], env=environment)


@pytest.mark.full
def test_the_server_deletes_old_videos_and_prune_deletes_them_with_and_without_a_server(tmp_path: Path) -> None:
    service = Service(tmp_path, HUNYUAN_WORKERS="0", HUNYUAN_VIDEO_TTL="3")
    try:
        service.start(until_ready=False)
        bucket = Bucket(service.embedded_bucket())
        store(bucket, "old")
        store(bucket, "young", age=-timedelta(hours=1))
        bucket.put_bytes(b"not ours", "videos/film.mp4", content_type="video/mp4")
        assert service.status("old")["status"] == "completed"
        eventually("the deletion", lambda: bucket.list_keys("videos/old") == [], 20)
        assert service.http.get("/videos/old.mp4").json()["error_code"] == "TASK_NOT_FOUND"
        assert service.status("young")["status"] == "completed"

        # Beside the server, which waits an hour now
        service.stop()
        service = Service(tmp_path, HUNYUAN_WORKERS="0")
        service.start(until_ready=False)
        bucket = Bucket(service.embedded_bucket())
        store(bucket, "older", age=timedelta(days=40))
        eventually("an age of a second", lambda: prune(service, "--older-than", "1s", "--dry-run").stdout == "older\n")
        assert len(bucket.list_keys("videos/older")) == 3, "a dry run deletes nothing"
        assert prune(service, "--older-than", "50d").stdout == ""
        assert prune(service, "--older-than", "1s").stdout == "older\n"
        assert bucket.list_keys("videos/older") == []

        # Without the server
        store(bucket, "oldest", age=timedelta(days=40))
        service.stop()
        eventually("an age of a second", lambda: prune(service, "--older-than", "1s").stdout == "oldest\n")
        service.start(until_ready=False)
        keys = Bucket(service.embedded_bucket()).list_keys("videos/")
        assert keys == [
            "videos/film.mp4",
            "videos/young.json",
            *(f"videos/young/{ATTEMPT}.{e}" for e in ("jpg", "mp4")),
        ]
    finally:
        service.http.close()
        assert service.stop() == 0, service.log.read_text()


@pytest.mark.parametrize("age", ["30", "d", "-1d", "1 month", ""])
def test_prune_names_a_wrong_age(tmp_path: Path, age: str) -> None:
    run = CliRunner().invoke(app, ["prune", "--older-than", age], env={"HUNYUAN_DATA_DIR": str(tmp_path)})
    assert run.exit_code == 2
    assert "30d" in run.output
    assert list(tmp_path.iterdir()) == []
