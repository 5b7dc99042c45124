"""What only the SQL queue promises: leases, lost workers and results, restarts, and a cost that does not grow."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine

from contract.errors import ErrorCode, JobFailure
from contract.job import InvalidInputError
from contract.lora import Lora
from contract.offer import SamplingLimits
from contract.result import JobResult, Progress, Stage
from contract.worker import WorkerState
from shim.queue.base import (
    Idempotency,
    IdempotencyConflictError,
    ModelNotLoadedError,
    QueueError,
    QueueUnavailableError,
    render_kind,
)
from shim.queue.database import Database
from shim.queue.dispatch import WorkerStoppingError
from shim.queue.engine import database_url as database_url_of
from shim.queue.engine import migrate
from shim.queue.job import JobState, JobStatus
from shim.queue.schema import metadata
from shim.queue.sql import SqlQueue
from storage.errors import StorageUnavailableError
from tests.support.postgres import Postgres, running_postgres
from tests.support.queues import JOB, Bench, add_history, result, sql_bench


@pytest.fixture
def found() -> dict[str, JobResult]:
    """The results in the bucket, by task id."""
    return {}


@pytest.fixture
async def bench(each_database_url: str, found: dict[str, JobResult]) -> AsyncIterator[Bench]:
    async def find_result(task_id: str) -> JobResult | None:
        return found.get(task_id)

    async with sql_bench(each_database_url, find_result=find_result) as made:
        await made.worker()
        yield made


async def state(bench: Bench, task_id: str) -> JobState:
    job = await bench.queue.get(task_id)
    assert job is not None
    return job.state


async def test_positions_count_down(bench: Bench) -> None:
    first, second = [(await bench.queue.submit(JOB)).job for _ in range(2)]
    assert (first.queue_position, second.queue_position) == (1, 2)
    await bench.take()
    job = await bench.queue.get(second.task_id)
    assert job is not None
    assert job.queue_position == 1


async def test_no_job_is_accepted_before_a_worker_is_ready(each_database_url: str) -> None:
    async with sql_bench(each_database_url) as bench:
        with pytest.raises(ModelNotLoadedError, match="no worker"):
            await bench.queue.submit(JOB)
        await bench.worker(state=WorkerState.LOADING)
        with pytest.raises(ModelNotLoadedError, match="loading"):
            await bench.queue.submit(JOB)
        await bench.worker(state=WorkerState.FAILED, error="no such checkpoint")
        with pytest.raises(ModelNotLoadedError, match="no such checkpoint"):
            await bench.queue.submit(JOB)
        await bench.worker(state=WorkerState.READY)
        await bench.queue.submit(JOB)
        bench.later(61)
        with pytest.raises(ModelNotLoadedError, match="no worker"):
            await bench.queue.submit(JOB)


async def test_a_job_without_weights_is_rejected_and_not_queued(bench: Bench) -> None:
    model = "HunyuanVideo-1.5-quality"
    await bench.worker("w1", models=("HunyuanVideo-1.5",), takes_images=False)
    await bench.worker("w2", WorkerState.LOADING, models=(model,))
    for update, code in (
        ({"model": model}, ErrorCode.INVALID_MODEL),
        ({"image": "https://host/image.png"}, ErrorCode.INVALID_REQUEST),
    ):
        with pytest.raises(InvalidInputError) as caught:
            await bench.queue.submit(JOB.model_copy(update=update))
        assert caught.value.failure.error_code is code
    assert (await bench.queue.summary()).waiting == 0
    await bench.worker("w2", models=(model,))
    assert (await bench.queue.submit(JOB.model_copy(update={"model": model}))).job.queue_position == 1


async def test_a_job_that_no_ready_workers_checkpoint_can_render_is_rejected_and_not_queued(bench: Bench) -> None:
    """A worker with other weights for the same model may still take it."""
    limit = SamplingLimits(model=JOB.model, from_image=False, guidance_scale=1.0, num_inference_steps=50)
    job = JOB.model_copy(update={"guidance_scale": 6.0})
    await bench.worker("w1", models=(JOB.model,), limits=(limit,))
    await bench.worker("other", models=("HunyuanVideo-1.5-quality",))
    with pytest.raises(InvalidInputError, match="guidance_scale must be 1") as caught:
        await bench.queue.submit(job)
    assert caught.value.failure.error_code is ErrorCode.INVALID_REQUEST
    assert (await bench.queue.summary()).waiting == 0
    await bench.queue.submit(JOB.model_copy(update={"guidance_scale": 1.0, "num_inference_steps": 50}))
    await bench.worker("w2")
    await bench.queue.submit(job)


async def test_a_job_with_an_adapter_that_no_ready_worker_has_is_rejected_and_not_queued(bench: Bench) -> None:
    await bench.worker("w1", loras=("film",))
    await bench.worker("w2", loras=("anime", "film"))
    await bench.worker("w3", WorkerState.LOADING, loras=("noir",))
    with pytest.raises(InvalidInputError, match=r'no adapter "noir"; the workers have "anime", "film"$'):
        await bench.queue.submit(JOB.model_copy(update={"loras": (Lora(name="noir"),)}))
    assert (await bench.queue.summary()).waiting == 0
    job = JOB.model_copy(update={"loras": (Lora(name="film"), Lora(name="anime", scale=0.5))})
    key = Idempotency.of("key", job)
    task_id = (await bench.queue.submit(job, key)).task_id
    assert (await bench.queue.submit(job, key)).task_id == task_id
    other = JOB.model_copy(update={"loras": (Lora(name="film"), Lora(name="anime"))})
    with pytest.raises(IdempotencyConflictError):
        await bench.queue.submit(other, Idempotency.of("key", other))


async def test_a_submission_is_one_transaction(bench: Bench) -> None:
    began: list[str] = []
    event.listen(bench.database._engine.sync_engine, "begin", lambda _: began.append("BEGIN"))
    await bench.queue.submit(JOB, Idempotency.of("key", JOB))
    assert len(began) == 1


async def test_a_worker_that_goes_silent_loses_its_job_to_the_front(bench: Bench) -> None:
    first, second = [(await bench.queue.submit(JOB)).task_id for _ in range(2)]
    await bench.take("w1")
    bench.later(50)
    await bench.dispatcher.sweep()
    assert await state(bench, first) is JobState.RUNNING, "its lease has not expired"
    bench.later(20)
    await bench.dispatcher.sweep()
    assert await state(bench, first) is JobState.QUEUED
    assert await bench.take("w2") == first
    assert await bench.take("w3") == second


@pytest.mark.parametrize("sign", ["progress", "report", "ping"])
async def test_progress_a_report_and_a_ping_each_extend_the_lease(bench: Bench, sign: str) -> None:
    """A ping does so for a worker that has sent no report."""
    worker_id = "silent" if sign == "ping" else "w1"
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take(worker_id)
    for _ in range(5):
        bench.later(40)
        match sign:
            case "progress":
                progress = Progress(progress=5, stage=Stage.DENOISING)
                await bench.dispatcher.record_progress("w1", task_id, progress)
            case "report":
                await bench.worker("w1")
            case "ping":
                await bench.dispatcher.ping(worker_id, [task_id])
        await bench.dispatcher.sweep()
    assert await state(bench, task_id) is JobState.RUNNING


@pytest.mark.parametrize("state_reported", [None, WorkerState.FAILED])
async def test_only_reports_of_a_worker_that_renders_keep_its_lease(
    bench: Bench, state_reported: WorkerState | None
) -> None:
    """The SDK's pings go on while the worker hangs, and a FAILED worker has given up its render."""
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take("w1")
    await bench.worker("w1")
    for _ in range(2):
        bench.later(40)
        await bench.dispatcher.ping("w1", [task_id])
        if state_reported is not None:
            await bench.worker("w1", state_reported, error="The render made no progress for 300 s")
        await bench.dispatcher.sweep()
    assert await state(bench, task_id) is JobState.QUEUED


async def test_a_ping_for_another_job_or_from_another_worker_extends_no_lease(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take("w1")
    for _ in range(2):
        bench.later(40)
        await bench.dispatcher.ping("w1", ["other"])
        await bench.dispatcher.ping("w2", [task_id])
        await bench.dispatcher.sweep()
    assert await state(bench, task_id) is JobState.QUEUED


async def test_a_lost_result_is_found_in_the_bucket(bench: Bench, found: dict[str, JobResult]) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take("w1")
    found[task_id] = result(task_id)
    assert await bench.dispatcher.take("w1") is None, "a worker that asks for a job has finished the last one"
    job = await bench.queue.get(task_id)
    assert job is not None
    assert job.state is JobState.COMPLETED
    assert job.result is not None


async def test_a_job_that_never_reached_its_worker_is_delivered_again(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take("w1")
    assert await bench.take("w1") == task_id


async def test_a_job_that_kills_its_workers_fails_after_three_attempts(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    for worker_id in ("w1", "w2", "w3"):
        assert await state(bench, task_id) is JobState.QUEUED
        await bench.take(worker_id)
        await bench.dispatcher.release_worker(worker_id)
    job = await bench.queue.get(task_id)
    assert job is not None
    assert job.failure is not None
    assert job.failure.error_code is ErrorCode.GENERATION_FAILED
    assert "3 times" in job.failure.error


async def test_no_job_fails_while_the_bucket_is_unavailable(each_database_url: str) -> None:
    stored: dict[str, JobResult] | None = None

    async def find_result(task_id: str) -> JobResult | None:
        if stored is None:
            raise StorageUnavailableError("the bucket is away")
        return stored.get(task_id)

    async with sql_bench(each_database_url, find_result=find_result) as bench:
        await bench.worker()
        done, lost = [(await bench.queue.submit(JOB)).task_id for _ in range(2)]
        for _ in range(3):
            await bench.take("w1")
            await bench.take("w2")
            for worker_id, task_id in (("w1", done), ("w2", lost)):
                await bench.dispatcher.ping(worker_id, [task_id])
            bench.later(61)
            await bench.dispatcher.sweep()
        assert {await state(bench, task_id) for task_id in (done, lost)} == {JobState.RUNNING}
        stored = {done: result(done)}
        await bench.dispatcher.sweep()
        assert (await state(bench, done), await state(bench, lost)) == (JobState.COMPLETED, JobState.FAILED)


async def test_a_worker_that_was_stopped_on_purpose_costs_no_attempt(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    for number in range(5):
        await bench.take(f"w{number}")
        await bench.dispatcher.release_worker(f"w{number}", count_attempt=False)
    assert await state(bench, task_id) is JobState.QUEUED


async def test_the_first_result_counts_and_the_other_worker_is_stopped(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take("w1")
    bench.later(61)
    await bench.dispatcher.sweep()
    await bench.take("w2")
    assert await bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
    assert await state(bench, task_id) is JobState.COMPLETED
    assert await bench.dispatcher.pending_cancellations("w2") == [task_id]
    assert not await bench.dispatcher.complete("w2", task_id, {"late": True})


async def test_a_failure_from_a_worker_that_lost_the_job_is_not_its_end(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take("w1")
    bench.later(61)
    await bench.dispatcher.sweep()
    await bench.take("w2")
    failure = JobFailure(error="late", error_code=ErrorCode.GENERATION_FAILED)
    assert not await bench.dispatcher.fail("w1", task_id, failure)
    assert await state(bench, task_id) is JobState.RUNNING


async def test_a_cancellation_is_sent_again_until_the_worker_follows_it(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take("w1")
    await bench.queue.cancel(task_id)
    assert await bench.dispatcher.pending_cancellations("w1") == [task_id]
    assert await bench.dispatcher.pending_cancellations("w1") == []
    bench.later(2.5)
    assert await bench.dispatcher.pending_cancellations("w1") == [task_id]
    assert await bench.dispatcher.take("w1") is None
    bench.later(2.5)
    assert await bench.dispatcher.pending_cancellations("w1") == [], (
        "a worker that asks for a job has left the cancelled one"
    )


async def test_a_failed_job_can_be_retried_and_another_one_not(bench: Bench) -> None:
    assert isinstance(bench.queue, SqlQueue)
    task_id = (await bench.queue.submit(JOB)).task_id
    assert not await bench.queue.retry(task_id)
    await bench.take("w1")
    await bench.dispatcher.fail("w1", task_id, JobFailure(error="bad luck", error_code=ErrorCode.OOM_ERROR))
    assert await bench.queue.retry(task_id)
    assert await bench.take("w1") == task_id
    await bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
    assert not await bench.queue.retry(task_id)


async def test_credentials_of_a_job_reach_its_worker_and_are_deleted_at_its_end(bench: Bench) -> None:
    assert isinstance(bench.queue, SqlQueue)
    extras = {"s3Config": {"accessSecret": "very-secret"}}
    task_id = await bench.queue.enqueue(JOB.wire(), extras)
    delivery = await bench.dispatcher.take("w1")
    assert delivery is not None
    assert delivery.extras == extras
    await bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))
    async with bench.database.read() as connection:
        rows = await connection.execute(text("SELECT * FROM jobs"))
        assert "very-secret" not in str(rows.all())


async def test_a_restart_loses_no_job(each_database_url: str) -> None:
    async with sql_bench(each_database_url) as bench:
        await bench.worker()
        done, running, waiting = [(await bench.queue.submit(JOB)).task_id for _ in range(3)]
        await bench.take("w1")
        await bench.dispatcher.complete("w1", done, result(done).model_dump(mode="json"))
        await bench.take("w1")
    async with sql_bench(each_database_url) as bench:
        await bench.dispatcher.release_workers("w")
        assert await state(bench, done) is JobState.COMPLETED
        assert await bench.take("w9") == running
        assert await bench.take("w8") == waiting


async def test_two_workers_never_get_the_same_job(each_database_url: str) -> None:
    async with sql_bench(each_database_url, max_queue_size=40) as bench:
        await bench.worker()
        for _ in range(40):
            await bench.queue.submit(JOB)
        deliveries = await asyncio.gather(*(bench.dispatcher.take(f"w{index}") for index in range(40)))
        assert len({delivery.task_id for delivery in deliveries if delivery is not None}) == 40


async def test_render_times_are_a_running_mean(bench: Bench) -> None:
    for seconds in (20.0, 40.0):
        task_id = (await bench.queue.submit(JOB)).task_id
        await bench.take("w1")
        await bench.dispatcher.complete("w1", task_id, result(task_id, seconds).model_dump(mode="json"))
    assert (await bench.queue.submit(JOB)).render_times == {render_kind(JOB): 30.0}


async def test_an_unavailable_database_raises_queue_unavailable(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.create_database()
    async with sql_bench(url) as bench:
        await bench.worker()
        postgres.drop_database(url)
        with pytest.raises(QueueUnavailableError):
            await bench.queue.submit(JOB)
    with pytest.raises(QueueUnavailableError, match=r"database postgresql\+psycopg://postgres@"):
        await Database.open(url)
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench:
        async with bench.database.write() as connection:
            await connection.execute(text("DROP TABLE workers"))
        with pytest.raises(QueueUnavailableError):
            await bench.queue.submit(JOB)


async def test_calls_to_a_frozen_database_fail_within_the_transaction_timeout(postgres: Postgres) -> None:
    database = await Database.open(postgres.create_database(), transaction_timeout=1.0)
    queue = SqlQueue(database)
    try:
        assert await queue.get("task") is None
        postgres.send(signal.SIGSTOP)
        asked = [asyncio.create_task(queue.get("task")) for _ in range(40)]  # more than the pool has connections
        _, waiting = await asyncio.wait(asked, timeout=60)
        assert not waiting
        assert all(isinstance(question.exception(), QueueUnavailableError) for question in asked)
        postgres.send(signal.SIGCONT)
        assert await queue.get("task") is None
    finally:
        postgres.send(signal.SIGCONT)
        await database.close()


async def test_notifications_arrive_again_after_the_database_was_killed() -> None:
    with running_postgres() as server:
        url = server.create_database()
        async with sql_bench(url) as here, sql_bench(url) as there:
            first = there.database.changed
            listener = asyncio.create_task(there.database.listen())
            await asyncio.wait_for(first.wait(), 10)
            again = there.database.changed
            server.kill()
            await asyncio.to_thread(server.start)
            await asyncio.wait_for(again.wait(), 30)  # set when LISTEN works again
            await here.worker()
            changed = there.database.changed
            await here.queue.submit(JOB)
            await asyncio.wait_for(changed.wait(), 10)
            listener.cancel()


@pytest.mark.parametrize("url", ["mysql://host/database", "no address"])
async def test_another_render_kind_database_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="postgresql://user:password@host"):
        await Database.open(url)


async def test_a_database_of_a_newer_release_is_refused(each_database_url: str) -> None:
    async with sql_bench(each_database_url) as bench, bench.database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(QueueError, match="upgrade this server"):
        await Database.open(each_database_url)


async def test_the_migrations_create_the_tables_of_the_schema(bench: Bench) -> None:
    async with bench.database.write() as connection:
        differences = await connection.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync, opts={"compare_type": True}), metadata)
        )
    assert differences == []


async def test_an_upgrade_keeps_the_jobs(empty_database_url: str) -> None:
    engine = create_async_engine(database_url_of(empty_database_url))
    async with engine.begin() as connection:
        await connection.run_sync(migrate, "0001")
        await connection.execute(
            text(
                "INSERT INTO jobs (task_id, state, input, attempts, progress, created_at, stop_requested) "
                "VALUES ('old', 'queued', :input, 0, 0, 1000000.0, false)"
            ),
            {"input": JOB.model_dump_json()},
        )
    await engine.dispose()
    async with sql_bench(empty_database_url) as bench:
        assert await bench.take("w1") == "old"


async def test_several_servers_can_open_a_new_database_at_once(empty_database_url: str) -> None:
    databases = await asyncio.gather(*(Database.open(empty_database_url) for _ in range(5)))
    for database in databases:
        await database.close()


async def test_a_change_on_one_server_notifies_the_others(postgres: Postgres) -> None:
    url = postgres.create_database()
    async with sql_bench(url) as here, sql_bench(url) as there:
        await here.worker()
        listener = asyncio.create_task(there.database.listen())
        first = there.database.changed
        await asyncio.wait_for(first.wait(), 10)  # set once when LISTEN begins
        changed = there.database.changed
        await here.queue.submit(JOB)
        await asyncio.wait_for(changed.wait(), 5)
        assert there.database.poll_interval > 1
        listener.cancel()


async def test_the_clock_is_the_databases(postgres: Postgres) -> None:
    database = await Database.open(postgres.create_database())
    async with database.read() as connection:
        seconds = await connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())"))
    assert abs(database.clock() - float(seconds)) < 1
    await database.close()


async def test_only_the_workers_with_that_prefix_are_released(bench: Bench) -> None:
    mine, other = [(await bench.queue.submit(JOB)).task_id for _ in range(2)]
    await bench.take("a_1-0")
    await bench.take("ab1-0")
    await bench.dispatcher.release_workers("a_1-")
    assert (await state(bench, mine), await state(bench, other)) == (JobState.QUEUED, JobState.RUNNING)


async def test_a_worker_that_stops_gets_no_job_and_keeps_the_one_it_has(bench: Bench) -> None:
    running, waiting = [(await bench.queue.submit(JOB)).task_id for _ in range(2)]
    await bench.take("w1")
    await bench.worker("w1", WorkerState.STOPPING)
    with pytest.raises(WorkerStoppingError):
        await bench.dispatcher.pending_cancellations("w1")
    await bench.queue.cancel(running)
    assert await bench.dispatcher.pending_cancellations("w1") == [running]
    with pytest.raises(WorkerStoppingError):
        await bench.dispatcher.take("w1")
    assert await state(bench, waiting) is JobState.QUEUED


async def test_a_job_that_a_stopped_worker_never_began_is_delivered_at_once(bench: Bench) -> None:
    task_id = (await bench.queue.submit(JOB)).task_id
    await bench.take("w1")
    await bench.worker("w1", WorkerState.STOPPING)
    await bench.worker("w1", WorkerState.STOPPED)
    assert await bench.take("w2") == task_id


async def test_jobs_are_deleted_history_ttl_after_they_ended(bench: Bench) -> None:
    done, waiting = [(await bench.queue.submit(JOB)).task_id for _ in range(2)]
    await bench.take("w1")
    await bench.dispatcher.complete("w1", done, result(done).model_dump(mode="json"))
    bench.later(6 * 24 * 3600)
    await bench.dispatcher.sweep()
    assert await state(bench, done) is JobState.COMPLETED
    bench.later(2 * 24 * 3600)
    await bench.dispatcher.sweep()
    assert await bench.queue.get(done) is None
    assert await state(bench, waiting) is JobState.QUEUED
    async with bench.database.read() as connection:
        kept = await connection.scalar(text("SELECT count(*) FROM events"))
    assert kept == 1, "the events of the deleted job are deleted, too"


async def test_a_job_whose_worker_returns_while_it_is_recovered_stays_with_that_worker(each_database_url: str) -> None:
    """The bucket is read after the lease was found expired and before the job is queued again, which may take long."""

    async def find_result(task_id: str) -> JobResult | None:
        await made.dispatcher.record_progress("w1", task_id, Progress(progress=5, stage=Stage.DENOISING))
        return None

    async with sql_bench(each_database_url, find_result=find_result) as made:
        await made.worker()
        task_id = (await made.queue.submit(JOB)).task_id
        await made.take("w1")
        made.later(61)
        await made.dispatcher.sweep()
        assert await state(made, task_id) is JobState.RUNNING


async def test_no_statement_scans_the_jobs_that_have_ended(bench: Bench) -> None:
    """The database explains each statement of the queue and the dispatcher as it was sent."""
    await add_history(bench.database, 20_000)
    sent: list[tuple[str, Any]] = []

    @event.listens_for(bench.database._engine.sync_engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        sent.append((statement, parameters))

    failure = JobFailure(error="bad luck", error_code=ErrorCode.OOM_ERROR)
    first, second, third = [(await bench.queue.submit(JOB)).task_id for _ in range(3)]
    await bench.queue.get(third)
    await bench.queue.summary()
    await bench.take("w1")
    await bench.dispatcher.record_progress("w1", first, Progress(progress=1, stage=Stage.DENOISING))
    await bench.dispatcher.ping("w1", [first])
    await bench.worker("w1")
    await bench.dispatcher.complete("w1", first, result(first).model_dump(mode="json"))
    await bench.take("w1")
    await bench.dispatcher.fail("w1", second, failure)
    await bench.take("w1")
    await bench.queue.cancel(third)
    await bench.dispatcher.pending_cancellations("w1")
    await bench.queue.submit(JOB, Idempotency.of("key", JOB))
    await bench.queue.submit(JOB, Idempotency.of("key", JOB))
    await bench.dispatcher.sweep()
    await bench.dispatcher.take("w1")
    await bench.dispatcher.release_worker("w1")
    assert await bench.queue.retry(second)
    for status in (None, *JobStatus):
        await bench.queue.list_jobs("", status=status, cursor=10_000, limit=20)
    await bench.queue.history(second, 1)
    await bench.queue.record(second)
    await bench.queue.delete_video(first)

    statements = [(sql, parameters) for sql, parameters in sent if "jobs" in sql or "events" in sql]
    statements = [each for each in statements if not each[0].startswith("INSERT INTO jobs")]
    assert len(statements) > 50
    on_sqlite = bench.database._engine.dialect.name == "sqlite"
    explain, scan = (
        ("EXPLAIN QUERY PLAN", r"SCAN (TABLE )?(jobs|events)(?! USING)|USE TEMP B-TREE FOR ORDER BY")
        if on_sqlite
        else ("EXPLAIN", r"Seq Scan on (jobs|events)")
    )
    async with bench.database.read() as connection:
        for sql, parameters in statements:
            for step in await connection.exec_driver_sql(f"{explain} {sql}", parameters):
                assert not re.search(scan, str(step)), sql
