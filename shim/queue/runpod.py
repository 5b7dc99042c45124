"""RunPod's queue: jobs go to a serverless endpoint, over its HTTP API.

Paths, shapes and limits are those of https://docs.runpod.io/serverless/endpoints/operations. RunPod forgets a job
half an hour after it ended; from then on the manifest in the bucket answers (`shim.tasks`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import httpx
from pydantic import ValidationError

from contract.errors import ErrorCode, JobFailure
from contract.job import JobInput
from contract.result import Manifest, Progress, Stage
from shim.http_client import HttpClient
from shim.queue.base import (
    NO_VIDEO,
    Backlog,
    Idempotency,
    Job,
    JobObserver,
    JobState,
    Kind,
    QueueFullError,
    QueueUnavailableError,
    RenderTimes,
    Workers,
    kind_of,
)

#: RunPod's words for the states of a job.
STATE_WORDS: Final[Mapping[JobState, str]] = {
    JobState.QUEUED: "IN_QUEUE",
    JobState.RUNNING: "IN_PROGRESS",
    JobState.COMPLETED: "COMPLETED",
    JobState.FAILED: "FAILED",
    JobState.CANCELLED: "CANCELLED",
}
_STATES: Final = {word: state for state, word in STATE_WORDS.items()} | {
    "RUNNING": JobState.RUNNING,
    "TIMED_OUT": JobState.FAILED,
}

#: Seconds for which an answer is shared between pollers.
_FRESH: Final = 1.0
#: How many jobs' last answers are kept.
_REMEMBERED: Final = 10_000
_ATTEMPTS: Final = 5
_FIRST_DELAY: Final = 0.25
_LONGEST_DELAY: Final = 5.0

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Seen:
    """A job as last answered, when that was, and when it was first heard of (both on the monotonic clock)."""

    job: Job
    at: float
    first_at: float


class RunPodQueue:
    """A `JobQueue` over a RunPod serverless endpoint.

    `base_url` as in RunPod's API (`https://api.runpod.ai/v2`); `execution_timeout` in seconds is how long RunPod lets
    one job run. The bound on waiting jobs is checked against the endpoint's own count, which other shims may be
    adding to at the same moment: it is exact for one shim, approximate for several. RunPod knows no idempotency keys:
    they are remembered here, for as long as this shim lives. `observer` is told of the ends of jobs that this shim has
    seen waiting or running, when it is asked for them.
    """

    def __init__(
        self,
        *,
        endpoint_id: str,
        api_key: str,
        base_url: str = "https://api.runpod.ai/v2",
        max_queue_size: int = 10,
        execution_timeout: float = 3600.0,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        observer: JobObserver | None = None,
    ) -> None:
        self._http = HttpClient(
            base_url=f"{base_url.rstrip('/')}/{endpoint_id}",
            headers={"Authorization": f"Bearer {api_key}"},
            # Slightly over a multiple of 3 s, the TCP retransmission timer.
            timeout=httpx.Timeout(20, connect=3.05),
            transport=transport,
        )
        self._max_queue_size = max_queue_size
        self._execution_timeout = execution_timeout
        self._clock = clock
        self._observer = observer or JobObserver()
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._flights: dict[str, asyncio.Task[Any]] = {}
        self._health_seen: tuple[float, Mapping[str, Any]] | None = None
        self._times: dict[Kind, float] = {}
        self._submitting = asyncio.Lock()
        self._submitted: OrderedDict[str, tuple[str, str]] = OrderedDict()  # idempotency key -> fingerprint, task_id

    async def close(self) -> None:
        """Let go of connections."""
        await self._http.aclose()

    async def submit(self, job_input: JobInput, idempotency: Idempotency | None = None) -> Job:
        """Queue a job; RunPod starts a worker for it if it must.

        A request that may have arrived is not sent twice: after a timeout the error is QueueUnavailableError, and the
        job may yet run, once.
        """
        async with self._submitting:
            if idempotency is not None and idempotency.key in self._submitted:
                fingerprint, task_id = self._submitted[idempotency.key]
                idempotency.check(fingerprint)
                return await self.get(task_id) or Job(task_id, JobState.QUEUED)
            waiting = (await self._health(fresh=True))["jobs"]["inQueue"]
            if waiting >= self._max_queue_size:
                raise QueueFullError(f"The queue is full: {waiting} tasks are waiting")
            body = {
                "input": job_input.wire(),
                "policy": {"executionTimeout": int(self._execution_timeout * 1000)},
            }
            answer = _body(await self._ask("POST", "/run", json=body, repeatable=False))
            job = Job(str(answer["id"]), JobState.QUEUED)
            if idempotency is not None:
                self._submitted[idempotency.key] = idempotency.fingerprint, job.task_id
                _keep_newest(self._submitted)
        self._remember(job)
        self._observer.submitted()
        return job

    async def get(self, task_id: str) -> Job | None:
        """The job as of now, or of a second ago; None once RunPod has forgotten it."""
        seen = self._seen.get(task_id)
        if seen is not None and (seen.job.state.is_terminal or self._clock() - seen.at < _FRESH):
            return seen.job
        return await self._shared(f"status/{task_id}", lambda: self._fetch(task_id))

    async def _fetch(self, task_id: str) -> Job | None:
        response = await self._ask("GET", f"/status/{task_id}")
        if response.status_code == 404:
            return None
        answer = _body(response)
        before = self._seen.get(task_id)
        job = self._remember(self._job(task_id, answer))
        if before is not None and not before.job.state.is_terminal and job.state.is_terminal:
            self._tell_ended(job, answer.get("delayTime"))
        return job

    def _tell_ended(self, job: Job, delay: float | None) -> None:
        """`delay` is RunPod's, in milliseconds; a job that was cancelled while it waited has none."""
        code = job.failure.error_code if job.failure is not None else "a video"
        log.info("%s: %s with %s", job.task_id, job.state, code, extra={"task_id": job.task_id})
        if delay is not None and job.state is not JobState.CANCELLED:
            self._observer.started(delay / 1000)
        self._observer.ended(job.state, failure=job.failure, result=job.result)

    async def cancel(self, task_id: str) -> Job | None:
        """Stop a waiting or running job."""
        job = await self.get(task_id)
        if job is None or job.state.is_terminal:
            return job
        response = await self._ask("POST", f"/cancel/{task_id}")
        if response.status_code == 404:
            return None
        _body(response)
        return await self._fetch(task_id)

    async def backlog(self) -> Backlog:
        """How many jobs wait and run; RunPod does not tell their inputs."""
        health = await self._health()
        return Backlog(
            waiting=[None] * health["jobs"]["inQueue"],
            running=[None] * health["jobs"]["inProgress"],
            workers=(await self.workers()).ready,
        )

    async def workers(self) -> Workers:
        """The endpoint's workers, as RunPod counts them."""
        counts = (await self._health())["workers"]
        return Workers(
            ready=max(counts.get("ready", 0), counts.get("idle", 0) + counts.get("running", 0)),
            loading=counts.get("initializing", 0),
            failed=counts.get("unhealthy", 0),
        )

    async def render_times(self) -> RenderTimes:
        """Mean render times of the jobs that this process saw complete."""
        return self._times

    async def check_ready(self) -> None:
        """RunPod takes jobs at zero workers: that it answers is enough."""
        await self._health()

    async def _health(self, *, fresh: bool = False) -> Mapping[str, Any]:
        if not fresh and self._health_seen is not None and self._clock() - self._health_seen[0] < _FRESH:
            return self._health_seen[1]
        return await self._shared("health", self._fetch_health)

    async def _fetch_health(self) -> Mapping[str, Any]:
        answer = _body(await self._ask("GET", "/health"))
        health = {
            "jobs": {"inQueue": 0, "inProgress": 0, **answer.get("jobs", {})},
            "workers": answer.get("workers", {}),
        }
        self._health_seen = (self._clock(), health)
        return health

    async def _shared(self, key: str, fetch: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """One request for everyone who asks the same at the same time; a caller that leaves does not end it."""
        flight: asyncio.Task[T] | None = self._flights.get(key)
        if flight is None:
            flight = asyncio.create_task(fetch())
            self._flights[key] = flight
            flight.add_done_callback(lambda _: self._flights.pop(key, None))
        return await asyncio.shield(flight)

    async def _ask(self, method: str, path: str, *, json: Any = None, repeatable: bool = True) -> httpx.Response:
        """One request, tried again with back-off and full jitter on 429, 5xx and connections that fail.

        Raises:
            QueueUnavailableError: it failed five times, or the key is refused.
        """
        problem, delay = "", 0.0
        for attempt in range(_ATTEMPTS):
            await asyncio.sleep(delay)
            delay = random.uniform(0, min(_FIRST_DELAY * 2**attempt, _LONGEST_DELAY))  # nosec B311 # jitter, no secret
            try:
                response = await self._http.request(method, path, json=json)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
                problem = type(exc).__name__
                continue
            except httpx.TransportError as exc:
                problem = type(exc).__name__
                if not repeatable:
                    break
                continue
            if response.status_code in (401, 403):
                raise QueueUnavailableError("RunPod refuses the key in RUNPOD_API_KEY")
            if response.status_code != 429 and response.status_code < 500:
                return response
            problem = f"status {response.status_code}"
            delay = max(delay, min(_retry_after(response), _LONGEST_DELAY))
        log.error("RunPod: %s %s failed: %s", method, path, problem)
        raise QueueUnavailableError("RunPod's queue does not answer")

    def _job(self, task_id: str, answer: Mapping[str, Any]) -> Job:
        word = str(answer.get("status"))
        state = _STATES.get(word)
        if state is None:
            log.warning("RunPod: job %s has the unknown state %s", task_id, word)
            state = JobState.RUNNING
        elapsed = (answer.get("delayTime") or 0) / 1000
        if state is JobState.RUNNING:
            progress = _progress(answer.get("output"))
            return Job(task_id, state, progress.progress, progress.stage, elapsed + progress.elapsed_time)
        elapsed += (answer.get("executionTime") or 0) / 1000
        if state is JobState.COMPLETED:
            return self._completed(task_id, elapsed, answer.get("output"))
        return Job(task_id, state, elapsed_time=elapsed, failure=_failure(word, answer))

    def _completed(self, task_id: str, elapsed: float, output: Any) -> Job:
        try:
            manifest = Manifest.model_validate(output)
        except ValidationError:
            return Job(task_id, JobState.COMPLETED, elapsed_time=elapsed, failure=NO_VIDEO)
        kind = kind_of(manifest.input)
        seconds = manifest.timings.get("total", elapsed)
        mean = self._times.get(kind, seconds)
        self._times[kind] = mean + (seconds - mean) / 10
        return Job(task_id, JobState.COMPLETED, 100, Stage.STORING, elapsed, result=manifest)

    def _remember(self, job: Job) -> Job:
        """Keep the answer, with the progress and the time never below what was said before."""
        now = self._clock()
        before = self._seen.get(job.task_id)
        first_at = before.first_at if before is not None else now
        if not job.state.is_terminal:
            said = before.job if before is not None else job
            job = replace(
                job,
                progress=max(job.progress, said.progress),
                elapsed_time=max(job.elapsed_time, said.elapsed_time, now - first_at),
            )
        self._seen[job.task_id] = _Seen(job, now, first_at)
        self._seen.move_to_end(job.task_id)
        _keep_newest(self._seen)
        return job


def _keep_newest(remembered: OrderedDict[str, Any]) -> None:
    if len(remembered) > _REMEMBERED:
        remembered.popitem(last=False)


def _failure(word: str, answer: Mapping[str, Any]) -> JobFailure | None:
    match word:
        case "FAILED":
            error = answer.get("error")
            return JobFailure.from_wire(error if isinstance(error, str) else None)
        case "TIMED_OUT":
            return JobFailure(error="The task ran out of time", error_code=ErrorCode.GENERATION_FAILED)
        case "CANCELLED":
            return JobFailure(error="The task was cancelled", error_code=ErrorCode.CANCELLED)
        case _:
            return None


def _progress(output: Any) -> Progress:
    """What the worker last sent; a job that has just started has sent nothing yet."""
    try:
        return Progress.model_validate(output)
    except ValidationError:
        return Progress(progress=0, stage=Stage.ENCODING_PROMPT)


def _body(response: httpx.Response) -> Mapping[str, Any]:
    """The answer, decoded.

    Raises:
        QueueUnavailableError: it is an error, or no JSON object.
    """
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.is_error or not isinstance(answer, dict):
        log.error("RunPod: %s answered %d", response.request.url.path, response.status_code)
        raise QueueUnavailableError("RunPod's queue gave no useful answer")
    return answer


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else 0.0
