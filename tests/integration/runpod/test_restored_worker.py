"""A worker that RunPod froze, and continued hours later, maybe on another machine: its sockets are dead.

FlashBoot does so. The worker has the SDK's loop, a real bucket and ffmpeg; only the model is scripted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pydantic import HttpUrl

from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.fault_proxy import FaultProxy
from tests.support.s3_servers import new_bucket
from tests.support.service import eventually
from tests.support.stand_in_platform import StandInPlatform, stand_in_platform
from tests.support.worker_process import WorkerProcess

#: Seconds that a worker may take to start or to react, on a busy machine.
DEADLINE = 90.0
#: Seconds for which the worker was stopped.
STOPPED = 6 * 3600


@pytest.fixture(scope="module")
def bucket(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@pytest.fixture
def platform() -> Iterator[StandInPlatform]:
    with stand_in_platform() as made:
        yield made


def address(bucket: BucketSettings) -> tuple[str, int]:
    host, port = bucket.endpoint_url.host, bucket.endpoint_url.port
    assert host is not None
    assert port is not None
    return host, port


def end(worker: WorkerProcess) -> None:
    if worker.process is not None:
        worker.kill()


def test_the_first_job_after_a_restore_is_rendered_stored_and_delivered(
    platform: StandInPlatform, bucket: BucketSettings, tmp_path: Path
) -> None:
    clock = tmp_path / "clock"
    with ExitStack() as stack:
        network = stack.enter_context(FaultProxy(platform.address))
        store = stack.enter_context(FaultProxy(address(bucket)))
        through_proxy = bucket.model_copy(update={"endpoint_url": HttpUrl(store.url)})
        worker = WorkerProcess(tmp_path, through_proxy, platform=network.url, token="a-token-of-the-tests")
        worker.start("--clock", str(clock))
        stack.callback(end, worker)
        # 1. A job, which leaves connections to the platform and to the bucket.
        first = platform.submit()
        eventually("the first result", lambda: platform.delivered() == [first], DEADLINE)
        eventually("the next job-take", lambda: platform.held == 1, DEADLINE)
        # 2. The snapshot: no connection survives it, and both clocks have moved when the process continues.
        worker.freeze()
        with network.broken(refuse=True), store.broken(refuse=True):
            clock.write_text(str(STOPPED))
        platform.submit()  # goes to the dead job-take; RunPod hands such a job out again
        eventually("the end of the dead job-take", lambda: platform.held == 0, DEADLINE)
        worker.thaw()
        # 3. The next job.
        eventually("a new job-take", lambda: platform.held == 1, DEADLINE)
        second = platform.submit()
        eventually("the second result", lambda: platform.delivered() == [first, second], DEADLINE)
        output = platform.results[-1][1]["output"]
        assert output["status"] == "completed"
        assert Bucket(bucket).get_bytes(output["video_key"])[4:8] == b"ftyp"
        assert worker.renders() == [first, second]
        worker.terminate()
        eventually("the report of the stop", lambda: "stopping" in platform.reports, DEADLINE)
        assert worker.wait(DEADLINE) == 0
    assert "made no progress" not in worker.log.read_text()
