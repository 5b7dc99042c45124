"""Renders that hang: in this process, and in a worker process with a server."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from contract.errors import ErrorCode
from contract.job import JobInput, Resolution
from contract.result import JobResult
from contract.retry import RetryPolicy
from contract.worker import WorkerExit
from handler.serverless import make_handler
from handler.video_model.base import RenderCancelledError
from handler.watchdog import Limits, Watchdog
from handler.worker import Job, RenderStalledError, Worker
from storage.bucket import Bucket
from storage.settings import BucketSettings
from storage.videos import Videos
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.s3_servers import behind, new_bucket
from tests.support.scripted_model import STEPS, ScriptedModel
from tests.support.service import Service, eventually, running_service, running_without_workers
from tests.support.worker_process import WorkerProcess

pytestmark = pytest.mark.usefixtures("small_videos")

INPUT = {"prompt": "A paper boat on a rainy street", "duration": 5, "resolution": "720p"}
TOKEN = "a-token-of-the-tests"
#: Seconds that a worker may take to start or to react, on a busy machine.
DEADLINE = 90.0
#: HUNYUAN_WORKER_TIMEOUT. A worker reports every 5 s.
LEASE = 15.0


@pytest.fixture(scope="module")
def settings(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@dataclass
class Bench:
    """A worker in this process."""

    bucket: Bucket
    work_dir: Path
    model: ScriptedModel = field(default_factory=ScriptedModel)
    stalls: list[str | None] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def worker(self, stall_timeout: float = 1.0, render_timeout: float | None = None) -> Worker:
        watchdog = Watchdog(
            stall_timeout=stall_timeout,
            render_timeout=render_timeout,
            on_stall=self.stalls.append,
            on_stuck=self.stuck.append,
        )
        policy = RetryPolicy(first=0.1, longest=0.5, total=30)
        return Worker(
            self.model, self.bucket, version="1", work_dir=self.work_dir, store_policy=policy, watchdog=watchdog
        )

    def run(self, worker: Worker, task_id: str) -> JobResult:
        return worker.run(Job(task_id, INPUT), lambda _: None, self.cancelled)

    def stop_ffmpeg_once(self) -> None:
        """ffmpeg is stopped after its third chunk of frames."""

        def before_frames(left: int) -> None:
            if left < 100:
                self.model.before_frames = lambda _: None
                ffmpeg(psutil.Process()).suspend()

        self.model.before_frames = before_frames


def ffmpeg(parent: psutil.Process) -> psutil.Process:
    def look() -> psutil.Process | None:
        for process in parent.children(recursive=True):
            try:
                if "ffmpeg" in process.name() and "pipe:0" in process.cmdline():
                    return process
            except psutil.Error:
                continue
        return None

    return eventually("ffmpeg's start", look, DEADLINE)


@pytest.fixture
def bench(settings: BucketSettings, tmp_path: Path) -> Bench:
    return Bench(Bucket(settings, timeout=5, attempts=1), tmp_path)


def test_a_stopped_ffmpeg_ends_the_render_and_the_next_one_works(bench: Bench) -> None:
    bench.stop_ffmpeg_once()
    worker = bench.worker()
    with pytest.raises(RenderStalledError, match="made no progress for 1 s") as caught:
        bench.run(worker, "stopped")
    assert caught.value.failure.error_code is ErrorCode.GENERATION_FAILED
    assert [reason is None for reason in bench.stalls] == [False, True], "stopped, and then ready again"
    assert bench.stuck == []
    assert not list(bench.work_dir.rglob("*.mp4"))
    assert not [child for child in psutil.Process().children() if "ffmpeg" in child.name()]
    bench.cancelled.clear()
    assert bench.run(worker, "next").status == "completed"


def test_a_cancelled_render_does_not_wait_for_a_stopped_ffmpeg(bench: Bench) -> None:
    def stop_ffmpeg_and_cancel(_: int) -> None:
        bench.model.before_frames = lambda _: None
        threading.Timer(1.0, bench.cancelled.set).start()
        ffmpeg(psutil.Process()).suspend()

    bench.model.before_frames = lambda left: stop_ffmpeg_and_cancel(left) if left < 100 else None
    started = time.monotonic()
    with pytest.raises(RenderCancelledError):
        bench.run(bench.worker(stall_timeout=60), "cancelled")
    assert time.monotonic() - started < 20
    assert bench.stalls == []


def test_a_step_that_never_returns_is_reported_as_stuck(bench: Bench) -> None:
    released = threading.Event()
    bench.model.before_step = lambda step: None if step == 0 else (released.wait(60), None)[1]
    raised: list[BaseException] = []

    def run() -> None:
        try:
            bench.run(bench.worker(), "stuck")
        except RenderStalledError as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    eventually("the watchdog's verdict", lambda: bench.stuck, 20)
    assert bench.stuck == ["The render made no progress for 1 s"]
    released.set()
    thread.join(20)
    assert len(raised) == 1


def test_a_render_that_takes_too_long_is_stopped_although_it_makes_progress(bench: Bench) -> None:
    bench.model.before_step = lambda _: time.sleep(0.6)
    with pytest.raises(RenderStalledError, match="took longer than 1 s"):
        bench.run(bench.worker(stall_timeout=30, render_timeout=1), "endless")


def test_a_slow_render_is_not_stopped(bench: Bench) -> None:
    bench.model.before_step = lambda _: time.sleep(0.6)
    bench.model.before_frames = lambda left: time.sleep(0.6 if left > 80 else 0)
    started = time.monotonic()
    assert bench.run(bench.worker(), "slow").status == "completed"
    assert time.monotonic() - started > 0.6 * (STEPS + 3)
    assert bench.stalls == []


def test_a_bucket_that_is_away_for_longer_does_not_stop_the_task(bench: Bench, settings: BucketSettings) -> None:
    with behind(settings) as proxy:
        bench.bucket = Bucket(proxied(settings, proxy), timeout=5, attempts=1)

        def break_bucket(step: int) -> None:
            if step == STEPS - 1:
                proxy.faults = Faults(refuse=True)
                threading.Timer(4.0, proxy.heal).start()

        bench.model.before_step = break_bucket
        assert bench.run(bench.worker(), "away").status == "completed"
    assert bench.stalls == []


def test_a_manifest_that_arrives_after_its_render_was_stopped_completes_the_task(
    settings: BucketSettings, tmp_path: Path
) -> None:
    """The task goes back to the queue, which has not cancelled it."""
    direct = Bucket(settings)
    with behind(settings) as proxy:
        proxy.stall_at("PUT", ".json")
        bench = Bench(Bucket(proxied(settings, proxy), attempts=1), tmp_path)
        with pytest.raises(RenderStalledError):
            bench.run(bench.worker(), "late")
        proxy.heal()
        eventually("the end of the discarding", lambda: "discard" not in {t.name for t in threading.enumerate()})
    manifest = Videos(direct).find("late")
    assert manifest is not None, "no tombstone took its place"
    assert direct.list_keys(manifest.video_key, limit=1)
    second = Bench(direct, tmp_path)
    assert second.run(second.worker(), "late").sha256 == manifest.sha256
    assert second.model.rendered == []


def test_a_slow_upload_tells_of_its_bytes(settings: BucketSettings, tmp_path: Path) -> None:
    file = tmp_path / "video.mp4"
    file.write_bytes(os.urandom(8_000_000))
    sent: list[tuple[float, int]] = []
    with behind(settings) as proxy:
        proxy.faults = Faults(bandwidth=4_000_000)
        bucket = Bucket(proxied(settings, proxy), timeout=30, attempts=1)
        bucket.put_file(
            file,
            "videos/slow.mp4",
            content_type="video/mp4",
            on_bytes=lambda count: sent.append((time.monotonic(), count)),
        )
    assert sum(count for _, count in sent) >= 8_000_000
    assert sent[-1][0] - sent[0][0] > 0.2


def proxied(settings: BucketSettings, proxy: FaultProxy) -> BucketSettings:
    return BucketSettings.model_validate({**settings.model_dump(), "endpoint_url": proxy.url})


async def test_without_our_server_a_stalled_render_fails_its_task(bench: Bench) -> None:
    bench.stop_ffmpeg_once()
    output = await make_handler(bench.worker(), send_progress=False)({"id": "on-runpod", "input": INPUT})
    assert "GENERATION_FAILED" in output["error"]
    assert "made no progress for 1 s" in output["error"]


def test_a_large_video_has_more_time_for_each_step() -> None:
    small = Limits.of(job(5, Resolution.P720), is_demo=False)
    large = Limits.of(job(10, Resolution.P1080), is_demo=False)
    assert small.step == small.stall == large.stall == 300
    # Pixels and frames enter with their squares, as attention does.
    assert large.step == pytest.approx(300 * (2.25 * 2) ** 2, rel=0.05)
    assert large.render > 60 * large.step / 5
    few = JobInput.model_validate({**INPUT, "num_inference_steps": 4})
    assert Limits.of(few, is_demo=False).render < small.render
    assert Limits.of(job(10, Resolution.P1080), is_demo=True).step == 300


def job(duration: int, resolution: Resolution) -> JobInput:
    return JobInput(prompt=INPUT["prompt"], duration=duration, resolution=resolution)


# With a server


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server that starts no workers."""
    settings = {"HUNYUAN_PLATFORM_TOKEN": TOKEN, "HUNYUAN_WORKER_TIMEOUT": str(LEASE)}
    with running_without_workers(tmp_path_factory.mktemp("service"), **settings) as running:
        yield running


@contextmanager
def worker_of(service: Service, directory: Path, worker_id: str, *arguments: str) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(
        directory, service.embedded_bucket(), platform=service.address, token=TOKEN, worker_id=worker_id
    )
    worker.start(*arguments)
    try:
        eventually("a ready worker", lambda: service.http.get("/health").json()["model_loaded"], DEADLINE)
        yield worker
    finally:
        if worker.process is not None:
            worker.kill()
        service.http.post(
            f"/v2/local/worker-report/{worker_id}",
            json={"state": "stopped", "model": ""},
            headers={"Authorization": TOKEN},
        )


def is_ready(service: Service) -> bool:
    return service.http.get("/ready").status_code == 200


@pytest.mark.full
def test_a_task_whose_ffmpeg_is_stopped_is_rendered_again(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUNYUAN_STALL_TIMEOUT", "3")
    with worker_of(service, tmp_path, "ffmpeg", "--frame-seconds", "0.2") as worker:
        first, second = service.generate(), service.generate()
        ffmpeg(psutil.Process(worker.pid)).suspend()
        assert service.finished(first, 60)["status"] == "completed"
        assert service.finished(second, 60)["status"] == "completed"
        assert worker.renders().count(first) == 2
        assert is_ready(service)
        assert "The render made no progress for 3 s" in worker.log.read_text()


def test_a_worker_whose_render_never_ends_exits_and_its_task_goes_to_another(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUNYUAN_STALL_TIMEOUT", "3")
    hang = tmp_path / "hang"
    hang.touch()
    with worker_of(service, tmp_path, "stuck", "--hang", str(hang)) as worker:
        task_id = service.generate()
        eventually("the render", worker.renders, DEADLINE)
        eventually("readiness to end", lambda: not is_ready(service), 20)
        assert "The render made no progress for 3 s" in service.http.get("/ready").text
        assert worker.wait(30) == WorkerExit.RENDER_STUCK, worker.log.read_text()
        assert "before_step" in worker.log.read_text(), "the log shows where the thread is"
        eventually("the task's return to the queue", lambda: service.status(task_id)["queue_position"] == 1, 3 * LEASE)
        assert not is_ready(service)
    hang.unlink()
    with worker_of(service, tmp_path, "other") as other:
        assert service.finished(task_id, 60)["status"] == "completed"
        assert other.renders().count(task_id) == 2


@pytest.mark.full
def test_a_worker_whose_interpreter_is_blocked_loses_its_lease_and_exits(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the watchdog's thread nor the reporter can run, and the SDK's pings go on from their own process."""
    monkeypatch.setenv("HUNYUAN_STALL_TIMEOUT", "15")
    with worker_of(service, tmp_path, "blocked", "--hold-gil") as worker:
        task_id = service.generate()
        eventually("the render", worker.renders, DEADLINE)
        position = eventually("the lease to expire", lambda: service.status(task_id)["queue_position"], 3 * LEASE)
        assert position == 1
        assert not is_ready(service)
        assert worker.wait(60) != 0
        assert "before_step" in worker.log.read_text(), "the log shows where the thread is"
    assert service.http.delete(f"/tasks/{task_id}").status_code == 200


@pytest.mark.full
def test_a_server_with_a_stopped_ffmpeg_completes_the_task_and_the_next_one(tmp_path: Path) -> None:
    with running_service(tmp_path, HUNYUAN_STALL_TIMEOUT="20") as service:
        first, second = service.generate(), service.generate()
        process = ffmpeg(service.worker())
        process.send_signal(signal.SIGSTOP)
        assert service.finished(first, 300)["status"] == "completed"
        assert service.finished(second, 300)["status"] == "completed"
        assert not process.is_running()
