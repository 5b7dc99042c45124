"""Which previews the SQL queue keeps, on both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import func, select

from contract.errors import ErrorCode, JobFailure
from contract.result import Progress, Stage
from shim.queue.schema import previews
from tests.support.queues import JOB, Bench, sql_bench

FAILURE = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)


@pytest.fixture
async def bench(database_url: str) -> AsyncIterator[Bench]:
    async with sql_bench(database_url) as made:
        await made.worker()
        yield made


async def running(bench: Bench) -> str:
    """A job that runs on w1 and has a preview."""
    task_id = (await bench.queue.submit(JOB)).task_id
    assert await bench.take() == task_id
    await show(bench, task_id, b"first", 40)
    return task_id


async def show(bench: Bench, task_id: str, jpeg: bytes, progress: int, worker_id: str = "w1") -> None:
    report = Progress(progress=progress, stage=Stage.DENOISING).model_copy(update={"preview": jpeg})
    await bench.dispatcher.record_progress(worker_id, task_id, report)


async def kept(bench: Bench) -> int:
    async with bench.database.read() as connection:
        return await connection.scalar(select(func.count()).select_from(previews)) or 0


async def test_a_preview_that_is_late_or_of_another_worker_is_ignored(bench: Bench) -> None:
    task_id = await running(bench)
    await show(bench, task_id, b"late", 30)
    await show(bench, task_id, b"of another worker", 50, "w2")
    assert await bench.queue.preview(task_id) == b"first"
    job = await bench.queue.get(task_id)
    assert job is not None
    assert (job.preview, job.progress) == (1, 40)


@pytest.mark.parametrize("end", ["complete", "fail", "cancel"])
async def test_an_ended_job_leaves_no_preview_and_takes_none(bench: Bench, end: str) -> None:
    task_id = await running(bench)
    match end:
        case "complete":
            await bench.dispatcher.complete("w1", task_id, {})
        case "fail":
            await bench.dispatcher.fail("w1", task_id, FAILURE)
        case "cancel":
            await bench.queue.cancel(task_id)
    await show(bench, task_id, b"after the end", 60)
    assert await kept(bench) == 0


async def test_a_job_that_is_queued_again_begins_without_a_preview(bench: Bench) -> None:
    task_id = await running(bench)
    await bench.dispatcher.release_worker("w1")
    assert await bench.queue.preview(task_id) is None
    await bench.worker("w2")
    assert await bench.take("w2") == task_id
    assert await kept(bench) == 0
    job = await bench.queue.get(task_id)
    assert job is not None
    assert job.preview is None


async def test_what_polls_and_events_read_has_no_bytes_of_a_preview(bench: Bench) -> None:
    task_id = await running(bench)
    row, events = await bench.database.reader.job(task_id), await bench.queue.history(task_id)
    assert row is not None
    assert not any(
        isinstance(value, bytes) for value in (*row, *(value for one in events for value in vars(one).values()))
    )
