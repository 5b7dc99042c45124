"""The API reference through HTTP: every status code, error code and limit, on a real queue and a real bucket."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text, update

from contract.errors import ErrorCode, JobFailure
from contract.result import Progress, Stage
from contract.worker import Gpu, WorkerState
from shim.app import create_app
from shim.errors import AnyErrorCode, ServerErrorCode
from shim.queue.schema import workers
from storage import layout
from storage.bucket import Bucket
from storage.errors import ObjectNotFoundError
from storage.settings import BucketSettings
from tests.support.http_server import serving
from tests.support.queues import JOB, NOWHERE, Bench, empty, result, sql_bench
from tests.support.s3_servers import new_bucket

REQUEST = JOB.wire()
VIDEO = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def bucket_settings(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@dataclass
class Server:
    """The server, its queue with a ready worker, its bucket, and a client."""

    bench: Bench
    bucket: Bucket
    http: httpx.AsyncClient
    app: Any

    async def generate(self, headers: Mapping[str, str] | None = None, **fields: Any) -> httpx.Response:
        return await self.http.post("/generate", json={**REQUEST, **fields}, headers=headers)

    async def task(self) -> str:
        response = await self.generate()
        assert response.status_code == 202, response.text
        task_id: str = response.json()["task_id"]
        return task_id

    async def status(self, task_id: str) -> dict[str, Any]:
        response = await self.http.get(f"/status/{task_id}")
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def finished(self, video: bytes = VIDEO) -> str:
        """A task whose video is in the bucket."""
        task_id = await self.task()
        await self.bench.take()
        output = result(task_id).model_copy(
            update={"file_size": len(video), "sha256": hashlib.sha256(video).hexdigest()}
        )
        await asyncio.to_thread(self.bucket.put_bytes, video, layout.video_key(task_id), content_type="video/mp4")
        body = output.model_dump_json().encode()
        await asyncio.to_thread(
            self.bucket.put_bytes, body, layout.manifest_key(task_id), content_type="application/json"
        )
        await self.bench.dispatcher.complete("w1", task_id, output.model_dump(mode="json"))
        return task_id


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory, bucket_settings: BucketSettings) -> AsyncIterator[Server]:
    async with running(tmp_path_factory.mktemp("queue"), Bucket(bucket_settings)) as made:
        yield made


@pytest.fixture
async def server(shared: Server) -> Server:
    """The module's server with an empty queue and a ready worker."""
    await empty(shared.bench.database)
    await shared.bench.worker()
    return shared


@asynccontextmanager
async def running(directory: Path, bucket: Bucket, **options: Any) -> AsyncIterator[Server]:
    async with sql_bench(f"sqlite:///{directory}/queue.sqlite3", max_queue_size=10) as bench:
        app = create_app(bench.queue, bucket, **options)
        async with serving(app) as address, httpx.AsyncClient(base_url=address, timeout=30) as http:
            yield Server(bench, bucket, http, app)


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def assert_error(response: httpx.Response, status: int, code: AnyErrorCode, *words: str) -> None:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error", "error_code"}
    assert response.json()["error_code"] == code
    for word in words:
        assert word in response.json()["error"]


# 202 and its body


async def test_a_task_is_accepted_with_an_estimate(server: Server) -> None:
    response = await server.generate(duration=10, resolution="1080p")
    assert response.status_code == 202
    body = response.json()
    assert set(body) == {"task_id", "status", "estimated_time"}
    assert body["status"] == "processing"
    assert 60 <= body["estimated_time"] <= 90, "the reference's value for 1080p and 10 s"
    second = (await server.generate(duration=10, resolution="1080p")).json()
    assert second["estimated_time"] > body["estimated_time"], "it waits behind the first"


async def test_only_the_prompt_is_needed(server: Server) -> None:
    assert (await server.http.post("/generate", json={"prompt": "x" * 10})).status_code == 202
    delivery = await server.bench.dispatcher.take("w1")
    assert delivery is not None
    assert delivery.input == {
        "prompt": "x" * 10,
        "duration": 10,
        "resolution": "1080p",
        "model": "HunyuanVideo-1.5",
        "aspect_ratio": "16:9",
    }


async def test_the_prompt_is_trimmed(server: Server) -> None:
    assert (await server.generate(prompt="  \n" + "y" * 500 + "  ")).status_code == 202
    delivery = await server.bench.dispatcher.take("w1")
    assert delivery is not None
    assert delivery.input["prompt"] == "y" * 500


# The same request again


async def test_a_request_that_is_sent_again_with_its_key_makes_one_task(server: Server) -> None:
    responses = [await server.generate(headers={"Idempotency-Key": "order 1"}) for _ in range(3)]
    assert [response.status_code for response in responses] == [202] * 3
    assert len({response.json()["task_id"] for response in responses}) == 1
    other = await server.generate(headers={"Idempotency-Key": "order 2"})
    assert other.json()["task_id"] != responses[0].json()["task_id"]


async def test_an_idempotency_key_that_is_reused_for_another_request_is_409(server: Server) -> None:
    await server.generate(headers={"Idempotency-Key": "order 1"})
    response = await server.generate(duration=6, headers={"Idempotency-Key": "order 1"})
    assert_error(response, 409, ServerErrorCode.IDEMPOTENCY_KEY_REUSED)
    for key in ("", "x" * 256):
        response = await server.generate(headers={"Idempotency-Key": key})
        assert_error(response, 400, ErrorCode.INVALID_REQUEST, "Idempotency-Key")


# Cancel


async def test_a_waiting_task_is_cancelled_and_never_starts(server: Server) -> None:
    task_id = await server.task()
    response = await server.http.delete(f"/tasks/{task_id}")
    assert response.status_code == 200
    assert response.json() == (await server.http.get(f"/status/{task_id}")).json()
    assert (response.json()["status"], response.json()["error_code"]) == ("failed", "CANCELLED")
    assert await server.bench.dispatcher.take("w1") is None
    assert_error(await server.http.get(f"/videos/{task_id}.mp4"), 404, ServerErrorCode.VIDEO_NOT_READY)


async def test_cancelling_a_running_task_deletes_its_objects(server: Server) -> None:
    task_id = await server.task()
    await server.bench.take()
    await asyncio.to_thread(server.bucket.put_bytes, b"...", layout.video_key(task_id), content_type="video/mp4")
    assert (await server.http.delete(f"/tasks/{task_id}")).json()["error_code"] == "CANCELLED"
    with pytest.raises(ObjectNotFoundError):
        await asyncio.to_thread(server.bucket.get_bytes, layout.video_key(task_id))
    assert await server.bench.dispatcher.pending_cancellations("w1") == [task_id]


async def test_cancelling_a_finished_task_changes_nothing(server: Server) -> None:
    task_id = await server.finished()
    assert (await server.http.delete(f"/tasks/{task_id}")).json()["status"] == "completed"
    assert (await server.http.get(f"/videos/{task_id}.mp4")).content == VIDEO


@pytest.mark.parametrize("task_id", ["no-such-task", "..%2f..%2fetc%2fpasswd", "%00", "x" * 300])
async def test_cancelling_an_unknown_task_is_404(server: Server, task_id: str) -> None:
    assert_error(await server.http.delete(f"/tasks/{task_id}"), 404, ServerErrorCode.TASK_NOT_FOUND)


# 400, one code for each field


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        *(({"prompt": prompt}, "INVALID_PROMPT") for prompt in ("", " " * 40, "x" * 9, "x" * 501, "é" * 501, 3, None)),
        *(({"prompt": prompt}, "INVALID_PROMPT") for prompt in (["a list of words"], "nul\0inside the prompt", True)),
        *(
            ({"duration": value}, "INVALID_DURATION")
            for value in (4, 11, 0, -5, "5", 5.0, 5.5, True, None, [5], 10**30)
        ),
        *(({"resolution": value}, "INVALID_RESOLUTION") for value in ("480p", "", "1080P", 1080, None, ["720p"])),
        *(({"model": value}, "INVALID_MODEL") for value in ("HunyuanVideo-2", "", 1.5, None)),
        *(({"seed": value}, "INVALID_REQUEST") for value in (-1, 2**32, "1", 1.5, True)),
        *(({"aspect_ratio": value}, "INVALID_REQUEST") for value in ("21:9", 1.78, None)),
        *(({"num_inference_steps": value}, "INVALID_REQUEST") for value in (0, 101, "8", 8.0)),
        *(({"guidance_scale": value}, "INVALID_REQUEST") for value in (0.5, 21, "high", "4", True)),
        *(({"negative_prompt": value}, "INVALID_REQUEST") for value in ("x" * 501, 3, "nul\0")),
        ({"seed_": 1}, "INVALID_REQUEST"),
    ],
)
async def test_invalid_parameters_are_400_with_their_code(server: Server, fields: dict[str, Any], code: str) -> None:
    response = await server.generate(**fields)
    assert_error(response, 400, ErrorCode(code))
    if code == "INVALID_REQUEST":
        assert next(iter(fields)) in response.json()["error"]
    if code == "INVALID_MODEL":
        assert "HunyuanVideo-1.5" in response.json()["error"]
    assert (await server.bench.queue.summary()).waiting == 0


async def test_a_model_without_weights_is_rejected_with_the_names_of_the_others(server: Server) -> None:
    await server.bench.worker(models=("HunyuanVideo-1.5", "HunyuanVideo-1.5-fast"))
    assert (await server.generate(model="HunyuanVideo-1.5-fast")).status_code == 202
    response = await server.generate(model="HunyuanVideo-1.5-quality")
    assert_error(response, 400, ErrorCode.INVALID_MODEL, '"HunyuanVideo-1.5"', '"HunyuanVideo-1.5-fast"')
    assert (await server.http.get("/health")).json()["models"] == ["HunyuanVideo-1.5", "HunyuanVideo-1.5-fast"]


async def test_optional_parameters_reach_the_worker(server: Server) -> None:
    fields: dict[str, Any] = {
        "aspect_ratio": "9:16",
        "seed": 7,
        "negative_prompt": "blurry",
        "num_inference_steps": 8,
        "guidance_scale": 4.5,
    }
    assert (await server.generate(**fields)).status_code == 202
    delivery = await server.bench.dispatcher.take("w1")
    assert delivery is not None
    assert delivery.input == {**REQUEST, **fields}


async def test_a_missing_prompt_is_an_invalid_prompt(server: Server) -> None:
    assert_error(await server.http.post("/generate", json={}), 400, ErrorCode.INVALID_PROMPT)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b"null", b"3", b"\xff\xfe", b"[" * 60_000, b'{"prompt": "\xff"}']
)
async def test_a_body_that_is_not_a_json_object_is_an_invalid_request(server: Server, body: bytes) -> None:
    response = await server.http.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert_error(response, 400, ErrorCode.INVALID_REQUEST)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_with_another_content_type_is_an_invalid_request(server: Server, media_type: str) -> None:
    headers = {"Content-Type": media_type} if media_type else {}
    response = await server.http.post("/generate", content=json.dumps(REQUEST).encode(), headers=headers)
    assert_error(response, 400, ErrorCode.INVALID_REQUEST, "application/json")


# 413


@pytest.mark.parametrize("size", [64 * 1024 + 1, 900_000, 5_000_000])
async def test_a_body_over_64_kib_is_413(server: Server, size: int) -> None:
    body = json.dumps({**REQUEST, "prompt": "x" * size}).encode()
    try:
        response = await server.http.post("/generate", content=body, headers={"Content-Type": "application/json"})
    except httpx.WriteError:
        assert size > 1_000_000, "a client that sends far too much may be cut off"
    else:
        assert_error(response, 413, ServerErrorCode.REQUEST_TOO_LARGE)


async def test_a_body_of_exactly_64_kib_is_accepted(server: Server) -> None:
    body = json.dumps(REQUEST).encode().ljust(64 * 1024)
    response = await server.http.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 202


# 503


async def test_the_eleventh_waiting_task_is_rejected(server: Server) -> None:
    for _ in range(10):
        assert (await server.generate()).status_code == 202
    response = await server.generate()
    assert_error(response, 503, ServerErrorCode.QUEUE_FULL, "10")
    assert int(response.headers["retry-after"]) > 0
    await server.bench.take()
    assert (await server.generate()).status_code == 202, "one runs, ten wait"


async def test_tasks_are_rejected_until_the_model_is_loaded(tmp_path: Path, bucket_settings: BucketSettings) -> None:
    async with running(tmp_path, Bucket(bucket_settings)) as server:
        response = await server.generate()
        assert_error(response, 503, ServerErrorCode.MODEL_NOT_LOADED)
        assert int(response.headers["retry-after"]) > 0
        await server.bench.worker(state=WorkerState.LOADING)
        assert_error(await server.generate(), 503, ServerErrorCode.MODEL_NOT_LOADED, "loading")
        assert (await server.http.get("/ready")).status_code == 503
        await server.bench.worker(state=WorkerState.FAILED, error="no such checkpoint")
        assert_error(await server.generate(), 503, ServerErrorCode.MODEL_NOT_LOADED, "no such checkpoint")
        assert (await server.http.get("/health")).json()["model_loaded"] is False
        await server.bench.worker(state=WorkerState.READY)
        assert (await server.generate()).status_code == 202
        assert (await server.http.get("/ready")).json() == {"status": "ready"}


# GET /status


async def test_a_waiting_and_a_running_task_are_processing(server: Server) -> None:
    task_id = await server.task()
    assert await server.status(task_id) == {
        "task_id": task_id,
        "status": "processing",
        "progress": 0,
        "elapsed_time": 0,
        "stage": "queued",
        "queue_position": 1,
        "started_at": None,
        "remaining_time": 25,
    }
    await server.bench.take()
    await server.bench.dispatcher.record_progress("w1", task_id, Progress(progress=65, stage=Stage.DENOISING))
    server.bench.later(28)
    assert await server.status(task_id) == {
        "task_id": task_id,
        "status": "processing",
        "progress": 65,
        "elapsed_time": 30,
        "stage": "denoising",
        "queue_position": None,
        "started_at": moment(server.bench.clock.now - 30),
        "remaining_time": 17,  # 65 % took 30 s
    }


async def test_a_completed_task_has_its_video(server: Server) -> None:
    task_id = await server.finished()
    status = await server.status(task_id)
    address = f"{server.http.base_url}/videos/{task_id}".replace("//videos", "/videos")
    assert status == {
        "task_id": task_id,
        "status": "completed",
        "video_url": f"{address}.mp4",
        "duration": 5,
        "resolution": "720p",
        "file_size": len(VIDEO),
        "poster_url": f"{address}.jpg",
        "prompt": JOB.prompt,
        "model": "scripted",
        "seed": 1,
        "created_at": status["created_at"],
        "timings": {"total": 30.0},
    }
    assert abs(datetime.fromisoformat(status["created_at"]).timestamp() - time.time()) < 300


@pytest.mark.parametrize(
    "failure",
    [
        JobFailure(error="Out of memory: reduce resolution or duration", error_code=ErrorCode.OOM_ERROR),
        JobFailure(error="Video generation failed", error_code=ErrorCode.GENERATION_FAILED),
        JobFailure(error="The video could not be stored", error_code=ErrorCode.STORAGE_UNAVAILABLE),
    ],
)
async def test_a_failed_task_is_200_with_its_error(server: Server, failure: JobFailure) -> None:
    task_id = await server.task()
    await server.bench.take()
    await server.bench.dispatcher.fail("w1", task_id, failure)
    assert await server.status(task_id) == {
        "task_id": task_id,
        "status": "failed",
        "error": failure.error,
        "error_code": failure.error_code,
    }
    assert_error(await server.http.get(f"/videos/{task_id}.mp4"), 404, ServerErrorCode.VIDEO_NOT_READY, failure.error)


async def test_a_cancelled_task_has_failed(server: Server) -> None:
    task_id = await server.task()
    await server.bench.queue.cancel(task_id)
    assert (await server.status(task_id))["error_code"] == "CANCELLED"


@pytest.mark.parametrize(
    "task_id",
    ["uuid-1234-5678", "00000000-0000-0000-0000-000000000000", "..%2f..%2fetc", "a" * 300, "%00", "a.b", "é", "%ff"],
)
async def test_an_unknown_or_malformed_id_is_404(server: Server, task_id: str) -> None:
    assert_error(await server.http.get(f"/status/{task_id}"), 404, ServerErrorCode.TASK_NOT_FOUND)
    assert_error(await server.http.get(f"/videos/{task_id}.mp4"), 404, ServerErrorCode.TASK_NOT_FOUND)


async def test_while_the_queue_is_unavailable_a_status_is_503_and_videos_are_served(
    tmp_path: Path, bucket_settings: BucketSettings
) -> None:
    """A video is stored before its task is completed, so a status from the bucket alone could be wrong."""
    async with running(tmp_path, Bucket(bucket_settings)) as server:
        await server.bench.worker()
        task_id = await server.finished()
        async with server.bench.database.write() as connection:
            await connection.execute(text("DROP TABLE jobs"))
        assert_error(await server.http.get(f"/status/{task_id}"), 503, ServerErrorCode.QUEUE_UNAVAILABLE)
        assert (await server.http.get(f"/videos/{task_id}.mp4")).content == VIDEO
        assert_error(await server.http.get("/videos/no-such-task.mp4"), 503, ServerErrorCode.QUEUE_UNAVAILABLE)


async def test_a_task_that_the_queue_has_forgotten_is_found_in_the_bucket(
    server: Server, tmp_path: Path, bucket_settings: BucketSettings
) -> None:
    task_id = await server.finished()
    before = await server.status(task_id)
    (tmp_path / "other").mkdir()
    async with running(tmp_path / "other", Bucket(bucket_settings)) as other:
        after = await other.status(task_id)
        own_address = {"video_url": "", "poster_url": ""}
        assert {**after, **own_address} == {**before, **own_address}
        assert (await other.http.get(after["video_url"])).content == VIDEO


async def test_an_invalid_manifest_is_not_a_task(server: Server) -> None:
    key = layout.manifest_key("odd")
    await asyncio.to_thread(server.bucket.put_bytes, b"{}", key, content_type="application/json")
    assert_error(await server.http.get("/status/odd"), 404, ServerErrorCode.TASK_NOT_FOUND)


async def test_video_url_follows_the_request_or_the_setting(
    server: Server, tmp_path: Path, bucket_settings: BucketSettings
) -> None:
    task_id = await server.finished()
    response = await server.http.get(f"/status/{task_id}", headers={"Host": "videos.example:8443"})
    assert response.json()["video_url"] == f"http://videos.example:8443/videos/{task_id}.mp4"
    (tmp_path / "other").mkdir()
    bucket = Bucket(bucket_settings)
    async with running(tmp_path / "other", bucket, public_url="https://films.example/api/") as other:
        assert (await other.status(task_id))["video_url"] == f"https://films.example/api/videos/{task_id}.mp4"


# GET /videos


async def test_a_video_has_its_bytes_and_headers(server: Server) -> None:
    task_id = await server.finished()
    response = await server.http.get(f"/videos/{task_id}.mp4")
    assert response.status_code == 200
    assert response.content == VIDEO
    headers = response.headers
    assert headers["content-type"] == "video/mp4"
    assert headers["content-length"] == str(len(VIDEO))
    assert headers["accept-ranges"] == "bytes"
    assert headers["etag"] == f'"{hashlib.sha256(VIDEO).hexdigest()}"'
    assert f'filename="{task_id}.mp4"' in headers["content-disposition"]
    head = await server.http.head(f"/videos/{task_id}.mp4")
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length", "accept-ranges", "etag", "content-disposition"):
        assert head.headers[name] == headers[name]


SIZE = len(VIDEO)


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-99", 0, 99),
        ("bytes=100-", 100, SIZE - 1),
        ("bytes=-100", SIZE - 100, SIZE - 1),
        (f"bytes=5-{SIZE * 2}", 5, SIZE - 1),
        (f"bytes=-{SIZE * 2}", 0, SIZE - 1),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE - 1),
    ],
)
async def test_a_range_is_206_with_its_bytes(server: Server, asked: str, start: int, end: int) -> None:
    task_id = await server.finished()
    response = await server.http.get(f"/videos/{task_id}.mp4", headers={"Range": asked})
    assert response.status_code == 206
    assert response.content == VIDEO[start : end + 1]
    assert response.headers["content-range"] == f"bytes {start}-{end}/{SIZE}"
    assert response.headers["content-length"] == str(end - start + 1)


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"])
async def test_a_range_after_the_end_is_416_with_the_size(server: Server, asked: str) -> None:
    task_id = await server.finished()
    response = await server.http.get(f"/videos/{task_id}.mp4", headers={"Range": asked})
    assert_error(response, 416, ServerErrorCode.RANGE_NOT_SATISFIABLE)
    assert response.headers["content-range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize("asked", ["bytes=9-5", "bytes=a-b", "lines=0-5", "bytes=0-1,5-6", "bytes=-", ""])
async def test_an_invalid_range_is_ignored(server: Server, asked: str) -> None:
    task_id = await server.finished()
    response = await server.http.get(f"/videos/{task_id}.mp4", headers={"Range": asked})
    assert (response.status_code, response.content) == (200, VIDEO)


async def test_the_range_of_a_head_request_is_ignored(server: Server) -> None:
    task_id = await server.finished()
    for asked in ("bytes=0-9", f"bytes={SIZE}-"):
        response = await server.http.head(f"/videos/{task_id}.mp4", headers={"Range": asked})
        assert (response.status_code, response.headers["content-length"]) == (200, str(SIZE))


async def test_a_matching_if_none_match_is_304(server: Server) -> None:
    task_id = await server.finished()
    etag = (await server.http.head(f"/videos/{task_id}.mp4")).headers["etag"]
    for tags in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        response = await server.http.get(f"/videos/{task_id}.mp4", headers={"If-None-Match": tags})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == etag
    response = await server.http.get(f"/videos/{task_id}.mp4", headers={"If-None-Match": '"other"'})
    assert response.status_code == 200


async def test_a_range_of_another_version_gets_the_whole_video(server: Server) -> None:
    task_id = await server.finished()
    etag = (await server.http.head(f"/videos/{task_id}.mp4")).headers["etag"]
    for condition, status in ((etag, 206), ('"other"', 200), (f"W/{etag}", 200), ("Sat, 01 Jan 2022", 200)):
        headers = {"Range": "bytes=0-9", "If-Range": condition}
        assert (await server.http.get(f"/videos/{task_id}.mp4", headers=headers)).status_code == status


async def test_the_video_of_an_unfinished_task_is_404(server: Server) -> None:
    task_id = await server.task()
    assert_error(await server.http.get(f"/videos/{task_id}.mp4"), 404, ServerErrorCode.VIDEO_NOT_READY)
    assert (await server.http.head(f"/videos/{task_id}.mp4")).status_code == 404


async def test_a_video_that_was_deleted_from_the_bucket_is_404(server: Server) -> None:
    task_id = await server.finished()
    await asyncio.to_thread(server.bucket.delete, layout.video_key(task_id))
    assert_error(await server.http.get(f"/videos/{task_id}.mp4"), 404, ServerErrorCode.VIDEO_NOT_READY)
    assert (await server.http.head(f"/videos/{task_id}.mp4")).status_code == 404


@pytest.mark.parametrize("name", ["x", "x.mov", "x.mp4.exe", ".mp4x"])
async def test_a_name_that_does_not_end_in_mp4_is_404(server: Server, name: str) -> None:
    assert_error(await server.http.get(f"/videos/{name}"), 404, ServerErrorCode.NOT_FOUND)


async def test_an_unavailable_bucket_makes_videos_503_and_nothing_else(tmp_path: Path) -> None:
    async with running(tmp_path, Bucket(NOWHERE)) as server:
        await server.bench.worker()
        task_id = await server.task()
        await server.bench.take()
        await server.bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
        assert (await server.status(task_id))["status"] == "completed"
        for method in ("GET", "HEAD"):
            response = await server.http.request(method, f"/videos/{task_id}.mp4")
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
        assert_error(await server.http.get(f"/videos/{task_id}.mp4"), 503, ErrorCode.STORAGE_UNAVAILABLE)
        assert_error(await server.http.get("/ready"), 503, ErrorCode.STORAGE_UNAVAILABLE)
        assert (await server.http.get("/health")).status_code == 200


# GET /health


async def test_health_has_the_documented_fields_and_the_gpu_that_workers_report(server: Server) -> None:
    gpu = Gpu(name="H100", memory_total=80 * 1024**3, memory_free=int(18.5 * 1024**3))
    await server.bench.worker(gpu=gpu)
    health = (await server.http.get("/health")).json()
    documented = {name: health[name] for name in ("status", "model_loaded", "gpu_available", "vram_free", "version")}
    assert documented == {
        "status": "healthy",
        "model_loaded": True,
        "gpu_available": True,
        "vram_free": "18.5 GB",
        "version": "1.5.0",
    }
    assert health["model"] == "scripted"


async def test_health_names_the_provider_the_licence_and_no_affiliation(tmp_path: Path) -> None:
    for options, provider in (({}, None), ({"provider": "Example Films Ltd"}, "Example Films Ltd")):
        directory = tmp_path / str(provider)
        directory.mkdir()
        async with running(directory, Bucket(NOWHERE), **options) as server:
            health = (await server.http.get("/health")).json()
        assert health["provider"] == provider
        assert health["licence"].endswith("/HunyuanVideo-1.5/blob/main/LICENSE")
        assert "generated by AI" in health["notice"]
        assert "not affiliated" in health["notice"]


async def test_health_is_200_if_a_workers_report_cannot_be_read(server: Server) -> None:
    async with server.bench.database.write() as connection:
        await connection.execute(update(workers).values(report={"state": "a state of a later release"}))
    response = await server.http.get("/health")
    assert (response.status_code, response.json()["status"]) == (200, "degraded")


async def test_health_names_the_adapters_and_a_request_with_another_one_is_400(server: Server) -> None:
    assert (await server.http.get("/health")).json()["loras"] == []
    await server.bench.worker(loras=("film", "anime"))
    assert (await server.http.get("/health")).json()["loras"] == ["anime", "film"]
    unknown = REQUEST | {"loras": [{"name": "noir", "scale": 0.5}]}
    response = await server.http.post("/generate", json=unknown)
    assert_error(response, 400, ErrorCode.INVALID_REQUEST)
    assert response.json()["error"] == 'loras: there is no adapter "noir"; the workers have "anime", "film"'
    accepted = await server.http.post("/generate", json=REQUEST | {"loras": [{"name": "film"}]})
    task = (await server.http.get(f"/tasks/{accepted.json()['task_id']}")).json()
    assert task["input"]["loras"] == [{"name": "film", "scale": 1.0}]


async def test_health_without_a_gpu(server: Server) -> None:
    health = (await server.http.get("/health")).json()
    assert (health["gpu_available"], health["vram_free"]) == (False, "0.0 GB")


# Other errors and the OpenAPI document


async def test_an_unexpected_error_is_500_without_a_traceback(server: Server) -> None:
    def broken() -> None:
        raise ZeroDivisionError("secret detail")

    server.app.add_api_route("/broken", broken, include_in_schema=False)
    response = await server.http.get("/broken")
    assert_error(response, 500, ServerErrorCode.INTERNAL_ERROR)
    assert "secret detail" not in response.text


async def test_unknown_paths_and_methods_have_documented_errors(server: Server) -> None:
    assert_error(await server.http.get("/nothing"), 404, ServerErrorCode.NOT_FOUND)
    response = await server.http.get("/generate")
    assert_error(response, 405, ServerErrorCode.METHOD_NOT_ALLOWED)
    assert response.headers["allow"] == "POST"


async def test_openapi_describes_exactly_this(server: Server) -> None:
    schema = (await server.http.get("/openapi.json")).json()
    assert {path: sorted(methods) for path, methods in schema["paths"].items()} == {
        "/generate": ["post"],
        "/images": ["post"],
        "/status/{task_id}": ["get"],
        "/tasks": ["get"],
        "/tasks/{task_id}": ["delete", "get"],
        "/tasks/{task_id}/events": ["get"],
        "/tasks/{task_id}/preview.jpg": ["get"],
        "/tasks/{task_id}/retry": ["post"],
        "/health": ["get"],
        "/ready": ["get"],
        "/videos/{file_name}": ["delete", "get", "head"],
    }
    post = schema["paths"]["/generate"]["post"]
    assert set(post["responses"]) == {"202", "400", "401", "408", "409", "413", "429", "500", "503"}
    body = post["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["duration"] == {
        "default": 10,
        "description": "Video length in seconds.",
        "maximum": 10,
        "minimum": 5,
        "title": "Duration",
        "type": "integer",
    }
    assert (await server.http.get("/docs")).status_code == 200
