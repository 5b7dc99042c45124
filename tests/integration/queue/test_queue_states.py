"""The SQL queue against a small model of it: any calls in any order, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from contract.errors import ErrorCode, JobFailure
from contract.result import JobResult, Progress, Stage
from contract.worker import WorkerReport, WorkerState
from shim.queue.base import Idempotency, IdempotencyConflictError, ModelNotLoadedError, QueueFullError, Submission
from shim.queue.database import Database
from shim.queue.dispatch import Delivery, Dispatcher
from shim.queue.job import JobState
from shim.queue.lost_jobs import Loss
from shim.queue.schema import jobs as jobs_table
from shim.queue.sql import SqlQueue
from tests.support.full import full
from tests.support.queues import JOB, Clock, result

T = TypeVar("T")
MAX_WAITING = 4
MAX_ATTEMPTS = 3
MAX_NOT_BEGUN = 10
LEASE = 60.0
WORKERS = st.sampled_from(["w1", "w2", "w3"])
OTHER = JOB.model_copy(update={"duration": 6})
FAILURE = JobFailure(error="bad luck", error_code=ErrorCode.OOM_ERROR)


@dataclass
class Expected:
    """The model of a job."""

    task_id: str
    state: JobState = JobState.QUEUED
    worker: str | None = None
    lost_attempts: int = 0
    not_begun: int = 0
    progress: int = 0
    lease: float = 0.0
    turn: int = 0

    @property
    def is_running(self) -> bool:
        return self.state is JobState.RUNNING


class QueueMachine(RuleBasedStateMachine):
    """`jobs` is the model, in the order of submission; `queue` and `dispatcher` are the real ones.

    The database stays open from one example to the next and is emptied between them.
    """

    def __init__(self, runner: asyncio.Runner, database: Database, clock: Clock) -> None:
        super().__init__()
        self.runner = runner
        self.database = database
        self.clock = clock
        self.stored: set[str] = set()
        self.jobs: dict[str, Expected] = {}
        self.keys: dict[str, tuple[str, bool]] = {}
        self.last_seen: dict[str, float] = {}
        self.sending_reports: set[str] = set()
        self.ended = dict.fromkeys((JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED), 0)
        self.queue = SqlQueue(self.database, max_queue_size=MAX_WAITING)
        self.dispatcher = Dispatcher(self.database, find_result=self.find_result, max_attempts=MAX_ATTEMPTS)
        self.run(self.empty())

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    async def empty(self) -> None:
        async with self.database.write() as connection:
            for table in ("jobs", "workers", "render_times"):
                await connection.execute(text(f"DELETE FROM {table}"))
            await connection.execute(text("UPDATE outcomes SET total = 0"))

    async def find_result(self, task_id: str) -> JobResult | None:
        return result(task_id) if task_id in self.stored else None

    # What the model does.

    @property
    def waiting(self) -> list[Expected]:
        waiting = [job for job in self.jobs.values() if job.state is JobState.QUEUED]
        return sorted(waiting, key=lambda job: job.turn)  # within a turn in the order of submission

    def next_turn(self) -> int:
        """The turn of a job that one client queues now."""
        turns = [job.turn for job in self.waiting]
        return max(min((turn for turn in turns if turn > 0), default=1), max(turns, default=0) + 1)

    def end(self, job: Expected, state: JobState) -> None:
        job.state = state
        self.ended[state] += 1

    def recover(self, *jobs: Expected, loss: Loss = Loss.SILENT) -> None:
        for job in jobs:
            if loss is Loss.EXITED or (loss is Loss.SILENT and job.not_begun == 0):
                job.lost_attempts += 1
            if loss is not Loss.SILENT:
                job.not_begun = max(job.not_begun - 1, 0)
            if job.task_id in self.stored:
                self.end(job, JobState.COMPLETED)
                job.progress = 100
            elif loss is not Loss.STOPPED and (job.lost_attempts >= MAX_ATTEMPTS or job.not_begun >= MAX_NOT_BEGUN):
                self.end(job, JobState.FAILED)
            else:
                job.state, job.worker, job.turn = JobState.QUEUED, None, 0

    def running_on(self, worker: str) -> list[Expected]:
        return [job for job in self.jobs.values() if job.is_running and job.worker == worker]

    def has_ready_worker(self) -> bool:
        return any(seen > self.clock.now - 60 for seen in self.last_seen.values())

    def taken(self, worker: str, job: Expected, delivery: Delivery | None) -> None:
        assert delivery is not None
        assert delivery.task_id == job.task_id, "the order of the turns"
        job.state, job.worker, job.lease = JobState.RUNNING, worker, self.clock.now + LEASE
        job.not_begun += 1

    # What can happen.

    @initialize()
    def a_worker_is_there(self) -> None:
        self.a_worker_reports("w1")

    @rule(seconds=st.sampled_from([1, 20, 61]))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(worker=WORKERS)
    def a_worker_reports(self, worker: str) -> None:
        self.run(self.dispatcher.report(worker, WorkerReport(state=WorkerState.READY, model="scripted")))
        self.last_seen[worker] = self.clock.now
        self.sending_reports.add(worker)
        for job in self.running_on(worker):
            job.lease = self.clock.now + LEASE

    @rule(count=st.integers(1, 6))
    def clients_submit_at_the_same_moment(self, count: int) -> None:
        async def submit_all() -> list[Submission | BaseException]:
            calls = (self.queue.submit(JOB) for _ in range(count))
            return await asyncio.gather(*calls, return_exceptions=True)

        outcomes = self.run(submit_all())
        accepted = [outcome.job for outcome in outcomes if isinstance(outcome, Submission)]
        refused = [outcome for outcome in outcomes if not isinstance(outcome, Submission)]
        if self.has_ready_worker():
            assert len(accepted) == min(count, max(MAX_WAITING - len(self.waiting), 0))
            assert all(isinstance(outcome, QueueFullError) for outcome in refused)
        else:
            assert all(isinstance(outcome, ModelNotLoadedError) for outcome in outcomes)
        for job in sorted(accepted, key=lambda job: job.queue_position or 0):
            self.jobs[job.task_id] = Expected(job.task_id, turn=self.next_turn())

    @rule(key=st.sampled_from(["k1", "k2"]), other=st.booleans())
    def a_client_submits_with_a_key(self, key: str, other: bool) -> None:
        asked = OTHER if other else JOB
        try:
            job = self.run(self.queue.submit(asked, Idempotency.of(key, asked)))
        except IdempotencyConflictError:
            assert self.keys[key][1] is not other
        except QueueFullError:
            assert key not in self.keys
            assert len(self.waiting) >= MAX_WAITING
        except ModelNotLoadedError:
            assert key not in self.keys
            assert not self.has_ready_worker()
        else:
            assert self.keys.setdefault(key, (job.task_id, other)) == (job.task_id, other)
            self.jobs.setdefault(job.task_id, Expected(job.task_id, turn=self.next_turn()))

    @rule(worker=WORKERS)
    def a_worker_asks(self, worker: str) -> None:
        self.recover(*self.running_on(worker))
        waiting = self.waiting
        delivery = self.run(self.dispatcher.take(worker))
        if waiting:
            self.taken(worker, waiting[0], delivery)
            self.last_seen[worker] = self.clock.now
        else:
            assert delivery is None
            if self.last_seen.get(worker, 0.0) <= self.clock.now - 15:
                self.last_seen[worker] = self.clock.now

    @precondition(lambda self: self.waiting)
    @rule()
    def workers_ask_at_the_same_moment(self) -> None:
        workers = ["x1", "x2", "x3", "x4", "x5", "x6"]
        for worker in workers:
            self.recover(*self.running_on(worker))
        waiting = self.waiting

        async def take_all() -> list[Delivery | None]:
            return await asyncio.gather(*(self.dispatcher.take(worker) for worker in workers))

        deliveries = dict(zip(workers, self.run(take_all()), strict=True))
        taken = {delivery.task_id: worker for worker, delivery in deliveries.items() if delivery is not None}
        assert set(taken) == {job.task_id for job in waiting[: len(workers)]}, (
            "each job once, in the order of the queue"
        )
        for job in waiting[: len(workers)]:
            self.taken(taken[job.task_id], job, deliveries[taken[job.task_id]])
        for worker in workers:
            self.last_seen[worker] = self.clock.now  # those that got no job report below
        for worker, delivery in deliveries.items():
            if delivery is None:
                self.run(self.dispatcher.report(worker, WorkerReport(state=WorkerState.READY, model="scripted")))
                self.sending_reports.add(worker)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), percent=st.integers(0, 99))
    def progress_arrives(self, data: st.DataObject, percent: int) -> None:
        job = self.any_job(data)
        worker = self.any_worker(data, job)
        progress = Progress(progress=percent, stage=Stage.DENOISING)
        self.run(self.dispatcher.record_progress(worker, job.task_id, progress))
        if job.is_running and job.worker == worker:
            job.progress, job.lease = max(job.progress, percent), self.clock.now + LEASE
            job.not_begun = 0

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def a_ping_names_a_job(self, data: st.DataObject) -> None:
        job = self.any_job(data)
        worker = self.any_worker(data, job)
        self.run(self.dispatcher.ping(worker, [job.task_id]))
        if job.is_running and job.worker == worker:
            job.not_begun = 0
        if job.is_running and job.worker == worker and worker not in self.sending_reports:
            job.lease = self.clock.now + LEASE
            if worker in self.last_seen:
                self.last_seen[worker] = self.clock.now

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def a_result_arrives(self, data: st.DataObject) -> None:
        job = self.any_job(data)
        worker = self.any_worker(data, job)
        output = result(job.task_id).model_dump(mode="json")
        completed = self.run(self.dispatcher.complete(worker, job.task_id, output))
        assert completed is not job.state.is_terminal
        if completed:
            self.end(job, JobState.COMPLETED)
            job.progress = 100

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def a_failure_arrives(self, data: st.DataObject) -> None:
        job = self.any_job(data)
        worker = self.any_worker(data, job)
        failed = self.run(self.dispatcher.fail(worker, job.task_id, FAILURE))
        assert failed is (job.is_running and job.worker == worker)
        if failed:
            self.end(job, JobState.FAILED)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def a_manifest_is_stored(self, data: st.DataObject) -> None:
        job = self.any_job(data)
        if job.is_running:
            self.stored.add(job.task_id)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def a_client_cancels(self, data: st.DataObject) -> None:
        job = self.any_job(data)
        seen = self.run(self.queue.cancel(job.task_id))
        if not job.state.is_terminal:
            self.end(job, JobState.CANCELLED)
        assert seen is not None
        assert seen.state is job.state

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def a_client_retries(self, data: st.DataObject) -> None:
        job = self.any_job(data)
        try:
            retried = self.run(self.queue.retry(job.task_id))
        except QueueFullError:
            assert len(self.waiting) >= MAX_WAITING
            return
        assert retried is (job.state is JobState.FAILED)
        if retried:
            job.turn = self.next_turn()
            job.state, job.worker, job.progress = JobState.QUEUED, None, 0
            job.lost_attempts, job.not_begun = 0, 0

    @rule(data=st.data(), count_attempt=st.booleans())
    def a_worker_is_lost(self, data: st.DataObject, count_attempt: bool) -> None:
        running = [job.worker for job in self.jobs.values() if job.is_running and job.worker]
        worker = data.draw(st.sampled_from([*running, "w1", "w2"]))
        lost = self.running_on(worker)
        self.run(self.dispatcher.release_worker(worker, count_attempt=count_attempt))
        self.recover(*lost, loss=Loss.EXITED if count_attempt else Loss.STOPPED)
        self.last_seen.pop(worker, None)
        self.sending_reports.discard(worker)

    @rule()
    def expired_leases_are_swept(self) -> None:
        expired = [job for job in self.jobs.values() if job.is_running and job.lease < self.clock.now]
        self.run(self.dispatcher.sweep())
        self.recover(*expired)

    def any_job(self, data: st.DataObject) -> Expected:
        """Any job, but mostly a running one: most faults would show there."""
        running = [job for job in self.jobs.values() if job.is_running]
        return data.draw(st.sampled_from([*running * 3, *self.jobs.values()]))

    def any_worker(self, data: st.DataObject, job: Expected) -> str:
        """Any worker, but mostly the one that runs the job."""
        return data.draw(st.sampled_from([job.worker or "w1"] * 3 + ["w1", "w2", "w3"]))

    # What must hold after each step.

    @invariant()
    def the_queue_is_as_the_model(self) -> None:
        self.run(self.compare())

    async def compare(self) -> None:
        """Reads every job in one transaction, which is faster than one for each."""
        waiting = {job.task_id: position for position, job in enumerate(self.waiting, start=1)}
        async with self.database.read() as connection:
            for expected in self.jobs.values():
                job = await self.queue._find(connection, jobs_table.c.task_id == expected.task_id)
                assert job is not None
                assert job.state is expected.state
                assert job.progress == expected.progress
                assert (job.result is not None) == (job.state is JobState.COMPLETED)
                assert (job.failure is not None) == (job.state in (JobState.FAILED, JobState.CANCELLED))
                assert job.queue_position == waiting.get(job.task_id)
        summary = await self.queue.summary()
        assert summary.waiting == len(waiting)
        assert summary.running == sum(job.is_running for job in self.jobs.values())
        assert await self.queue.ended() == self.ended


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("database_url", ["sqlite", full("postgresql")], indirect=True)
@pytest.mark.parametrize("examples", [8, full(200)])
def test_the_queue_does_what_its_model_does(database_url: str, examples: int) -> None:
    with asyncio.Runner() as runner:
        clock = Clock()
        database = runner.run(Database.open(database_url, clock=clock, worker_timeout=LEASE))

        class Machine(QueueMachine):
            def __init__(self) -> None:
                super().__init__(runner, database, clock)

        try:
            run_state_machine_as_test(
                Machine,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=50,
                    deadline=None,
                    print_blob=True,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(database.close())
