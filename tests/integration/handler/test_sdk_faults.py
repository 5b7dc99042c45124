"""Faults of the SDK (runpod 1.12) that the worker works around, each with the SDK's loop in a separate process.

The server works around the rest: tests/integration/queue/test_platform.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from contract.worker import WorkerState
from contract.worker_environment import worker_environment
from storage.settings import BucketSettings
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.full import full
from tests.support.s3_servers import new_bucket
from tests.support.service import Service, eventually, free_port, running_without_workers
from tests.support.stand_in_platform import NO_ANSWER, StandInPlatform, stand_in_platform
from tests.support.worker_process import WorkerProcess, bucket_environment

TOKEN = "a-token-of-the-tests"
#: Seconds that a worker may take to start or to react, on a busy machine.
DEADLINE = 90.0
#: Seconds until a silent worker loses its job.
LEASE = 600.0


@pytest.fixture(scope="module")
def bucket(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@pytest.fixture
def platform() -> Iterator[StandInPlatform]:
    with stand_in_platform() as made:
        yield made


@pytest.fixture
def network(platform: StandInPlatform) -> Iterator[FaultProxy]:
    """A proxy between the worker and its platform."""
    with FaultProxy(platform.address) as made:
        yield made


StartWorker = Callable[..., WorkerProcess]


@pytest.fixture
def start_worker(network: FaultProxy, bucket: BucketSettings, tmp_path: Path) -> Iterator[StartWorker]:
    started: list[WorkerProcess] = []

    def start(*arguments: str) -> WorkerProcess:
        worker = WorkerProcess(tmp_path, bucket, platform=network.url, token=TOKEN)
        worker.start(*arguments)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        if worker.process is not None:
            worker.kill()


@pytest.mark.full
def test_a_result_is_delivered_when_the_platform_is_back(
    platform: StandInPlatform, network: FaultProxy, start_worker: StartWorker
) -> None:
    """The SDK never retries a connection error, and keeps stale connections from before the restart."""
    worker = start_worker("--step-seconds", "0.5")
    first = platform.submit()
    eventually("the render", lambda: worker.renders() == [first], DEADLINE)
    with network.broken(refuse=True):
        eventually("the first delivery", lambda: "delivering the result failed" in worker.log.read_text(), DEADLINE)
        assert platform.results == []
    eventually("the result", lambda: platform.delivered() == [first], DEADLINE)
    second = platform.submit()
    eventually("the next result", lambda: platform.delivered() == [first, second], DEADLINE)


@pytest.mark.parametrize("statuses", [full([503] * 4), [429] * 2], ids=str)
def test_a_result_that_the_platform_defers_is_delivered_again(
    platform: StandInPlatform, start_worker: StartWorker, statuses: list[int]
) -> None:
    """The SDK itself tries three times after a 5xx, and once after a 429."""
    platform.answers.extend(statuses)
    start_worker()
    task_id = platform.submit()
    eventually("the result", lambda: platform.delivered() == [task_id] * (len(statuses) + 1), DEADLINE)
    bodies = [body for _, body in platform.results]
    assert all(body == bodies[0] for body in bodies), "the same result each time"


def test_a_result_that_the_platform_refuses_is_not_retried(
    platform: StandInPlatform, start_worker: StartWorker
) -> None:
    platform.answers.append(404)
    start_worker()
    submitted = [platform.submit() for _ in range(2)]
    eventually("the next result", lambda: platform.delivered() == submitted, DEADLINE)


@pytest.mark.full
def test_a_result_without_an_answer_is_delivered_again(platform: StandInPlatform, start_worker: StartWorker) -> None:
    """The SDK waits ten minutes for the answer and takes no job meanwhile."""
    platform.answers.append(NO_ANSWER)
    start_worker("--answer-timeout", "1")
    task_id = platform.submit()
    eventually("the second delivery", lambda: platform.delivered() == [task_id, task_id], DEADLINE)
    following = platform.submit()
    eventually("the next result", lambda: platform.delivered()[2:] == [following], DEADLINE)


@pytest.mark.full
def test_an_unavailable_platform_is_asked_every_few_seconds_until_it_is_back(
    platform: StandInPlatform, network: FaultProxy, start_worker: StartWorker
) -> None:
    """The SDK alone asks more than a thousand times a second, and logs each time."""
    network.faults = Faults(reset_on_accept=True)
    start_worker()
    eventually("the first request", lambda: network.hits["reset_on_accept"], DEADLINE)
    started = time.monotonic()
    eventually("ten requests", lambda: network.hits["reset_on_accept"] >= 10, DEADLINE)
    before = network.hits["reset_on_accept"]
    eventually("three seconds", lambda: time.monotonic() - started > 3, DEADLINE)
    # job-take, job-stop, the report and the ping each retry on their own.
    per_second = (network.hits["reset_on_accept"] - before) / (time.monotonic() - started)
    assert per_second < 10
    network.heal()
    task_id = platform.submit()
    eventually("the result", lambda: platform.delivered() == [task_id], DEADLINE)


def test_an_idle_worker_stops_at_once(platform: StandInPlatform, start_worker: StartWorker) -> None:
    """The SDK waits for the answer to its last job-take, which this platform would hold for ever."""
    worker = start_worker()
    eventually("its job-take", lambda: platform.held, DEADLINE)
    worker.terminate()
    assert worker.wait() == 0
    assert platform.reports[-2:] == [WorkerState.STOPPING, WorkerState.STOPPED]


@pytest.mark.full
def test_a_job_that_arrives_after_the_signal_is_followed_by_a_stopped_report(
    platform: StandInPlatform, start_worker: StartWorker
) -> None:
    """The SDK queues the job, rarely runs it, and exits with 0. The report shows that the worker does not hold it."""
    platform.last_minute_job = "late"
    worker = start_worker()
    eventually("its job-take", lambda: platform.held, DEADLINE)
    worker.terminate()
    assert worker.wait() == 0
    assert not platform.last_minute_job, "the job was delivered"
    assert platform.delivered() == worker.renders()
    assert platform.reports[-1] == WorkerState.STOPPED


def test_a_worker_that_is_asked_to_stop_finishes_its_job_and_takes_no_other(
    platform: StandInPlatform, start_worker: StartWorker
) -> None:
    worker = start_worker("--step-seconds", "0.5")
    task_id = platform.submit()
    eventually("the render", lambda: worker.renders() == [task_id], DEADLINE)
    worker.terminate()
    eventually("the report", lambda: WorkerState.STOPPING in platform.reports, DEADLINE)
    following = platform.submit()
    assert worker.wait() == 0
    assert platform.delivered() == [task_id]
    assert platform.results[0][1]["output"]["status"] == "completed"
    assert list(platform.jobs) == [following]
    assert platform.reports[-1] == WorkerState.STOPPED


def run_script(
    script: str, platform: StandInPlatform, bucket: BucketSettings, directory: Path
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **bucket_environment(bucket),
        **worker_environment(f"http://127.0.0.1:{platform.server_port}/v2", "local", "w1", TOKEN),
    }
    command = [sys.executable, "-c", script, "--notes", str(directory / "notes")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False)


@pytest.mark.full
def test_a_signal_while_the_sdk_forks_its_ping_process_is_followed(
    platform: StandInPlatform, bucket: BucketSettings, tmp_path: Path
) -> None:
    """An exception of a signal handler is lost there, and locks stay taken."""
    script = (
        "import os, signal; "
        "os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM)); "
        "from tests.support.scripted_worker import main; main()"
    )
    run = run_script(script, platform, bucket, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Exception ignored" not in run.stderr
    assert platform.held == 0, "the worker exited before it asked for a job"


@pytest.mark.full
def test_the_ping_process_of_a_worker_that_ends_at_the_fork_ends_too(
    platform: StandInPlatform, bucket: BucketSettings, tmp_path: Path
) -> None:
    """It begins to run when its parent is dead already. It would hold the pipe of stdout, and ping for ever."""
    script = (
        "import os, signal, time\n"
        "worker = os.getpid()\n"
        "def wait_for_its_end():\n"
        "    while os.getppid() == worker: time.sleep(0.01)\n"
        "end = lambda: os.kill(worker, signal.SIGTERM)\n"
        "os.register_at_fork(after_in_parent=end, after_in_child=wait_for_its_end)\n"
        "from tests.support.scripted_worker import main; main()"
    )
    run = run_script(script, platform, bucket, tmp_path)
    assert run.returncode == 0, run.stderr
    assert platform.pings == 0


def test_the_ping_process_of_a_killed_worker_dies(platform: StandInPlatform, start_worker: StartWorker) -> None:
    """The SDK pings from a separate process."""
    worker = start_worker()
    eventually("a ping", lambda: platform.pings, DEADLINE)
    family = worker.family()
    worker.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_worker_needs_no_public_network() -> None:
    """The SDK's checks query a name server on the internet, and end the worker if there is none."""
    script = (
        "import asyncio; from runpod.serverless.modules import rp_fitness as checks; "
        "asyncio.run(checks.run_fitness_checks()); print(len(checks._fitness_checks))"
    )
    environment = {**os.environ, **worker_environment("http://127.0.0.1:9/v2", "local", "w1", TOKEN)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "0"


def test_the_worker_command_becomes_the_worker(tmp_path: Path) -> None:
    """A parent process would receive the signals in place of the worker."""
    environment = {
        **os.environ,
        "BUCKET_ENDPOINT_URL": "http://127.0.0.1:9",
        "BUCKET_ACCESS_KEY_ID": "id",
        "BUCKET_SECRET_ACCESS_KEY": "secret",
        "HUNYUAN_MODEL_PATH": "demo",
    }
    command = [sys.executable, "-m", "hunyuan", "worker", "--platform", f"http://127.0.0.1:{free_port()}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--token", TOKEN], env=environment, stdout=log, stderr=log)
    try:
        worker = psutil.Process(process.pid)
        eventually("the worker in its place", lambda: worker.cmdline()[-2:] == ["-m", "handler"], DEADLINE)
        environ = worker.environ()
        assert environ["RUNPOD_AI_API_KEY"] == TOKEN
        assert environ["RUNPOD_SKIP_AUTO_SYSTEM_CHECKS"] == "true"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)


# With our own server


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server that starts no workers."""
    settings = {"HUNYUAN_PLATFORM_TOKEN": TOKEN, "HUNYUAN_WORKER_TIMEOUT": str(LEASE)}
    with running_without_workers(tmp_path_factory.mktemp("service"), **settings) as running:
        yield running


@contextmanager
def worker_of(service: Service, directory: Path, address: str, worker_id: str) -> Iterator[WorkerProcess]:
    """A ready worker of `service`, which it reaches at `address`."""
    worker = WorkerProcess(
        directory, service.embedded_bucket(), platform=address, token=TOKEN, worker_id=f"{worker_id}-{uuid.uuid4()}"
    )
    worker.start("--silent")
    try:
        eventually("the worker's start", lambda: "Serverless Worker" in worker.log.read_text(), DEADLINE)
        eventually("readiness", lambda: service.http.get("/ready").status_code == 200, DEADLINE)
        yield worker
    finally:
        if worker.process is not None:
            worker.terminate()
            assert worker.wait() == 0, worker.log.read_text()


def test_a_result_that_was_lost_is_found_in_the_bucket_and_not_rendered_again(service: Service, tmp_path: Path) -> None:
    """After a lost result the SDK's pings no longer name the job, and the worker asks for the next one."""
    with FaultProxy(("127.0.0.1", service.port), http=True) as network:
        network.answer(404, "Lost", times=1, method="POST", target="/job-done/")
        with worker_of(service, tmp_path, network.url, "w") as worker:
            task_id = service.generate()
            assert service.finished(task_id)["status"] == "completed"
            assert network.hits["Lost"] == 1
            assert worker.renders() == [task_id]


@pytest.mark.full
def test_a_job_that_arrives_after_the_signal_goes_to_another_worker_at_once(service: Service, tmp_path: Path) -> None:
    with FaultProxy(("127.0.0.1", service.port)) as network, worker_of(service, tmp_path, network.url, "slow") as slow:
        with network.broken(latency=1.5):
            task_id = service.generate()
            eventually("the hand-over", lambda: service.status(task_id)["queue_position"] is None, DEADLINE)
            slow.terminate()
            assert slow.wait() == 0
        with worker_of(service, tmp_path, service.address, "other") as other:
            assert service.finished(task_id)["status"] == "completed"
            assert other.renders() == [task_id]
