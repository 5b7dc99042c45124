"""The files of the SQLite queue: who can read them, and what they hold after a task has ended."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shim.queue.database import Database
from shim.queue.sql import SqlQueue
from tests.support.queues import JOB, Bench, result, sql_bench

FILES = ("queue.sqlite3", "queue.sqlite3-wal", "queue.sqlite3-shm")


def holding(directory: Path, text: str) -> list[str]:
    """The files that contain `text`."""
    return [path.name for path in sorted(directory.iterdir()) if text.encode() in path.read_bytes()]


def modes(directory: Path) -> dict[str, str]:
    return {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in directory.iterdir()}


@pytest.fixture
def open_directory(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("is_new", [True, False])
async def test_only_the_owner_reads_the_queues_files_in_a_directory_that_others_may_read(
    open_directory: Path, is_new: bool
) -> None:
    if not is_new:  # as earlier releases left it
        for name in FILES:
            (open_directory / name).touch(mode=0o644)
    async with sql_bench(f"sqlite:///{open_directory}/queue.sqlite3") as bench:
        await bench.worker()
        await bench.queue.submit(JOB)
        assert modes(open_directory) == dict.fromkeys(FILES, "0o600")


async def test_a_second_opening_in_the_same_process_ends_no_lock_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "queue.sqlite3"
    first = sqlite3.connect(file, isolation_level=None)
    first.execute("BEGIN IMMEDIATE")
    opening = asyncio.create_task(Database.open(f"sqlite:///{file}"))
    await asyncio.sleep(0)
    write = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
    writer = await asyncio.create_subprocess_exec(sys.executable, "-c", write, file, stderr=subprocess.PIPE)
    assert b"database is locked" in (await writer.communicate())[1]
    first.execute("COMMIT")
    first.close()
    await (await opening).close()


async def _job_with_a_secret(bench: Bench, secret: str) -> str:
    """A job with credentials that many changes have copied into the write-ahead log."""
    extras = {"s3Config": {"accessId": "an-id", "accessSecret": secret}}
    assert isinstance(bench.queue, SqlQueue)
    task_id = await bench.queue.enqueue(JOB.wire(), extras)
    assert await bench.take("w1") == task_id
    for _ in range(20):
        await bench.dispatcher.ping("w1", [task_id])
    return task_id


@pytest.mark.parametrize("end", ["completed", "cancelled"])
async def test_the_credentials_of_a_job_are_in_no_file_after_it_ended(tmp_path: Path, end: str) -> None:
    secret = "very-secret-key-of-a-bucket"
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench:
        await bench.worker()
        task_id = await _job_with_a_secret(bench, secret)
        assert holding(tmp_path, secret) != []
        if end == "completed":
            await bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
        else:
            await bench.queue.cancel(task_id)
        await bench.dispatcher.sweep()
        assert holding(tmp_path, secret) == []


async def test_the_credentials_of_jobs_that_ended_before_a_crash_are_in_no_file_after_the_next_start(
    tmp_path: Path,
) -> None:
    secret = "very-secret-key-of-a-bucket"
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    async with sql_bench(f"sqlite:///{before}/queue.sqlite3") as bench:
        await bench.worker()
        task_id = await _job_with_a_secret(bench, secret)
        await bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
        after.mkdir()
        for name in FILES:  # a clean end would have emptied the write-ahead log
            (after / name).write_bytes((before / name).read_bytes())
    assert holding(after, secret) != []
    async with sql_bench(f"sqlite:///{after}/queue.sqlite3") as bench:
        await bench.dispatcher.sweep()
        assert holding(after, secret) == []
