"""The worker's side of RunPod's protocol: take a job, learn of cancellations, report progress and results.

What the SDK's worker loop needs beyond the documented paths and shapes:

- It asks for work again as soon as it has a response, so an empty response is delayed: job-take and job-stop are
  long polls.
- It retries a result only on a 5xx, and loses it on a 4xx or on a stale connection. So the response to a result is
  200 unless the server failed, with `Connection: close`.
- Its threads send progress in any order, even after the result.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from contract.errors import ErrorCode, JobFailure
from contract.result import Progress
from contract.retry import RetryPolicy
from contract.worker import WorkerReport
from shim.errors import ApiError
from shim.http.body import json_body
from shim.queue.base import QueueUnavailableError
from shim.queue.dispatch import Delivery, Dispatcher, WorkerStoppingError

#: Seconds that a long poll waits for something to answer. The SDK gives up after 90 s.
LONG_POLL_SECONDS: Final = 20.0
#: A result is stored again and again while the database is unavailable. The SDK gives up after 600 s, or after three
#: quick tries if it gets an error.
_STORE_RESULT: Final = RetryPolicy(first=1.0, longest=1.0, total=120.0)
#: Bytes. RunPod limits a job's output to 20 MB.
_MAX_OUTPUT: Final = 20 * 1024 * 1024
_MAX_REPORT: Final = 10 * 1024 * 1024

log = logging.getLogger(__name__)


class WorkerApi:
    """The routes that workers call. `stopped` ends every long poll at once."""

    def __init__(self, dispatcher: Dispatcher, stopped: asyncio.Event, long_poll_seconds: float) -> None:
        self._dispatcher = dispatcher
        self._stopped = stopped
        self._long_poll_seconds = long_poll_seconds
        self._draining = False
        self.routes: tuple[tuple[str, str, Callable[..., Any]], ...] = (
            ("GET", "/job-take/{worker_id}", self._take),
            ("GET", "/job-take-batch/{worker_id}", self._take_batch),
            ("GET", "/job-stop/{worker_id}", self._cancellations),
            ("POST", "/job-done/{worker_id}/{task_id}", self._done),
            ("POST", "/job-stream/{worker_id}/{task_id}", self._stream),
            ("GET", "/ping/{worker_id}", self._ping),
            ("POST", "/worker-report/{worker_id}", self._report),
        )

    def drain(self, long_poll_seconds: float) -> None:
        """Hand out no more jobs, and keep each long poll that short."""
        self._draining = True
        self._long_poll_seconds = min(self._long_poll_seconds, long_poll_seconds)

    async def _take(self, worker_id: str, request: Request) -> Response:
        delivery = await self._long_poll(request, lambda: self._next_job(worker_id))
        return Response(status_code=204) if delivery is None else JSONResponse(_job(delivery))

    async def _take_batch(self, worker_id: str, request: Request) -> Response:
        """One job, however many the worker asks for: a GPU renders one at a time."""
        delivery = await self._long_poll(request, lambda: self._next_job(worker_id))
        return Response(status_code=204) if delivery is None else JSONResponse([_job(delivery)])

    async def _next_job(self, worker_id: str) -> Delivery | None:
        return None if self._draining else await self._dispatcher.take(worker_id)

    async def _cancellations(self, worker_id: str, request: Request) -> Response:
        task_ids = await self._long_poll(request, lambda: self._dispatcher.pending_cancellations(worker_id))
        return JSONResponse({"jobsToStop": task_ids}) if task_ids else Response(status_code=204)

    async def _long_poll(self, request: Request, look: Callable[[], Awaitable[Any]]) -> Any:
        """The first result of `look` that is not empty; None when the time is over or the client has left.

        A database that is unavailable counts as an empty result: workers would retry an error at once.
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
                log.warning("the worker's long poll waits, the database is unavailable: %s", exc)
            remaining = started + self._long_poll_seconds - time.monotonic()
            if remaining <= 0:
                return None
            await _first_of(changed, self._stopped, timeout=min(remaining, self._dispatcher.poll_interval))
        return None

    async def _done(self, worker_id: str, task_id: str, request: Request) -> Response:
        """A result, a failure, or progress. The body is JSON, whatever its Content-Type says."""
        body = await json_body(request, _MAX_OUTPUT)
        if not isinstance(body, dict):
            raise ApiError(ErrorCode.INVALID_REQUEST, "the body must be a JSON object")
        if body.get("status") == "IN_PROGRESS":
            await self._progress(worker_id, task_id, body.get("output"))
        elif "error" in body:
            error = body["error"]
            failure = JobFailure.from_wire(error if isinstance(error, str) else json.dumps(error))
            await self._store(lambda: self._dispatcher.fail(worker_id, task_id, failure))
        else:
            await self._store(lambda: self._dispatcher.complete(worker_id, task_id, body.get("output")))
        return JSONResponse({}, headers={"Connection": "close"})

    async def _store(self, store: Callable[[], Awaitable[bool]]) -> None:
        """Call `store`, again and again while the database is unavailable and the server is not stopping."""
        async for attempt in _STORE_RESULT.async_retrying(self._is_retried, what="storing a job's result"):
            with attempt:
                await store()

    def _is_retried(self, exc: BaseException) -> bool:
        return isinstance(exc, QueueUnavailableError) and not self._stopped.is_set()

    async def _progress(self, worker_id: str, task_id: str, output: Any) -> None:
        try:
            progress = Progress.model_validate(output)
        except ValidationError:
            log.warning("ignoring progress in an unknown format; does the worker run the server's version?")
            return
        await self._dispatcher.record_progress(worker_id, task_id, progress)

    async def _stream(self, request: Request) -> Response:
        """Partial outputs are dropped: our worker sends none, and another worker's result contains them."""
        await json_body(request, _MAX_OUTPUT)
        return JSONResponse({})

    async def _ping(self, worker_id: str, job_id: str = "") -> Response:
        await self._dispatcher.ping(worker_id, [task_id for task_id in job_id.split(",") if task_id])
        # The SDK pings about as often as an idle connection is closed, and would log the reset of every other one.
        return JSONResponse({}, headers={"Connection": "close"})

    async def _report(self, worker_id: str, request: Request) -> Response:
        try:
            report = WorkerReport.model_validate(await json_body(request, _MAX_REPORT))
        except ValidationError as exc:
            text = f"the worker's report has {exc.error_count()} invalid fields"
            raise ApiError(ErrorCode.INVALID_REQUEST, text) from exc
        await self._dispatcher.report(worker_id, report)
        return JSONResponse({})


async def _first_of(*events: asyncio.Event, timeout: float) -> None:
    """Wait until one of `events` is set, at most `timeout` seconds."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _job(delivery: Delivery) -> dict[str, Any]:
    return {**delivery.extras, "id": delivery.task_id, "input": delivery.input}
