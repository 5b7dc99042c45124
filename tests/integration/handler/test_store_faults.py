"""A finished render and a bucket that has a bad minute: a real S3 server behind a proxy that breaks."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import HttpUrl, SecretStr

from contract.errors import ErrorCode
from contract.result import JobResult, Manifest, Progress, Stage
from handler.store import Patience
from handler.video_model.base import RenderCancelledError
from handler.worker import Job, JobError, Worker
from storage import layout
from storage.bucket import Bucket
from storage.errors import ObjectNotFoundError
from storage.settings import BucketSettings
from tests.support.disks import disk, fill
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.s3_servers import behind, juicefs
from tests.support.scripted_model import STEPS, ScriptedModel
from tests.support.service import eventually

TASK = "task-1"
KEYS = (layout.video_key(TASK), layout.poster_key(TASK), layout.manifest_key(TASK))
INPUT = {"prompt": "A paper boat on a rainy street", "duration": 5, "resolution": "720p"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketSettings]:
    with juicefs(tmp_path_factory.mktemp("juicefs")) as made:
        yield made


@pytest.fixture(scope="module")
def direct(server: BucketSettings) -> Bucket:
    """The bucket past the proxy."""
    return Bucket(server)


@dataclass
class Bench:
    """A worker whose bucket is behind a proxy; `at_last_step` is called when its render is all but finished."""

    proxy: FaultProxy
    settings: BucketSettings
    patience: Patience = field(default_factory=lambda: Patience(total=30.0, first=0.1, longest=0.5))
    timeout: float = 1.0
    at_last_step: Callable[[], None] = lambda: None
    model: ScriptedModel = field(default_factory=ScriptedModel)
    told: list[Progress] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    _healing: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.before_step = lambda step: self.at_last_step() if step == STEPS - 1 else None

    def run(self, **change: Any) -> JobResult:
        bucket = Bucket(self.settings.model_copy(update=change), timeout=self.timeout, attempts=1)
        return self.run_with(bucket)

    def run_with(self, bucket: Bucket, s3_config: dict[str, Any] | None = None) -> JobResult:
        worker = Worker(self.model, bucket, version="1", patience=self.patience)
        return worker.run(Job(TASK, INPUT, s3_config), self.told.append, self.cancelled)

    def once(self, what: str, look: Callable[[], object], act: Callable[[], object]) -> None:
        """Do `act` as soon as `look` is true, beside the job."""

        def run() -> None:
            eventually(what, look, 20)
            act()

        self._healing.append(threading.Thread(target=run))
        self._healing[-1].start()

    def end(self) -> None:
        for thread in self._healing:
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
        """The job in a thread of its own; the call waits for its end and gives what it raised."""
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
    for key in KEYS:
        direct.delete(key)


def stored(bucket: Bucket) -> set[str]:
    found = set()
    for key in KEYS:
        try:
            bucket.head(key)
        except ObjectNotFoundError:
            continue
        found.add(key)
    return found


def assert_whole(bucket: Bucket) -> Manifest:
    manifest = Manifest.model_validate_json(bucket.get_bytes(KEYS[2]))
    assert hashlib.sha256(bucket.get_bytes(KEYS[0])).hexdigest() == manifest.sha256
    assert stored(bucket) == set(KEYS)
    return manifest


def failure(run: Callable[[], object]) -> tuple[ErrorCode, str]:
    with pytest.raises(JobError) as caught:
        run()
    return caught.value.failure.error_code, caught.value.failure.error


# The bad minute ends: the finished render is stored, and was rendered once


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
def test_a_bucket_that_breaks_for_a_while_gets_the_finished_video(
    bench: Bench, direct: Bucket, caplog: pytest.LogCaptureFixture, faults: dict[str, Any]
) -> None:
    def break_for_a_while() -> None:
        bench.proxy.faults = Faults(**faults)
        bench.once("two failed tries", lambda: caplog.text.count("trying again") >= 2, bench.proxy.heal)

    bench.at_last_step = break_for_a_while
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
def test_what_a_busy_full_or_mistaken_server_refuses_is_offered_again(
    bench: Bench, direct: Bucket, status: int, code: str, extension: str
) -> None:
    bench.patience = Patience(total=20.0, first=0.02, longest=0.05)
    bench.proxy.answer(status, code, times=3, method="PUT", target=f".{extension}")
    bench.run()
    assert_whole(direct)
    assert bench.proxy.hits[code] == 3
    assert len(bench.model.rendered) == 1


def test_a_bucket_that_vanishes_and_is_made_again_gets_the_finished_video(
    bench: Bench, server: BucketSettings, caplog: pytest.LogCaptureFixture
) -> None:
    own = Bucket(server.model_copy(update={"name": "comes-and-goes"}))
    own.create()

    def vanish() -> None:
        own._client.delete_bucket(Bucket=own.name)
        bench.once("a failed try", lambda: "NoSuchBucket" in caplog.text, own.create)

    bench.at_last_step = vanish
    bench.run(name=own.name)
    assert_whole(own)


def test_a_slow_bucket_is_no_fault(bench: Bench, direct: Bucket) -> None:
    bench.timeout = 30
    bench.proxy.faults = Faults(latency=0.1, bandwidth=20_000)
    bench.run()
    assert_whole(direct)
    assert len([request for request in bench.proxy.requests if request.startswith("PUT")]) == 3


def test_while_it_waits_it_says_that_it_is_alive(bench: Bench) -> None:
    def storing() -> list[float]:
        return [progress.elapsed_time for progress in bench.told if progress.stage is Stage.STORING]

    bench.proxy.answer(503, "SlowDown", times=10_000, method="PUT")
    bench.once("the second time that it says so", lambda: len(storing()) >= 2, bench.proxy.heal)
    bench.run()
    assert 5 <= storing()[1] - storing()[0] < 20
    assert [progress.progress for progress in bench.told] == sorted(progress.progress for progress in bench.told)


def test_a_server_whose_disk_is_full_for_a_while_gets_the_finished_video(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with disk(tmp_path, 64) as directory, juicefs(directory) as full, behind(full) as proxy:
        bench = Bench(proxy, full.model_copy(update={"endpoint_url": HttpUrl(proxy.url)}))

        def fill_for_a_while() -> None:
            filler = fill(directory)
            bench.once("two failed tries", lambda: caplog.text.count("trying again") >= 2, filler.unlink)

        bench.at_last_step = fill_for_a_while
        bench.run()
        bench.end()
        assert_whole(Bucket(full))


# It does not end


def test_wrong_keys_fail_the_job_at_once_and_before_it_is_rendered(bench: Bench) -> None:
    started = time.monotonic()
    code, text = failure(lambda: bench.run(secret_access_key=SecretStr("not-the-secret")))
    assert code is ErrorCode.STORAGE_UNAVAILABLE
    assert "not-the-secret" not in text
    assert failure(lambda: bench.run(name="no-such-bucket"))[0] is ErrorCode.STORAGE_UNAVAILABLE
    assert time.monotonic() - started < 5
    assert bench.model.rendered == []


def test_a_jobs_own_bucket_is_named_and_not_insisted_on(bench: Bench, direct: Bucket) -> None:
    code, text = failure(lambda: bench.run_with(direct, bench.s3_config(accessSecret="wrong")))
    assert (code, text.startswith("The video could not be stored: s3Config:")) == (ErrorCode.STORAGE_UNAVAILABLE, True)
    assert text.endswith("(accessSecret)")
    assert bench.model.rendered == []
    bench.proxy.answer(403, "AccessDenied", times=100, method="PUT", target=".mp4")
    code, text = failure(lambda: bench.run_with(direct, bench.s3_config()))
    assert (code, "(accessId)" in text) == (ErrorCode.STORAGE_UNAVAILABLE, True)
    assert bench.proxy.hits["AccessDenied"] == 1


@pytest.mark.parametrize("extension", ["jpg", "json"])
def test_after_the_last_try_nothing_half_stored_is_left(bench: Bench, direct: Bucket, extension: str) -> None:
    bench.patience = Patience(total=0.3, first=0.1)
    bench.proxy.answer(503, "SlowDown", times=1000, method="PUT", target=f".{extension}")
    code, text = failure(bench.run)
    assert (code, text) == (ErrorCode.STORAGE_UNAVAILABLE, "The video could not be stored")
    assert bench.proxy.hits["SlowDown"] >= 2
    eventually("the removal of what was stored", lambda: not stored(direct), 10)
    bench.proxy.heal()
    bench.run()
    assert_whole(direct)


# Cancelled meanwhile


def cancelled_at_once(bench: Bench, ended: Callable[[], BaseException | None]) -> None:
    cancelled_at = time.monotonic()
    bench.cancelled.set()
    assert isinstance(ended(), RenderCancelledError)
    assert time.monotonic() - cancelled_at < 4


def test_a_cancelled_job_does_not_wait_for_a_bucket_that_is_away(
    bench: Bench, direct: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    bench.patience = Patience(total=60.0, first=30.0)
    bench.at_last_step = lambda: setattr(bench.proxy, "faults", Faults(refuse=True))
    with bench.running() as ended:
        eventually("a failed try", lambda: "trying again" in caplog.text, 20)
        cancelled_at_once(bench, ended)
    bench.proxy.heal()
    assert stored(direct) == set()


def test_what_a_cancelled_job_was_just_sending_is_removed_when_it_arrives(bench: Bench, direct: Bucket) -> None:
    bench.timeout = 30
    bench.proxy.faults = Faults(bandwidth=3000)  # slow enough to be caught at it
    upload = f"PUT /{direct.name}/{KEYS[0]}"
    with bench.running() as ended:
        eventually("the video's upload", lambda: upload in bench.proxy.requests, 20)
        bench.proxy.faults = Faults(stall=True)
        cancelled_at_once(bench, ended)
    bench.proxy.heal()
    eventually("its removal", lambda: upload.replace("PUT", "DELETE") in bench.proxy.requests, 10)
    eventually("nothing in the bucket", lambda: not stored(direct), 10)


def test_a_job_that_is_cancelled_between_two_objects_leaves_none(bench: Bench, direct: Bucket) -> None:
    bench.proxy.answer(503, "SlowDown", times=1000, method="PUT", target=".jpg")
    with bench.running() as ended:
        eventually("the poster's first try", lambda: bench.proxy.hits["SlowDown"], 20)
        assert stored(direct) == {KEYS[0]}
        bench.cancelled.set()
        assert isinstance(ended(), RenderCancelledError)
    eventually("the removal of the video", lambda: not stored(direct), 10)


# Another worker has the same job


def test_what_another_worker_stored_meanwhile_stays_and_is_the_result(
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


def test_a_cancelled_worker_does_not_remove_what_another_one_finished(bench: Bench, direct: Bucket) -> None:
    bench.proxy.answer(503, "SlowDown", times=1000, method="PUT", target=".jpg")
    with bench.running() as ended:
        eventually("the poster's first try", lambda: bench.proxy.hits["SlowDown"], 20)
        Worker(ScriptedModel(), direct, version="theirs").run(Job(TASK, INPUT), lambda _: None, threading.Event())
        looks = bench.proxy.requests.count(f"GET /{direct.name}/{KEYS[2]}")
        bench.cancelled.set()
        assert isinstance(ended(), RenderCancelledError)
    manifest_again = f"GET /{direct.name}/{KEYS[2]}"
    eventually("a look for the manifest", lambda: bench.proxy.requests.count(manifest_again) > looks, 10)
    assert assert_whole(direct).version == "theirs"
    assert not [request for request in bench.proxy.requests if request.startswith("DELETE")]
