"""`hunyuan batch` with the real server and its queue: killed and started again, it renders each prompt once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.full import full
from tests.support.mp4 import probe
from tests.support.scripted_service import scripted_service
from tests.support.service import Service, eventually
from tests.support.worker_process import WorkerProcess

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, WorkerProcess]]:
    with scripted_service(tmp_path_factory.mktemp("service"), "--step-seconds", "0.05") as made:
        yield made


def start(service: Service, directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hunyuan", "batch", *arguments],
        cwd=directory,
        env={**os.environ, "HUNYUAN_SERVER": service.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_after(process: subprocess.Popen[str], videos: Path, count: int) -> None:
    """SIGKILL when the batch has saved that many videos, with more tasks under way."""
    eventually(f"{count} saved videos", lambda: len(list(videos.glob("*.mp4"))) >= count, 600)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()


@pytest.mark.parametrize("count", [9, full(30)])
def test_a_batch_that_is_killed_twice_renders_each_prompt_once(
    running: tuple[Service, WorkerProcess], tmp_path: Path, count: int
) -> None:
    service, worker = running
    before = len(worker.renders())
    (tmp_path / "prompts.txt").write_text("".join(f"A paper boat on street number {n}\n" for n in range(count)))
    videos = tmp_path / "prompts"
    for saved in (count // 3, 2 * count // 3):
        kill_after(start(service, tmp_path, "prompts.txt", "--parallel", "3"), videos, saved)
    last = start(service, tmp_path, "prompts.txt", "--parallel", "3")
    printed, lines = last.communicate(timeout=600)

    assert last.returncode == 0, lines
    assert printed == f"{count} of {count} videos are in prompts\n"
    assert "videos are saved already" in lines
    assert Counter(Counter(worker.renders()[before:]).values()) == {1: count}
    saved_videos = sorted(videos.glob("*.mp4"))
    assert [path.name for path in saved_videos] == [
        f"{n + 1:03}-a-paper-boat-on-street-number-{n}.mp4" for n in range(count)
    ]
    assert len({path.read_bytes() for path in saved_videos}) == count, "each is a render of its own"
    assert {probe(path).num_frames for path in saved_videos} == {121}
    assert list(videos.glob("*.part")) == []


def test_a_prompt_that_the_server_refuses_is_in_the_summary(
    running: tuple[Service, WorkerProcess], tmp_path: Path
) -> None:
    """The scripted model is not of profile fast."""
    (tmp_path / "two.jsonl").write_text(
        '"A paper boat on a rainy street"\n{"prompt": "A red fish in the sea", "model": "HunyuanVideo-1.5-fast"}\n'
    )
    done = start(running[0], tmp_path, "two.jsonl")
    printed, lines = done.communicate(timeout=300)
    assert done.returncode == 1, lines
    assert printed.splitlines()[0] == "1 of 2 videos are in two"
    assert "line 2 failed: model: this server has weights for" in printed
    assert "(INVALID_MODEL)" in lines
