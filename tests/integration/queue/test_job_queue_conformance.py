"""The contract of every `JobQueue`: the SQL queue on both databases, and RunPod's over HTTP against our own server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from contract.errors import ErrorCode, JobFailure
from contract.result import Progress, Stage
from shim.queue.base import Idempotency, IdempotencyConflictError, NotSupportedError, QueueFullError, render_kind
from shim.queue.job import JobState, JobStatus
from shim.queue.runpod import RunPodQueue
from storage.settings import BucketSettings
from tests.support.queues import JOB, Bench, result, runpod_bench, sql_bench
from tests.support.s3_servers import juicefs


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketSettings]:
    with juicefs(tmp_path_factory.mktemp("juicefs")) as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql", "runpod"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    on_postgresql = request.param == "postgresql"
    url = request.getfixturevalue("postgres").create_database() if on_postgresql else f"sqlite:///{tmp_path}/queue.db"
    is_runpod = request.param == "runpod"
    async with runpod_bench(url, bucket=request.getfixturevalue("bucket")) if is_runpod else sql_bench(url) as made:
        await made.worker()
        yield made


async def test_a_submitted_job_waits(bench: Bench) -> None:
    job = (await bench.queue.submit(JOB)).job
    assert (job.state, job.progress, job.stage) == (JobState.QUEUED, 0, Stage.QUEUED)
    again = await bench.queue.get(job.task_id)
    assert again is not None
    assert (again.task_id, again.state) == (job.task_id, JobState.QUEUED)
    assert again.queue_position in (1, None)
    assert again.result is None
    assert again.failure is None


async def test_an_unknown_job_is_none(bench: Bench) -> None:
    assert await bench.queue.get("no-such-job") is None
    assert await bench.queue.cancel("no-such-job") is None


async def test_jobs_are_taken_in_the_order_they_came(bench: Bench) -> None:
    first, second = [(await bench.queue.submit(JOB)).task_id for _ in range(2)]
    assert await bench.take("w1") == first
    assert await bench.take("w2") == second


async def test_progress_is_seen_and_never_falls(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take()
    for sent, shown in ((10, 10), (40, 40), (30, 40), (41, 41)):
        progress = Progress(progress=sent, stage=Stage.DENOISING, elapsed_time=1.0)
        await bench.dispatcher.record_progress("w1", task_id, progress)
        bench.later()
        job = await bench.queue.get(task_id)
        assert job is not None
        assert (job.state, job.progress, job.stage) == (JobState.RUNNING, shown, Stage.DENOISING)
        assert job.queue_position is None


async def test_a_running_job_has_its_latest_preview_and_an_ended_one_has_none(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take()
    numbers = []
    for progress, sent, shown in ((2, None, None), (10, b"one", b"one"), (20, b"two", b"two"), (30, None, b"two")):
        report = Progress(progress=progress, stage=Stage.DENOISING).model_copy(update={"preview": sent})
        await bench.dispatcher.record_progress("w1", task_id, report)
        bench.later()
        job = await bench.queue.get(task_id)
        assert job is not None
        numbers.append(job.preview)
        assert await bench.queue.preview(task_id) == shown
    assert numbers == [None, 1, 2, 2]
    await bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
    bench.later()
    ended = await bench.queue.get(task_id)
    assert ended is not None
    assert (ended.preview, await bench.queue.preview(task_id)) == (None, None)


async def test_time_passes_for_a_job_until_it_ends(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    times = []
    for _ in range(2):
        bench.later(5)
        job = await bench.queue.get(task_id)
        assert job is not None
        times.append(job.elapsed_time)
    assert 4 <= times[0] < times[1]
    await bench.take()
    await bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
    bench.later()
    ended = await bench.queue.get(task_id)
    bench.later(100)
    later = await bench.queue.get(task_id)
    assert ended is not None
    assert later is not None
    assert later.elapsed_time == ended.elapsed_time


async def test_a_completed_job_has_its_manifest(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take()
    await bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
    bench.later()
    job = await bench.queue.get(task_id)
    assert job is not None
    assert (job.state, job.progress, job.failure) == (JobState.COMPLETED, 100, None)
    assert job.result is not None
    assert (job.result.task_id, job.result.input, job.result.file_size) == (task_id, JOB, 1000)
    assert (await bench.queue.submit(JOB)).render_times == {render_kind(JOB): 30.0}


async def test_a_failed_job_has_its_reason(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take()
    failure = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)
    await bench.dispatcher.fail("w1", task_id, failure)
    bench.later()
    job = await bench.queue.get(task_id)
    assert job is not None
    assert (job.state, job.failure, job.result) == (JobState.FAILED, failure, None)


async def test_an_output_without_a_manifest_is_a_failure(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take()
    await bench.dispatcher.complete("w1", task_id, {"anything": "else"})
    bench.later()
    job = await bench.queue.get(task_id)
    assert job is not None
    assert job.result is None
    assert job.failure is not None
    assert job.failure.error_code is ErrorCode.GENERATION_FAILED


async def test_a_waiting_job_can_be_cancelled(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    job = await bench.queue.cancel(task_id)
    assert job is not None
    assert job.state is JobState.CANCELLED
    assert job.failure is not None
    assert job.failure.error_code is ErrorCode.CANCELLED
    assert await bench.dispatcher.take("w1") is None


async def test_a_running_job_can_be_cancelled_and_its_worker_receives_the_cancellation(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take()
    job = await bench.queue.cancel(task_id)
    assert job is not None
    assert job.state is JobState.CANCELLED
    assert await bench.dispatcher.pending_cancellations("w1") == [task_id]


async def test_a_finished_job_stays_as_it_is(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take()
    await bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
    await bench.dispatcher.record_progress("w1", task_id, Progress(progress=50, stage=Stage.DENOISING))
    await bench.dispatcher.fail("w1", task_id, JobFailure(error="late", error_code=ErrorCode.OOM_ERROR))
    bench.later()
    job = await bench.queue.cancel(task_id)
    assert job is not None
    assert (job.state, job.progress) == (JobState.COMPLETED, 100)


async def test_a_full_queue_takes_no_more_and_loses_none(bench: Bench) -> None:
    task_ids = [(await bench.queue.submit(JOB)).task_id for _ in range(3)]
    with pytest.raises(QueueFullError, match="3"):
        await bench.queue.submit(JOB)
    assert [await bench.take(f"w{index}") for index in range(3)] == task_ids
    assert (await bench.queue.submit(JOB)).job.state is JobState.QUEUED


async def test_the_bound_holds_for_requests_at_the_same_moment(bench: Bench) -> None:
    outcomes = await asyncio.gather(*(bench.queue.submit(JOB) for _ in range(12)), return_exceptions=True)
    assert sum(isinstance(outcome, QueueFullError) for outcome in outcomes) == 9
    bench.later()
    assert (await bench.queue.summary()).waiting == 3


async def test_a_key_that_comes_again_gives_the_same_job(bench: Bench) -> None:
    key = Idempotency.of("a key of the client", JOB)
    jobs = await asyncio.gather(*(bench.queue.submit(JOB, key) for _ in range(5)))
    assert len({job.task_id for job in jobs}) == 1
    assert await bench.take() == jobs[0].task_id
    again = (await bench.queue.submit(JOB, key)).job
    assert (again.task_id, again.state) == (jobs[0].task_id, JobState.RUNNING)
    assert (await bench.queue.submit(JOB, Idempotency.of("another key", JOB))).task_id != again.task_id


async def test_a_key_that_comes_with_another_request_is_refused_and_one_for_a_full_queue_is_not(bench: Bench) -> None:
    key = Idempotency.of("a key of the client", JOB)
    first = await bench.queue.submit(JOB, key)
    for _ in range(2):
        await bench.queue.submit(JOB)
    assert (await bench.queue.submit(JOB, key)).task_id == first.task_id
    other = JOB.model_copy(update={"duration": 6})
    with pytest.raises(IdempotencyConflictError):
        await bench.queue.submit(other, Idempotency.of("a key of the client", other))


async def test_a_submission_has_the_backlog_ahead_of_it(bench: Bench) -> None:
    key = Idempotency.of("a key of the client", JOB)
    first = await bench.queue.submit(JOB)
    assert (list(first.backlog.waiting), list(first.backlog.running), first.backlog.workers) == ([], [], 1)
    assert first.render_times == {}
    await bench.take()
    await bench.queue.submit(JOB)
    third = await bench.queue.submit(JOB, key)
    assert (len(third.backlog.waiting), len(third.backlog.running)) == (1, 1)
    assert set(third.backlog.waiting) <= {JOB, None}
    bench.later()
    repeated = await bench.queue.submit(JOB, key)
    assert (repeated.task_id, repeated.job.state) == (third.task_id, JobState.QUEUED)
    assert (len(repeated.backlog.waiting), len(repeated.backlog.running)) == (2, 1)


async def test_the_summary_counts_waiting_and_running_jobs(bench: Bench) -> None:
    for _ in range(3):
        await bench.queue.submit(JOB)
    await bench.take()
    summary = await bench.queue.summary()
    assert (summary.waiting, summary.running, summary.workers.ready) == (2, 1, 1)


async def test_many_pollers_see_the_same(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    bench.later()
    jobs = await asyncio.gather(*(bench.queue.get(task_id) for _ in range(50)))
    assert {job.state if job else None for job in jobs} == {JobState.QUEUED}


async def test_workers_are_counted_and_it_is_ready(bench: Bench) -> None:
    workers = (await bench.queue.summary()).workers
    assert (workers.ready, workers.loading, workers.failed) == (1, 0, 0)
    await bench.queue.check_ready()


async def test_a_list_has_the_clients_jobs_or_the_queue_says_that_it_has_none(bench: Bench) -> None:
    ids = [(await bench.queue.submit(JOB)).task_id for _ in range(3)]
    if isinstance(bench.queue, RunPodQueue):
        with pytest.raises(NotSupportedError, match=r"GET /tasks/\{task_id\}"):
            await bench.queue.list_jobs("", limit=2)
        return
    page = await bench.queue.list_jobs("", limit=2)
    assert [job.task_id for job in page.jobs] == [ids[2], ids[1]]
    rest = await bench.queue.list_jobs("", cursor=page.next_cursor, limit=2)
    assert ([job.task_id for job in rest.jobs], rest.next_cursor) == ([ids[0]], None)
    assert (await bench.queue.list_jobs("somebody", limit=2)).jobs == []
    assert (await bench.queue.list_jobs("", status=JobStatus.COMPLETED, limit=2)).jobs == []


async def test_the_history_has_each_state_and_each_stage_if_the_queue_keeps_one(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take()
    for sent, stage in ((0, Stage.ENCODING_PROMPT), (10, Stage.DENOISING), (40, Stage.DENOISING)):
        await bench.dispatcher.record_progress("w1", task_id, Progress(progress=sent, stage=stage))
    await bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
    bench.later()
    job = await bench.queue.get(task_id)
    assert job is not None
    events = await bench.queue.history(task_id)
    record = await bench.queue.record(task_id)
    if job.last_event == 0:
        assert (list(events), record) == ([], None)
        return
    assert [(one.number, one.state, one.stage) for one in events] == [
        (1, JobState.QUEUED, Stage.QUEUED),
        (2, JobState.RUNNING, Stage.QUEUED),
        (3, JobState.RUNNING, Stage.ENCODING_PROMPT),
        (4, JobState.RUNNING, Stage.DENOISING),
        (5, JobState.COMPLETED, Stage.DENOISING),
    ]
    assert job.last_event == 5
    assert await bench.queue.history(task_id, 3) == events[3:]
    assert record is not None
    assert (record.events, record.attempts, record.worker_id) == (events, 1, "w1")


async def test_a_failed_job_is_retried_and_no_other(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    assert not await bench.queue.retry("no-such-job")
    await bench.take()
    assert not await bench.queue.retry(task_id)
    await bench.dispatcher.fail("w1", task_id, JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR))
    bench.later()
    failed = await bench.queue.get(task_id)
    assert failed is not None
    assert failed.state is JobState.FAILED
    assert await bench.queue.retry(task_id)
    again = await bench.queue.get(task_id)
    assert again is not None
    assert (again.state, again.progress, again.failure) == (JobState.QUEUED, 0, None)
    assert await bench.take() == task_id


async def test_a_watched_job_is_read_again_when_it_changes(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take()
    with bench.queue.watching(task_id) as changed:
        await bench.dispatcher.record_progress("w1", task_id, Progress(progress=10, stage=Stage.DENOISING))
        assert changed.is_set() or bench.queue.watch_interval <= 2
