"""What only RunPod does: more job states, rejected requests, outages, and deleted jobs."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from contract.errors import ErrorCode, JobFailure
from contract.job import InvalidInputError, Profile, Resolution
from contract.render_times import execution_timeout
from contract.result import InlineResult, Manifest
from contract.retry import RetryPolicy
from shim.queue.base import QueueFullError, QueueUnavailableError
from shim.queue.job import JobState
from shim.queue.observer import JobObserver
from shim.queue.runpod import RunPodQueue
from tests.support.queues import JOB, Clock, result

KEY = "rpa_a-secret-key"
HEALTH = {"jobs": {"inQueue": 0, "inProgress": 0}, "workers": {"idle": 1, "running": 0}}
Answer = tuple[int, Any] | Exception


class Cloud:
    """Answers each path with what the test set: the next of a list, or always the same."""

    def __init__(self, **answers: list[Answer] | Answer) -> None:
        self.answers = {"health": (200, HEALTH), **answers}
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers[request.url.path.split("/")[3]]
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        status, body = answer
        content = body if isinstance(body, str) else json.dumps(body)
        return httpx.Response(status, content=content, headers={"Retry-After": "0"} if status == 429 else {})

    def paths(self, word: str) -> list[str]:
        return [request.url.path for request in self.requests if request.url.path.split("/")[3] == word]


def queue_on(
    cloud: Callable[[httpx.Request], httpx.Response], clock: Clock | None = None, observer: JobObserver | None = None
) -> RunPodQueue:
    return RunPodQueue(
        endpoint_id="ep",
        api_key=KEY,
        transport=httpx.MockTransport(cloud),
        clock=clock or Clock(),
        max_queue_size=2,
        retries=RetryPolicy(first=0.001, attempts=5),
        observer=observer,
    )


def job_status(status: str, **fields: Any) -> Answer:
    return 200, {"id": "job-1", "status": status, **fields}


async def test_requests_carry_the_key_and_the_documented_shapes() -> None:
    cloud = Cloud(run=(200, {"id": "job-1", "status": "IN_QUEUE"}))
    job = (await queue_on(cloud).submit(JOB)).job
    assert (job.task_id, job.state) == ("job-1", JobState.QUEUED)
    run = cloud.requests[-1]
    assert str(run.url) == "https://api.runpod.ai/v2/ep/run"
    assert run.headers["authorization"] == f"Bearer {KEY}"
    body = json.loads(run.content)
    assert body["input"] == JOB.wire()
    limit = execution_timeout(JOB)
    assert body["policy"] == {"executionTimeout": 1000 * limit, "ttl": 1000 * (86_400 + limit)}


async def test_a_request_for_a_webhook_is_refused_and_not_sent() -> None:
    cloud = Cloud(run=(200, {"id": "job-1", "status": "IN_QUEUE"}))
    with pytest.raises(InvalidInputError, match="RunPod") as caught:
        await queue_on(cloud).submit(JOB, webhook_url="https://receiver.example/")
    assert caught.value.failure.error_code is ErrorCode.INVALID_REQUEST
    assert cloud.requests == []


async def test_each_job_has_a_time_limit_of_its_own() -> None:
    cloud = Cloud(run=(200, {"id": "job-1", "status": "IN_QUEUE"}))
    queue = RunPodQueue(
        endpoint_id="ep", api_key=KEY, transport=httpx.MockTransport(cloud), profile=Profile.FAST, max_queue_size=2
    )
    short = JOB.model_copy(update={"duration": 5, "resolution": Resolution.P720})
    long = JOB.model_copy(update={"duration": 10, "resolution": Resolution.P1080})
    named = long.model_copy(update={"model": Profile.QUALITY.model})
    for job in (short, long, named):
        await queue.submit(job)
    limits = [
        json.loads(request.content)["policy"]["executionTimeout"] for request in cloud.requests if request.content
    ]
    assert limits == [1000 * execution_timeout(job, Profile.FAST) for job in (short, long, named)]
    assert limits[0] < limits[1] < limits[2] == 1000 * execution_timeout(named)


@pytest.mark.parametrize(
    ("status", "state", "code"),
    [
        ("TIMED_OUT", JobState.FAILED, ErrorCode.GENERATION_FAILED),
        ("CANCELLED", JobState.CANCELLED, ErrorCode.CANCELLED),
        ("RUNNING", JobState.RUNNING, None),
        ("SOME_NEW_WORD", JobState.RUNNING, None),
    ],
)
async def test_each_state_of_runpod_has_a_state_of_ours(status: str, state: JobState, code: ErrorCode | None) -> None:
    job = await queue_on(Cloud(status=job_status(status))).get("job-1")
    assert job is not None
    assert job.state is state
    assert (job.failure.error_code if job.failure else None) is code


async def test_a_failure_of_our_handler_is_returned_and_a_traceback_is_not() -> None:
    failure = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)
    traceback = json.dumps({"error_type": "<class 'KeyError'>", "error_traceback": "Traceback: secret path"})
    for error, expected in ((failure.model_dump_json(), failure), (traceback, None), (None, None), ({"a": 1}, None)):
        job = await queue_on(Cloud(status=job_status("FAILED", error=error))).get("job-1")
        assert job is not None
        assert job.failure is not None
        if expected is not None:
            assert job.failure == expected
        else:
            assert job.failure.error_code is ErrorCode.GENERATION_FAILED
            assert "secret path" not in job.failure.error


async def test_a_video_in_the_result_of_a_worker_without_a_bucket_is_named_as_lost() -> None:
    inline = InlineResult(**result("job-1").model_dump(), video_base64="AAAA").model_dump(mode="json")
    job = await queue_on(Cloud(status=job_status("COMPLETED", output=inline))).get("job-1")
    assert job is not None
    assert job.result is None
    assert job.failure is not None
    assert job.failure.error_code is ErrorCode.STORAGE_UNAVAILABLE
    assert "BUCKET_*" in job.failure.error


async def test_a_job_that_runpod_has_deleted_is_none() -> None:
    assert await queue_on(Cloud(status=(404, {"error": "not found"}))).get("job-1") is None


@pytest.mark.parametrize("refusal", [(429, "slow down"), (500, "oops"), (502, "bad gateway"), (503, "")])
async def test_a_rejected_request_is_retried(refusal: Answer) -> None:
    cloud = Cloud(status=[refusal, refusal, job_status("IN_PROGRESS")])
    job = await queue_on(cloud).get("job-1")
    assert job is not None
    assert job.state is JobState.RUNNING
    assert len(cloud.paths("status")) == 3


async def test_an_outage_raises_queue_unavailable_after_five_attempts() -> None:
    cloud = Cloud(status=httpx.ConnectError("no route"))
    with pytest.raises(QueueUnavailableError) as caught:
        await queue_on(cloud).get("job-1")
    assert len(cloud.paths("status")) == 5
    assert KEY not in str(caught.value)


async def test_a_submission_that_may_have_arrived_is_not_sent_twice() -> None:
    cloud = Cloud(run=httpx.ReadTimeout("no answer"))
    with pytest.raises(QueueUnavailableError):
        await queue_on(cloud).submit(JOB)
    assert len(cloud.paths("run")) == 1


async def test_a_submission_that_did_not_arrive_is_sent_again() -> None:
    cloud = Cloud(run=[httpx.ConnectError("no route"), (429, ""), (200, {"id": "job-1", "status": "IN_QUEUE"})])
    assert (await queue_on(cloud).submit(JOB)).task_id == "job-1"


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_not_retried_and_not_shown(status: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="shim")
    cloud = Cloud(status=(status, "denied"))
    with pytest.raises(QueueUnavailableError, match="RUNPOD_API_KEY") as caught:
        await queue_on(cloud).get("job-1")
    assert len(cloud.paths("status")) == 1
    assert KEY not in str(caught.value) + caplog.text


@pytest.mark.parametrize("answer", [(200, "no json"), (200, [1]), (400, {"error": "bad"})])
async def test_an_unexpected_response_raises_queue_unavailable(answer: Answer) -> None:
    with pytest.raises(QueueUnavailableError):
        await queue_on(Cloud(status=answer)).get("job-1")


async def test_pollers_share_one_request_a_second() -> None:
    cloud, clock = Cloud(status=job_status("IN_PROGRESS")), Clock()
    queue = queue_on(cloud, clock)
    await asyncio.gather(*(queue.get("job-1") for _ in range(200)))
    await queue.get("job-1")
    assert len(cloud.paths("status")) == 1
    clock.now += 1.1
    await asyncio.gather(*(queue.get("job-1") for _ in range(200)))
    assert len(cloud.paths("status")) == 2


async def test_a_cancelled_poller_does_not_cancel_the_shared_request() -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def slow(_: httpx.Request) -> httpx.Response:
        started.set()
        await go_on.wait()
        return httpx.Response(200, json={"id": "job-1", "status": "IN_QUEUE"})

    queue = RunPodQueue(endpoint_id="ep", api_key=KEY, transport=httpx.MockTransport(slow))
    first, second = asyncio.create_task(queue.get("job-1")), asyncio.create_task(queue.get("job-1"))
    await started.wait()
    first.cancel()
    go_on.set()
    job = await second
    assert job is not None
    assert job.state is JobState.QUEUED


async def test_a_finished_job_is_not_requested_again() -> None:
    cloud, clock = Cloud(status=job_status("COMPLETED", output=result("job-1").model_dump(mode="json"))), Clock()
    queue = queue_on(cloud, clock)
    for _ in range(3):
        clock.now += 60
        job = await queue.get("job-1")
        assert job is not None
        assert job.result is not None
    assert len(cloud.paths("status")) == 1


async def test_progress_that_comes_out_of_order_never_falls() -> None:
    clock = Clock()
    outputs = [{"progress": percent, "stage": "denoising", "elapsed_time": 1} for percent in (30, 20, 45)]
    cloud = Cloud(status=[job_status("IN_PROGRESS", output=output) for output in outputs])
    queue = queue_on(cloud, clock)
    shown = []
    for _ in outputs:
        clock.now += 2
        job = await queue.get("job-1")
        assert job is not None
        shown.append(job.progress)
    assert shown == [30, 30, 45]


async def test_jobs_are_accepted_with_no_worker_and_rejected_when_too_many_wait() -> None:
    idle = {"jobs": {"inQueue": 0, "inProgress": 0}, "workers": {"idle": 0, "running": 0, "initializing": 0}}
    accepted = (200, {"id": "job-1", "status": "IN_QUEUE"})
    queue = queue_on(Cloud(health=(200, idle), run=accepted))
    await queue.check_ready()
    await queue.submit(JOB)
    busy = {**HEALTH, "jobs": {"inQueue": 2, "inProgress": 1}}
    with pytest.raises(QueueFullError):
        await queue_on(Cloud(health=(200, busy), run=accepted)).submit(JOB)


class Observed(JobObserver):
    """Records the calls."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.ends: list[tuple[JobState, ErrorCode | None]] = []

    def started(self, waited: float) -> None:
        self.waits.append(waited)

    def ended(
        self, state: JobState, *, failure: JobFailure | None = None, result: Manifest | None = None, count: int = 1
    ) -> None:
        self.ends.append((state, failure.error_code if failure is not None else None))


async def test_the_observer_receives_an_end_once_and_only_of_a_job_seen_before() -> None:
    oom = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR).model_dump_json()
    failed = job_status("FAILED", error=oom, delayTime=1500, executionTime=9000)
    cloud = Cloud(run=(200, {"id": "job-1"}), status=[job_status("IN_PROGRESS"), failed, failed])
    observed, clock = Observed(), Clock()
    queue = queue_on(cloud, clock, observed)
    await queue.submit(JOB)
    for _ in range(4):
        clock.now += 2
        await queue.get("job-1")
    assert (observed.waits, observed.ends) == ([1.5], [(JobState.FAILED, ErrorCode.OOM_ERROR)])
    restarted = queue_on(cloud, clock, observed)
    await restarted.get("job-1")
    assert len(observed.ends) == 1, "a process before this one may have counted it"
