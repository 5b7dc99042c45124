"""RunPod's queue: jobs go to a serverless endpoint, over its HTTP API.

Source of paths, shapes and limits: https://docs.runpod.io/serverless/endpoints/operations. RunPod deletes a job half an
hour after it ended; from then on `shim.tasks` reads the manifest in the bucket.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import httpx

from contract.errors import VIDEO_DELETED
from contract.job import InvalidInputError, JobInput, Profile
from contract.render_times import execution_timeout
from contract.retry import RetryPolicy
from shim.http_client import HttpClient
from shim.queue.base import (
    NO_WEBHOOKS,
    Idempotency,
    NotSupportedError,
    QueueFullError,
    QueueSummary,
    QueueUnavailableError,
    RenderKind,
    Submission,
    TaskObjects,
    render_kind,
)
from shim.queue.job import JobEvent, JobPage, JobRecord, JobSnapshot, JobState, JobStatus
from shim.queue.observer import JobObserver
from shim.queue.runpod_answers import backlog_of, body_of, preview_in, snapshot, workers_of

#: Seconds that a job may wait in RunPod's queue; its default. RunPod deletes a job at the end of its `ttl`, even if it
#: runs. Source: https://docs.runpod.io/serverless/endpoints/send-requests.
_LONGEST_WAIT: Final = 86_400
#: Seconds for which pollers share one response.
_CACHE_SECONDS: Final = 1.0
#: Seconds between two reads of a job that clients watch.
_WATCH_SECONDS: Final = 2.0
#: The number of jobs whose last response is kept, and of idempotency keys.
_CACHE_SIZE: Final = 10_000
_RETRIES: Final = RetryPolicy(first=0.25, longest=5.0, attempts=5)

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _CachedJob:
    """A job as last read, the time of that, and the time when it was first seen (both on the monotonic clock).

    `preview` is the last one that this server has seen: RunPod keeps only the last progress, which may have none.
    """

    job: JobSnapshot
    read_at: float
    first_at: float
    preview: bytes | None = None


#: Errors of a request that RunPod has not received.
_NOT_SENT: Final = httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout


class _RetryableStatusError(Exception):
    """RunPod responded with 429 or 5xx. `retry_after` is in seconds, 0 without a Retry-After header."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"status {response.status_code}")
        text = response.headers.get("retry-after", "")
        self.retry_after = float(text) if text.isdecimal() else 0.0


class RunPodQueue:
    """A `JobQueue` over a RunPod serverless endpoint.

    `base_url` is RunPod's (`https://api.runpod.ai/v2`). `profile` renders DEFAULT_MODEL on the endpoint. If it is None,
    jobs of that model get the time limit of the slowest one. The limit of waiting jobs applies to the endpoint's own
    count, which other servers may change at the same moment: it is exact for one server, approximate for several.
    RunPod has no idempotency keys, so this object keeps them in memory.
    `observer` receives the end of a job when a client asks for it and this server saw the job wait or run before.
    """

    def __init__(
        self,
        *,
        endpoint_id: str,
        api_key: str,
        base_url: str = "https://api.runpod.ai/v2",
        max_queue_size: int = 10,
        profile: Profile | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        retries: RetryPolicy = _RETRIES,
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
        self._profile = profile
        self._clock = clock
        self._retries = retries
        self._observer = observer or JobObserver()
        self._cached_jobs: OrderedDict[str, _CachedJob] = OrderedDict()
        self._cached_health: tuple[float, Mapping[str, Any]] | None = None
        self._requests: dict[str, asyncio.Task[Any]] = {}
        self._render_times: dict[RenderKind, float] = {}
        self._submitting = asyncio.Lock()
        self._submitted: OrderedDict[str, tuple[str, str]] = OrderedDict()  # idempotency key -> fingerprint, task_id

    async def close(self) -> None:
        await self._http.aclose()

    async def submit(
        self,
        job_input: JobInput,
        idempotency: Idempotency | None = None,
        check: Callable[[], None] | None = None,
        *,
        client: str = "",  # noqa: ARG002 - RunPod has one line and one limit for all
        webhook_url: str | None = None,
    ) -> Submission:
        """Queues a job. RunPod starts a worker for it, and hides which weights its workers have.

        A request that RunPod may have received is not sent again: after a timeout this raises QueueUnavailableError,
        and the job may still run, once.
        """
        if webhook_url is not None:
            raise InvalidInputError(NO_WEBHOOKS)
        async with self._submitting:
            is_repeated = idempotency is not None and idempotency.key in self._submitted
            backlog = backlog_of(await self._health(fresh=not is_repeated))
            if idempotency is not None and is_repeated:
                fingerprint, task_id = self._submitted[idempotency.key]
                idempotency.check(fingerprint)
                earlier = await self.get(task_id) or JobSnapshot(task_id, JobState.QUEUED)
                return Submission(earlier, backlog, self._render_times)
            if len(backlog.waiting) >= self._max_queue_size:
                raise QueueFullError(f"The queue is full: {len(backlog.waiting)} tasks are waiting")
            if check is not None:
                check()
            limit = execution_timeout(job_input, self._profile)
            policy = {"executionTimeout": 1000 * limit, "ttl": 1000 * (_LONGEST_WAIT + limit)}
            body = {"input": job_input.wire(), "policy": policy}
            answer = body_of(await self._request("POST", "/run", json=body, repeatable=False))
            job = JobSnapshot(str(answer["id"]), JobState.QUEUED)
            if idempotency is not None:
                self._submitted[idempotency.key] = idempotency.fingerprint, job.task_id
                _drop_oldest(self._submitted)
        self._cache(job)
        self._observer.submitted()
        return Submission(job, backlog, self._render_times)

    async def get(self, task_id: str) -> JobSnapshot | None:
        """The job as it was at most a second ago; None if RunPod has deleted it."""
        cached = self._cached_jobs.get(task_id)
        if cached is not None and (cached.job.state.is_terminal or self._clock() - cached.read_at < _CACHE_SECONDS):
            return cached.job
        return await self._shared(f"status/{task_id}", lambda: self._fetch(task_id))

    async def _fetch(self, task_id: str) -> JobSnapshot | None:
        response = await self._request("GET", f"/status/{task_id}")
        if response.status_code == 404:
            return None
        answer = body_of(response)
        before = self._cached_jobs.get(task_id)
        job = self._cache(self._snapshot(task_id, answer), preview_in(answer))
        if before is not None and not before.job.state.is_terminal and job.state.is_terminal:
            self._observe_end(job, answer.get("delayTime"))
        return job

    def _observe_end(self, job: JobSnapshot, delay: float | None) -> None:
        """`delay` is RunPod's, in milliseconds; None for a job that was cancelled before it started."""
        if job.failure is not None:
            log.info("ended on RunPod as %s with %s", job.state, job.failure.error_code)
        else:
            log.info("ended on RunPod as %s", job.state)
        if delay is not None and job.state is not JobState.CANCELLED:
            self._observer.started(delay / 1000)
        self._observer.ended(job.state, failure=job.failure, result=job.result)

    async def cancel(self, task_id: str) -> JobSnapshot | None:
        job = await self.get(task_id)
        if job is None or job.state.is_terminal:
            return job
        response = await self._request("POST", f"/cancel/{task_id}")
        if response.status_code == 404:
            return None
        body_of(response)
        return await self._fetch(task_id)

    async def delete_video(self, task_id: str) -> bool:
        """Remembers the deletion in this process. RunPod itself keeps the result for half an hour."""
        cached = self._cached_jobs.get(task_id)
        if cached is not None:
            job = replace(cached.job, result=None, failure=VIDEO_DELETED)
            self._cached_jobs[task_id] = replace(cached, job=job)
        return False

    async def list_jobs(
        self,
        client: str,  # noqa: ARG002 - as below: the protocol fixes the parameters
        *,
        limit: int,  # noqa: ARG002
        status: JobStatus | None = None,  # noqa: ARG002
        cursor: int | None = None,  # noqa: ARG002
        after: str | None = None,  # noqa: ARG002
        oldest_first: bool = False,  # noqa: ARG002
    ) -> JobPage:
        raise NotSupportedError("RunPod's queue has no list of tasks: ask for each by its id, GET /tasks/{task_id}")

    async def history(self, task_id: str, after: int = 0) -> Sequence[JobEvent]:  # noqa: ARG002
        return ()

    async def record(self, task_id: str) -> JobRecord | None:  # noqa: ARG002
        return None

    async def retry(self, task_id: str, objects: TaskObjects | None = None) -> bool:  # noqa: ARG002
        """RunPod keeps a job that failed or timed out for half an hour. No failed job has a tombstone there."""
        response = await self._request("POST", f"/retry/{task_id}", repeatable=False)
        if response.status_code in (400, 404):
            return False
        body_of(response)
        self._cached_jobs.pop(task_id, None)
        return True

    async def preview(self, task_id: str) -> bytes | None:
        cached = self._cached_jobs.get(task_id)
        return cached.preview if cached is not None else None

    @contextmanager
    def watching(self, task_id: str) -> Iterator[asyncio.Event]:  # noqa: ARG002
        """RunPod signals no change, so the event is never set."""
        yield asyncio.Event()

    @property
    def watch_interval(self) -> float:
        return _WATCH_SECONDS

    async def summary(self) -> QueueSummary:
        health = await self._health()
        return QueueSummary(health["jobs"]["inQueue"], health["jobs"]["inProgress"], workers_of(health))

    async def check_ready(self) -> None:
        """RunPod accepts jobs with no worker running, so a response is enough."""
        await self._health()

    async def _health(self, *, fresh: bool = False) -> Mapping[str, Any]:
        cached = self._cached_health
        if not fresh and cached is not None and self._clock() - cached[0] < _CACHE_SECONDS:
            return cached[1]
        return await self._shared("health", self._fetch_health)

    async def _fetch_health(self) -> Mapping[str, Any]:
        answer = body_of(await self._request("GET", "/health"))
        health = {
            "jobs": {"inQueue": 0, "inProgress": 0, **answer.get("jobs", {})},
            "workers": answer.get("workers", {}),
        }
        self._cached_health = (self._clock(), health)
        return health

    async def _shared(self, key: str, fetch: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Sends one request for all callers that ask for `key` at the same time. A cancelled caller does not end it."""
        request: asyncio.Task[T] | None = self._requests.get(key)
        if request is None:
            request = asyncio.create_task(fetch())
            self._requests[key] = request
            request.add_done_callback(lambda _: self._requests.pop(key, None))
        return await asyncio.shield(request)

    async def _request(self, method: str, path: str, *, json: Any = None, repeatable: bool = True) -> httpx.Response:
        """Sends a request, with retries on 429, on 5xx and on connection errors.

        A request that is not `repeatable` is retried only if RunPod has not received or has rejected it.

        Raises:
            QueueUnavailableError: every attempt failed, or RunPod refuses the key.
        """
        retryable = httpx.TransportError if repeatable else _NOT_SENT
        attempts = self._retries.async_retrying(
            lambda exc: isinstance(exc, (_RetryableStatusError, retryable)),
            what=f"RunPod: {method} {path}",
            at_least=lambda exc: exc.retry_after if isinstance(exc, _RetryableStatusError) else 0.0,
        )
        try:
            response: httpx.Response = await attempts(self._send, method, path, json)
        except (_RetryableStatusError, httpx.TransportError) as exc:
            log.error(
                "RunPod: %s %s failed on every attempt, see RunPod's status page: %s: %s",
                method,
                path,
                type(exc).__name__,
                exc,
            )
            raise QueueUnavailableError("RunPod's queue does not answer") from exc
        if response.status_code in (401, 403):
            raise QueueUnavailableError("RunPod refuses the key in RUNPOD_API_KEY")
        return response

    async def _send(self, method: str, path: str, json: Any) -> httpx.Response:
        response = await self._http.request(method, path, json=json)
        if response.status_code == 429 or response.status_code >= 500:
            raise _RetryableStatusError(response)
        return response

    def _snapshot(self, task_id: str, answer: Mapping[str, Any]) -> JobSnapshot:
        job = snapshot(task_id, answer)
        if job.result is not None:
            kind = render_kind(job.result.input)
            seconds = job.result.timings.get("total", job.elapsed_time)
            mean = self._render_times.get(kind, seconds)
            self._render_times[kind] = mean + (seconds - mean) / 10
        return job

    def _cache(self, job: JobSnapshot, preview: bytes | None = None) -> JobSnapshot:
        """Caches a response. Progress and elapsed time never fall below those returned before.

        A running job keeps the preview that it had, if this response has none.
        """
        now = self._clock()
        before = self._cached_jobs.get(job.task_id)
        first_at = before.first_at if before is not None else now
        if not job.state.is_terminal:
            last = before.job if before is not None else job
            job = replace(
                job,
                progress=max(job.progress, last.progress),
                elapsed_time=max(job.elapsed_time, last.elapsed_time, now - first_at),
            )
        if job.state is JobState.RUNNING:
            latest, number = (before.preview, before.job.preview) if before is not None else (None, None)
            if preview is not None and preview != latest:
                latest, number = preview, (number or 0) + 1
            job, preview = replace(job, preview=number), latest
        self._cached_jobs[job.task_id] = _CachedJob(job, now, first_at, preview)
        self._cached_jobs.move_to_end(job.task_id)
        _drop_oldest(self._cached_jobs)
        return job


def _drop_oldest(cache: OrderedDict[str, Any]) -> None:
    if len(cache) > _CACHE_SIZE:
        cache.popitem(last=False)
