"""RunPod's protocol over our own queue: the unmodified SDK worker pulls from here, the SDK's client submits here.

Paths and shapes are those of RunPod's endpoint API (https://docs.runpod.io/serverless/endpoints/operations) and of
the worker loop in runpod-python 1.12 (serverless/modules). What that loop needs and does not say:

- It asks for work again the moment it is answered, so an empty answer is held back: job-take and job-stop are
  long polls.
- It retries a result only on a 5xx, and loses it on a 4xx or on a stale connection: a result is always answered
  with 200 unless we failed, and with `Connection: close`.
- Progress is sent by threads that may overtake each other, and the result.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from contract.errors import ErrorCode, JobFailure
from contract.result import Progress
from contract.worker import WorkerReport
from shim.errors import ApiError, ServerErrorCode
from shim.http.access_log import bind_path_ids
from shim.queue.base import JobSnapshot, JobState, QueueUnavailableError
from shim.queue.dispatch import Delivery, Dispatcher, WorkerStoppingError
from shim.queue.runpod import STATE_WORDS
from shim.queue.sql import SqlQueue

#: The endpoint id of our own platform: `/v2/local/run` and so on.
ENDPOINT_ID: Final = "local"
#: How long a worker's question is held where there is no answer yet; the SDK gives up after 90 s.
HOLD: Final = 20.0
#: How long a result waits here for a database that is away, and how often it is tried: the SDK gives up after 600 s,
#: and after three quick attempts where it is answered with an error.
_RESULT_PATIENCE: Final = 120.0
_RESULT_RETRY: Final = 1.0
#: How long while the server stops.
_DRAIN_HOLD: Final = 0.5
_SWEEP_INTERVAL: Final = 5.0
_RUNSYNC_HOLD: Final = 90.0
#: RunPod's limits, in bytes: what /run takes, and what a job may return.
_MAX_REQUEST: Final = 10 * 1024 * 1024
_MAX_OUTPUT: Final = 20 * 1024 * 1024

log = logging.getLogger(__name__)


class Platform:
    """Both sides of RunPod's protocol for one endpoint, as a router for the app."""

    def __init__(
        self, queue: SqlQueue, dispatcher: Dispatcher, *, endpoint_id: str, token: str, hold: float = HOLD
    ) -> None:
        self._queue = queue
        self._dispatcher = dispatcher
        self._token = token
        self._hold = hold
        self._draining = False
        self._stopped = asyncio.Event()
        self.router = APIRouter(
            prefix=f"/v2/{endpoint_id}",
            dependencies=[Depends(self._authorize), Depends(bind_path_ids)],
            include_in_schema=False,
        )
        for method, path, route in (
            ("GET", "/job-take/{worker_id}", self._take),
            ("GET", "/job-take-batch/{worker_id}", self._take_batch),
            ("GET", "/job-stop/{worker_id}", self._stops),
            ("POST", "/job-done/{worker_id}/{task_id}", self._done),
            ("POST", "/job-stream/{worker_id}/{task_id}", self._stream),
            ("GET", "/ping/{worker_id}", self._ping),
            ("POST", "/worker-report/{worker_id}", self._report),
            ("POST", "/run", self._run),
            ("POST", "/runsync", self._run_sync),
            ("GET", "/status/{task_id}", self._status),
            ("POST", "/status/{task_id}", self._status),
            ("POST", "/cancel/{task_id}", self._cancel),
            ("POST", "/retry/{task_id}", self._retry),
            ("POST", "/purge-queue", self._purge),
            ("GET", "/health", self._health),
        ):
            self.router.add_api_route(path, route, methods=[method])

    def drain(self) -> None:
        """Hand out no more jobs. Workers that ask are held shortly: a worker that stops waits for its answer first."""
        self._draining = True
        self._hold = min(self._hold, _DRAIN_HOLD)

    def stop(self) -> None:
        """Let every held question go: the server is about to close its connections."""
        self._draining = True
        self._stopped.set()

    async def sweep_forever(self) -> None:
        """Settle jobs whose worker went silent, again and again. A database that is away is asked again later."""
        while True:
            try:
                await self._dispatcher.sweep()
            except QueueUnavailableError as exc:
                log.error("the sweep of lost jobs failed: %s", exc)
            await asyncio.sleep(_SWEEP_INTERVAL)

    async def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(given, self._token.encode()):
            raise ApiError(ServerErrorCode.UNAUTHORIZED, "the platform's key is missing or wrong")

    # The worker's side.

    async def _take(self, worker_id: str, request: Request) -> Response:
        delivery = await self._held(request, lambda: self._next_for(worker_id))
        return Response(status_code=204) if delivery is None else JSONResponse(_job(delivery))

    async def _take_batch(self, worker_id: str, request: Request) -> Response:
        """One job at a time, however many slots the worker has: a GPU renders one."""
        delivery = await self._held(request, lambda: self._next_for(worker_id))
        return Response(status_code=204) if delivery is None else JSONResponse([_job(delivery)])

    async def _next_for(self, worker_id: str) -> Delivery | None:
        return None if self._draining else await self._dispatcher.take(worker_id)

    async def _stops(self, worker_id: str, request: Request) -> Response:
        task_ids = await self._held(request, lambda: self._dispatcher.pending_cancellations(worker_id))
        return JSONResponse({"jobsToStop": task_ids}) if task_ids else Response(status_code=204)

    async def _held(self, request: Request, look: Callable[[], Awaitable[Any]]) -> Any:
        """What `look` finds, as soon as it finds something; None at the end of the hold or of the connection.

        A database that is away has nothing to be found: an error would be answered by a storm of questions.
        """
        started = time.monotonic()
        while not self._stopped.is_set() and not await request.is_disconnected():
            changed = self._dispatcher.changed
            try:
                if found := await look():
                    return found
            except WorkerStoppingError:
                return None
            except QueueUnavailableError as exc:
                log.warning("a worker that asks is kept waiting: %s", exc)
            remaining = started + self._hold - time.monotonic()
            if remaining <= 0:
                return None
            waits = [asyncio.create_task(changed.wait()), asyncio.create_task(self._stopped.wait())]
            try:
                timeout = min(remaining, self._dispatcher.poll_interval)
                await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return None

    async def _done(self, worker_id: str, task_id: str, request: Request) -> Response:
        """A result, a failure, or progress. The body is JSON, whatever its Content-Type says."""
        body = await _json(request, _MAX_OUTPUT)
        if not isinstance(body, dict):
            raise ApiError(ErrorCode.INVALID_REQUEST, "the body must be a JSON object")
        if body.get("status") == "IN_PROGRESS":
            await self._progress(worker_id, task_id, body.get("output"))
        elif "error" in body:
            failure = JobFailure.from_wire(_text(body["error"]))
            await self._kept(lambda: self._dispatcher.fail(worker_id, task_id, failure))
        else:
            await self._kept(lambda: self._dispatcher.complete(worker_id, task_id, body.get("output")))
        return JSONResponse({}, headers={"Connection": "close"})

    async def _kept(self, store: Callable[[], Awaitable[bool]]) -> None:
        """Store a result, again and again while the database is away."""
        deadline = time.monotonic() + _RESULT_PATIENCE
        while True:
            try:
                await store()
                return
            except QueueUnavailableError as exc:
                if time.monotonic() > deadline or self._stopped.is_set():
                    raise
                log.warning("a result waits for the database: %s", exc)
            await asyncio.sleep(_RESULT_RETRY)

    async def _progress(self, worker_id: str, task_id: str, output: Any) -> None:
        try:
            progress = Progress.model_validate(output)
        except ValidationError:
            log.warning("%s: worker %s sent progress that is none of ours", task_id, worker_id)
            return
        await self._dispatcher.record_progress(worker_id, task_id, progress)

    async def _stream(self, request: Request) -> Response:
        """Partial outputs: our handler sends none, and who runs another one has them in the result."""
        await _json(request, _MAX_OUTPUT)
        return JSONResponse({})

    async def _ping(self, worker_id: str, job_id: str = "") -> Response:
        await self._dispatcher.ping(worker_id, [task_id for task_id in job_id.split(",") if task_id])
        return JSONResponse({})

    async def _report(self, worker_id: str, request: Request) -> Response:
        try:
            report = WorkerReport.model_validate(await _json(request, _MAX_REQUEST))
        except ValidationError as exc:
            raise ApiError(
                ErrorCode.INVALID_REQUEST, f"no worker report: {exc.error_count()} fields are wrong"
            ) from exc
        await self._dispatcher.report(worker_id, report)
        return JSONResponse({})

    # The endpoint's side.

    async def _run(self, request: Request) -> Response:
        task_id = await self._enqueue(request)
        return JSONResponse({"id": task_id, "status": STATE_WORDS[JobState.QUEUED]})

    async def _run_sync(self, request: Request) -> Response:
        """Like /run, but answered when the job ends, or as it stands after 90 s."""
        task_id = await self._enqueue(request)
        deadline = time.monotonic() + _RUNSYNC_HOLD
        while not (job := await self._known(task_id)).state.is_terminal and time.monotonic() < deadline:
            if self._stopped.is_set():
                break
            try:
                await asyncio.wait_for(self._dispatcher.changed.wait(), self._dispatcher.poll_interval)
            except TimeoutError:
                continue
        return JSONResponse(await self._described(job))

    async def _enqueue(self, request: Request) -> str:
        body = await _json(request, _MAX_REQUEST)
        if not isinstance(body, dict) or not isinstance(body.get("input"), dict):
            raise ApiError(ErrorCode.INVALID_REQUEST, 'the body must be a JSON object with an "input" object')
        extras = {name: value for name, value in body.items() if name not in ("id", "input")}
        task_id = await self._queue.enqueue(body["input"], extras)
        log.info("%s: accepted", task_id, extra={"task_id": task_id, "prompt": str(body["input"].get("prompt"))})
        return task_id

    async def _status(self, task_id: str) -> Response:
        return JSONResponse(await self._described(await self._known(task_id)))

    async def _cancel(self, task_id: str) -> Response:
        await self._known(task_id)
        job = await self._queue.cancel(task_id)
        return JSONResponse({"id": task_id, "status": STATE_WORDS[job.state if job else JobState.CANCELLED]})

    async def _retry(self, task_id: str) -> Response:
        await self._known(task_id)
        if not await self._queue.retry(task_id):
            raise ApiError(ErrorCode.INVALID_REQUEST, "only a failed job can be retried")
        return JSONResponse({"id": task_id, "status": STATE_WORDS[JobState.QUEUED]})

    async def _purge(self) -> Response:
        return JSONResponse({"removed": await self._queue.purge(), "status": "completed"})

    async def _health(self) -> Response:
        backlog, workers, ended = (
            await self._queue.backlog(),
            await self._queue.workers(),
            await self._queue.ended(),
        )
        running = min(len(backlog.running), workers.ready)
        return JSONResponse(
            {
                "jobs": {
                    "completed": ended[JobState.COMPLETED],
                    "failed": ended[JobState.FAILED],
                    "inProgress": len(backlog.running),
                    "inQueue": len(backlog.waiting),
                    "retried": 0,
                },
                "workers": {
                    "idle": workers.ready - running,
                    "initializing": workers.loading,
                    "ready": workers.ready,
                    "running": running,
                    "throttled": 0,
                    "unhealthy": workers.failed,
                },
            }
        )

    async def _known(self, task_id: str) -> JobSnapshot:
        job = await self._queue.get(task_id)
        if job is None:
            raise ApiError(ServerErrorCode.TASK_NOT_FOUND, "job not found")
        return job

    async def _described(self, job: JobSnapshot) -> dict[str, Any]:
        """A job as RunPod's /status shows it; a running one carries its last progress as `output`."""
        shown: dict[str, Any] = {"id": job.task_id, "status": STATE_WORDS[job.state]}
        if job.state is JobState.COMPLETED:
            shown["output"] = await self._queue.output(job.task_id)
        elif job.failure is not None:
            shown["error"] = job.failure.model_dump_json()
        elif job.state is JobState.RUNNING:
            progress = Progress(progress=job.progress, stage=job.stage, elapsed_time=job.elapsed_time)
            shown["output"] = progress.model_dump(mode="json")
        if job.state is JobState.QUEUED:
            shown["delayTime"] = int(job.elapsed_time * 1000)
        else:
            shown["executionTime"] = int(job.elapsed_time * 1000)
        return shown


def _job(delivery: Delivery) -> dict[str, Any]:
    return {**delivery.extras, "id": delivery.task_id, "input": delivery.input}


def _text(error: Any) -> str:
    return error if isinstance(error, str) else json.dumps(error)


async def _json(request: Request, limit: int) -> Any:
    """The body, decoded; at most `limit` bytes of it."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise ApiError(ServerErrorCode.REQUEST_TOO_LARGE, f"the body is larger than {limit} bytes")
    try:
        return json.loads(bytes(body) or b"null")
    except (ValueError, RecursionError) as exc:
        raise ApiError(ErrorCode.INVALID_REQUEST, "the body is not valid JSON") from exc
