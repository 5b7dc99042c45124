"""Work directories on a full disk, and after a worker was killed."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path
from threading import Event

import pytest

from contract.errors import ErrorCode, JobFailure
from contract.result import JobResult
from handler.work_dir import WorkDirError, job_directory, remove_leftovers
from handler.worker import Job, JobError, Worker
from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.disks import disk, fill
from tests.support.s3_servers import new_bucket
from tests.support.scripted_model import STEPS, ScriptedModel

pytestmark = pytest.mark.usefixtures("small_videos")

INPUT = {"prompt": "A paper boat on a rainy street", "duration": 5, "resolution": "720p"}


@pytest.fixture(scope="module")
def settings(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


def run(worker: Worker) -> JobResult:
    return worker.run(Job(str(uuid.uuid4()), INPUT), lambda _: None, Event())


def failure(worker: Worker) -> JobFailure:
    with pytest.raises(JobError) as caught:
        run(worker)
    return caught.value.failure


def test_a_disk_that_fills_up_fails_the_job_and_not_the_next_one(tmp_path: Path, settings: BucketSettings) -> None:
    with disk(tmp_path, 128) as small:

        def fill_at_last(step: int) -> None:
            if step == STEPS - 1:
                fill(small)

        model = ScriptedModel(before_step=fill_at_last)
        worker = Worker(model, Bucket(settings), version="1", work_dir=small)
        failed = failure(worker)
        assert failed.error_code is ErrorCode.GENERATION_FAILED
        assert failed.error == "The worker can't write the video: the disk is full"
        assert [path.name for path in small.iterdir()] == ["filler"], "the incomplete video is deleted"
        assert model.released == 1
        (small / "filler").unlink()
        model.before_step = lambda _: None
        assert run(worker).file_size > 0
        assert list(small.iterdir()) == []


def test_a_disk_with_too_little_free_space_fails_the_job_before_it_is_rendered(
    tmp_path: Path, settings: BucketSettings
) -> None:
    with disk(tmp_path, 50) as small:
        model = ScriptedModel()
        failed = failure(Worker(model, Bucket(settings), version="1", work_dir=small))
        assert failed.error_code is ErrorCode.GENERATION_FAILED
        assert "the disk is full" in failed.error
        assert model.rendered == []
        assert list(small.iterdir()) == []


def test_a_missing_work_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(WorkDirError, match="No such file or directory"), job_directory(tmp_path / "absent"):
        pass


def test_the_directory_of_a_killed_worker_is_deleted_and_that_of_a_live_one_stays(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, handler.work_dir as w\n"
        "with w.job_directory(pathlib.Path(sys.argv[1])) as directory:\n"
        "    (directory / 'video.mp4').write_bytes(b'half')\n"
        "    print(directory.name, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    names = []
    processes = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        names.append(process.stdout.readline().strip())
        processes.append(process)
    other = tmp_path / "hunyuan-something-else"
    other.mkdir()
    killed, living = processes
    killed.kill()
    killed.communicate()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names[1], other.name}
    living.communicate("")
    assert living.returncode == 0
    assert list(tmp_path.iterdir()) == [other]
