"""Storing a finished video while the bucket fails: a real S3 server behind a proxy that injects faults."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from pydantic import HttpUrl, SecretStr

from contract.errors import ErrorCode, JobFailure
from contract.result import JobResult, Manifest, Progress, Stage, Tombstone
from contract.retry import RetryPolicy
from handler.video_model.base import RenderCancelledError
from handler.worker import Job, JobError, Worker
from storage import layout
from storage.bucket import Bucket
from storage.settings import BucketSettings
from storage.videos import Videos
from tests.support.disks import disk, fill
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.full import full
from tests.support.s3_servers import behind, juicefs, new_bucket
from tests.support.scripted_model import STEPS, ScriptedModel
from tests.support.service import eventually

pytestmark = pytest.mark.usefixtures("small_videos")

TASK = "task-1"
MANIFEST = layout.manifest_key(TASK)
INPUT = {"prompt": "A paper boat on a rainy street", "duration": 5, "resolution": "720p"}


@pytest.fixture(scope="module")
def server(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@pytest.fixture(scope="module")
def direct(server: BucketSettings) -> Bucket:
    """The bucket without the proxy."""
    return Bucket(server)


@dataclass
class Bench:
    """A worker whose bucket is behind a proxy. `at_last_step` is called before the last denoising step."""

    proxy: FaultProxy
    settings: BucketSettings
    policy: RetryPolicy = field(default_factory=lambda: RetryPolicy(total=30.0, first=0.1, longest=0.5))
    timeout: float = 1.0
    at_last_step: Callable[[], object] = lambda: None
    model: ScriptedModel = field(default_factory=ScriptedModel)
    reports: list[Progress] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.before_step = lambda step: self.at_last_step() if step == STEPS - 1 else None

    def run(self, **change: Any) -> JobResult:
        bucket = Bucket(self.settings.model_copy(update=change), timeout=self.timeout, attempts=1)
        return self.run_with(bucket)

    def run_with(self, bucket: Bucket, s3_config: dict[str, Any] | None = None) -> JobResult:
        worker = Worker(self.model, bucket, version="1", store_policy=self.policy)
        return worker.run(Job(TASK, INPUT, s3_config), self.reports.append, self.cancelled)

    def once(self, what: str, condition: Callable[[], object], act: Callable[[], object]) -> None:
        """Call `act` in a thread as soon as `condition` is true."""

        def run() -> None:
            eventually(what, condition, 20)
            act()

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def end(self) -> None:
        for thread in self._threads:
            thread.join()
        self.proxy.heal()

    def s3_config(self, **fields: str) -> dict[str, str]:
        return {
            "endpointUrl": self.proxy.url,
            "accessId": self.settings.access_key_id,
            "accessSecret": self.settings.secret_access_key.get_secret_value(),
            "bucketName": self.settings.name,
            **fields,
        }

    @contextmanager
    def running(self) -> Iterator[Callable[[], BaseException | None]]:
        """Runs the job in a thread. The call waits for its end and returns what it raised."""
        raised: list[BaseException] = []

        def run() -> None:
            try:
                self.run()
            except (JobError, RenderCancelledError) as exc:
                raised.append(exc)

        thread = threading.Thread(target=run)

        def ended() -> BaseException | None:
            thread.join(20)
            assert not thread.is_alive()
            return raised[0] if raised else None

        thread.start()
        try:
            yield ended
        finally:
            thread.join()


@pytest.fixture
def bench(server: BucketSettings, direct: Bucket) -> Iterator[Bench]:
    with behind(server) as proxy:
        bench = Bench(proxy, server.model_copy(update={"endpoint_url": HttpUrl(proxy.url)}))
        yield bench
        bench.end()
    Videos(direct).discard(TASK)


def stored(bucket: Bucket) -> set[str]:
    return set(bucket.list_keys(f"videos/{TASK}"))


def extensions(bucket: Bucket) -> list[str]:
    return sorted(PurePosixPath(key).suffix for key in stored(bucket))


def assert_whole(bucket: Bucket) -> Manifest:
    """The bucket has one attempt's objects, and its manifest."""
    manifest = Manifest.model_validate_json(bucket.get_bytes(MANIFEST))
    assert hashlib.sha256(bucket.get_bytes(manifest.video_key)).hexdigest() == manifest.sha256
    assert stored(bucket) == {*manifest.object_keys, MANIFEST}
    return manifest


def failure(run: Callable[[], object]) -> tuple[ErrorCode, str]:
    with pytest.raises(JobError) as caught:
        run()
    return caught.value.failure.error_code, caught.value.failure.error


# The fault ends: the finished video is stored, and was rendered once


@pytest.mark.parametrize(
    "faults",
    [
        {"refuse": True},
        {"stall": True},
        {"reset_up_after": 1500},
        {"reset_down_after": 0},
        {"truncate_after": 10},
    ],
    ids=lambda faults: next(iter(faults)),
)
def test_a_bucket_that_recovers_gets_the_finished_video(
    bench: Bench, direct: Bucket, caplog: pytest.LogCaptureFixture, faults: dict[str, Any]
) -> None:
    def break_until_retried() -> None:
        bench.proxy.faults = Faults(**faults)
        bench.once("two failed attempts", lambda: caplog.text.count("failed, retrying in") >= 2, bench.proxy.heal)

    bench.at_last_step = break_until_retried
    bench.run()
    assert_whole(direct)
    assert len(bench.model.rendered) == 1


@pytest.mark.parametrize(
    ("status", "code", "extension"),
    [
        (503, "SlowDown", "mp4"),
        (500, "InternalError", "jpg"),
        (507, "XMinioStorageFull", "mp4"),
        (403, "InvalidAccessKeyId", "json"),
    ],
)
def test_a_request_that_a_busy_or_full_server_refuses_is_retried(
    bench: Bench, direct: Bucket, status: int, code: str, extension: str
) -> None:
    bench.policy = RetryPolicy(total=20.0, first=0.02, longest=0.05)
    bench.proxy.answer(status, code, times=3, method="PUT", target=f".{extension}")
    bench.run()
    assert_whole(direct)
    assert bench.proxy.hits[code] == 3
    assert len(bench.model.rendered) == 1


def test_a_bucket_that_is_deleted_and_created_again_gets_the_finished_video(
    bench: Bench, server: BucketSettings, caplog: pytest.LogCaptureFixture
) -> None:
    own = Bucket(server.model_copy(update={"name": "comes-and-goes"}))
    own.create()

    def delete_bucket() -> None:
        own._client.delete_bucket(Bucket=own.name)
        bench.once("a failed attempt", lambda: "NoSuchBucket" in caplog.text, own.create)

    bench.at_last_step = delete_bucket
    bench.run(name=own.name)
    assert_whole(own)


def test_a_slow_bucket_needs_no_retry(bench: Bench, direct: Bucket) -> None:
    bench.timeout = 30
    bench.proxy.faults = Faults(latency=0.1, bandwidth=50_000)
    bench.run()
    assert_whole(direct)
    assert len([request for request in bench.proxy.requests if request.startswith("PUT")]) == 4


def test_progress_is_reported_again_while_the_upload_is_retried(bench: Bench) -> None:
    def storing() -> list[float]:
        return [progress.elapsed_time for progress in bench.reports if progress.stage is Stage.STORING]

    bench.proxy.answer(503, "SlowDown", times=10_000, method="PUT")
    bench.once("the second report", lambda: len(storing()) >= 2, bench.proxy.heal)
    bench.run()
    assert 5 <= storing()[1] - storing()[0] < 20
    assert [progress.progress for progress in bench.reports] == sorted(progress.progress for progress in bench.reports)


def test_a_server_whose_disk_was_full_gets_the_finished_video(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with disk(tmp_path, 64) as directory, juicefs(directory) as full, behind(full) as proxy:
        bench = Bench(proxy, full.model_copy(update={"endpoint_url": HttpUrl(proxy.url)}))

        def fill_until_retried() -> None:
            filler = fill(directory)
            bench.once("two failed attempts", lambda: caplog.text.count("failed, retrying in") >= 2, filler.unlink)

        bench.at_last_step = fill_until_retried
        bench.run()
        bench.end()
        assert_whole(Bucket(full))


# The fault lasts


def test_a_full_disk_is_named_in_the_task_and_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with disk(tmp_path, 64) as directory, juicefs(directory) as full, behind(full) as proxy:
        bench = Bench(proxy, full.model_copy(update={"sync_directory": directory}), RetryPolicy(total=1.0, first=0.1))
        bench.at_last_step = lambda: fill(directory)
        code, text = failure(bench.run)
        bench.end()
    assert (code, text) == (
        ErrorCode.STORAGE_UNAVAILABLE,
        "The video could not be stored: the disk of the bucket is full",
    )
    assert "the disk of the S3 server is full: free space on it" in caplog.text


def test_wrong_keys_fail_the_job_at_once_and_before_it_is_rendered(bench: Bench) -> None:
    started = time.monotonic()
    code, text = failure(lambda: bench.run(secret_access_key=SecretStr("not-the-secret")))
    assert code is ErrorCode.STORAGE_UNAVAILABLE
    assert "not-the-secret" not in text
    assert failure(lambda: bench.run(name="no-such-bucket"))[0] is ErrorCode.STORAGE_UNAVAILABLE
    assert time.monotonic() - started < 5
    assert bench.model.rendered == []


def test_a_jobs_own_bucket_is_named_and_a_denial_is_not_retried(bench: Bench, direct: Bucket) -> None:
    code, text = failure(lambda: bench.run_with(direct, bench.s3_config(accessSecret="wrong")))
    assert (code, text.startswith("The video could not be stored: s3Config:")) == (ErrorCode.STORAGE_UNAVAILABLE, True)
    assert text.endswith("(accessSecret)")
    assert bench.model.rendered == []
    bench.proxy.answer(403, "AccessDenied", times=100, method="PUT", target=".mp4")
    code, text = failure(lambda: bench.run_with(direct, bench.s3_config()))
    assert (code, "(accessId)" in text) == (ErrorCode.STORAGE_UNAVAILABLE, True)
    assert bench.proxy.hits["AccessDenied"] == 1


@pytest.mark.parametrize("extension", [full("jpg"), "json"])
def test_after_the_last_attempt_uploaded_objects_are_deleted(bench: Bench, direct: Bucket, extension: str) -> None:
    bench.policy = RetryPolicy(total=0.3, first=0.1)
    bench.proxy.answer(503, "SlowDown", times=1000, method="PUT", target=f".{extension}")
    code, text = failure(bench.run)
    assert (code, text) == (ErrorCode.STORAGE_UNAVAILABLE, "The video could not be stored")
    assert bench.proxy.hits["SlowDown"] >= 2
    eventually("the deletion of the uploaded objects", lambda: not stored(direct), 10)
    bench.proxy.heal()
    bench.run()
    assert_whole(direct)


# The job is cancelled


def assert_cancelled_soon(bench: Bench, ended: Callable[[], BaseException | None]) -> None:
    cancelled_at = time.monotonic()
    bench.cancelled.set()
    assert isinstance(ended(), RenderCancelledError)
    assert time.monotonic() - cancelled_at < 4


def test_a_cancelled_job_does_not_wait_for_an_unavailable_bucket(
    bench: Bench, direct: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    bench.policy = RetryPolicy(total=60.0, first=30.0)
    bench.at_last_step = lambda: setattr(bench.proxy, "faults", Faults(refuse=True))
    with bench.running() as ended:
        eventually("a failed attempt", lambda: "failed, retrying in" in caplog.text, 20)
        assert_cancelled_soon(bench, ended)
    bench.proxy.heal()
    assert stored(direct) == set()


def test_an_upload_that_finishes_after_the_cancellation_is_deleted(bench: Bench, direct: Bucket) -> None:
    bench.timeout = 30
    bench.proxy.faults = Faults(bandwidth=3000)  # slow enough to be cancelled during the upload

    def uploads() -> list[str]:
        return [request for request in bench.proxy.requests if request.startswith("PUT") and ".mp4" in request]

    with bench.running() as ended:
        upload = eventually("the video's upload", uploads, 20)[0]
        bench.proxy.faults = Faults(stall=True)
        assert_cancelled_soon(bench, ended)
    bench.proxy.heal()
    eventually("its deletion", lambda: upload.replace("PUT", "DELETE") in bench.proxy.requests, 10)
    eventually("nothing in the bucket", lambda: not stored(direct), 10)


def test_a_job_that_is_cancelled_between_two_objects_leaves_neither(bench: Bench, direct: Bucket) -> None:
    bench.proxy.answer(503, "SlowDown", times=1000, method="PUT", target=".jpg")
    with bench.running() as ended:
        eventually("the poster's first attempt", lambda: bench.proxy.hits["SlowDown"], 20)
        assert extensions(direct) == [".mp4"]
        bench.cancelled.set()
        assert isinstance(ended(), RenderCancelledError)
    eventually("the deletion of the video", lambda: not stored(direct), 10)


# Another worker runs the same job


def test_the_video_that_another_worker_stored_first_stays_and_is_the_result(
    bench: Bench, server: BucketSettings, direct: Bucket
) -> None:
    theirs: list[JobResult] = []

    def store_theirs() -> None:
        worker = Worker(ScriptedModel(), direct, version="theirs")
        theirs.append(worker.run(Job(TASK, INPUT), lambda _: None, threading.Event()))

    bench.at_last_step = store_theirs
    result = bench.run()
    assert result.version == "theirs"
    assert Manifest.model_validate(result.model_dump()) == assert_whole(direct)
    assert not [request for request in bench.proxy.requests if request.startswith("PUT")]


def test_a_cancelled_worker_does_not_delete_the_video_that_another_one_completed(bench: Bench, direct: Bucket) -> None:
    bench.policy = RetryPolicy(total=60.0, first=30.0)  # no retry finds the other's manifest before the cancellation
    bench.proxy.answer(503, "SlowDown", times=1000, method="PUT", target=".jpg")
    with bench.running() as ended:
        eventually("the poster's first attempt", lambda: bench.proxy.hits["SlowDown"], 20)
        Worker(ScriptedModel(), direct, version="theirs").run(Job(TASK, INPUT), lambda _: None, threading.Event())
        bench.cancelled.set()
        assert isinstance(ended(), RenderCancelledError)
    eventually("the deletion of its own video", lambda: len(stored(direct)) == 4, 10)
    assert assert_whole(direct).version == "theirs"


# The task ended before


def test_a_task_with_a_tombstone_is_not_rendered_and_reports_its_failure(bench: Bench, direct: Bucket) -> None:
    cancelled = JobFailure(error="The task was cancelled", error_code=ErrorCode.CANCELLED)
    Videos(direct).bury(Tombstone.of(TASK, cancelled, cancelled=True))
    assert failure(bench.run) == (cancelled.error_code, cancelled.error)
    assert bench.model.rendered == []


def test_a_task_that_gets_a_tombstone_during_its_render_stores_nothing(bench: Bench, direct: Bucket) -> None:
    given_up = JobFailure(error="The worker was lost 3 times", error_code=ErrorCode.GENERATION_FAILED)
    bench.at_last_step = lambda: Videos(direct).bury(Tombstone.of(TASK, given_up))
    assert failure(bench.run) == (given_up.error_code, given_up.error)
    assert stored(direct) == {MANIFEST}
    assert not [request for request in bench.proxy.requests if request.startswith("PUT")]
