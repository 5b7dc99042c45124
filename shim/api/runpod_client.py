"""The client's side of RunPod's protocol: run, runsync, status, cancel, retry, purge-queue and health."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final

import anyio
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from contract.errors import ErrorCode
from contract.log_fields import bind
from contract.result import Progress
from shim.errors import ApiError, ServerErrorCode
from shim.http.body import json_body
from shim.queue.dispatch import Dispatcher
from shim.queue.job import JobSnapshot, JobState
from shim.queue.outbox import Outbox
from shim.queue.runpod_answers import STATE_WORDS
from shim.queue.sql import SqlQueue

_RUNSYNC_SECONDS: Final = 90.0
#: Bytes. RunPod's limit on what /run takes.
_MAX_REQUEST: Final = 10 * 1024 * 1024

log = logging.getLogger(__name__)


class ClientApi:
    """The routes that RunPod's clients call. `stopped` ends every /runsync at once."""

    def __init__(self, queue: SqlQueue, dispatcher: Dispatcher, outbox: Outbox, stopped: asyncio.Event) -> None:
        self._queue = queue
        self._dispatcher = dispatcher
        self._outbox = outbox
        self._stopped = stopped
        self.routes: tuple[tuple[str, str, Callable[..., Any]], ...] = (
            ("POST", "/run", self._run),
            ("POST", "/runsync", self._run_sync),
            ("GET", "/status/{task_id}", self._status),
            ("POST", "/status/{task_id}", self._status),
            ("POST", "/cancel/{task_id}", self._cancel),
            ("POST", "/retry/{task_id}", self._retry),
            ("POST", "/purge-queue", self._purge),
            ("GET", "/health", self._health),
        )

    async def _run(self, request: Request) -> Response:
        task_id = await self._enqueue(request)
        return JSONResponse({"id": task_id, "status": STATE_WORDS[JobState.QUEUED]})

    async def _run_sync(self, request: Request) -> Response:
        """Like /run, but the response comes when the job ends, or after 90 s with its state at that time."""
        task_id = await self._enqueue(request)
        deadline = time.monotonic() + _RUNSYNC_SECONDS
        while not (job := await self._get(task_id)).state.is_terminal and time.monotonic() < deadline:
            if self._stopped.is_set():
                break
            with anyio.move_on_after(self._dispatcher.poll_interval):
                await self._dispatcher.changed.wait()
        return JSONResponse(await self._described(job))

    async def _enqueue(self, request: Request) -> str:
        body = await json_body(request, _MAX_REQUEST)
        if not isinstance(body, dict) or not isinstance(body.get("input"), dict):
            raise ApiError(ErrorCode.INVALID_REQUEST, 'the body must be a JSON object with an "input" object')
        extras = {name: value for name, value in body.items() if name not in ("id", "input")}
        task_id = await self._queue.enqueue(body["input"], extras)
        bind(task_id=task_id)
        log.info("the job is queued", extra={"prompt": str(body["input"].get("prompt"))})
        return task_id

    async def _status(self, task_id: str) -> Response:
        return JSONResponse(await self._described(await self._get(task_id)))

    async def _cancel(self, task_id: str) -> Response:
        await self._get(task_id)
        job = await self._queue.cancel(task_id)
        return JSONResponse({"id": task_id, "status": STATE_WORDS[job.state if job else JobState.CANCELLED]})

    async def _retry(self, task_id: str) -> Response:
        await self._get(task_id)
        if not await self._queue.retry(task_id, self._outbox.objects):
            raise ApiError(ErrorCode.INVALID_REQUEST, "only a failed job can be retried")
        return JSONResponse({"id": task_id, "status": STATE_WORDS[JobState.QUEUED]})

    async def _purge(self) -> Response:
        return JSONResponse({"removed": await self._queue.purge(), "status": "completed"})

    async def _health(self) -> Response:
        summary = await self._queue.summary()
        workers = summary.workers
        ended = await self._queue.ended()
        running = min(summary.running, workers.ready)
        return JSONResponse(
            {
                "jobs": {
                    "completed": ended[JobState.COMPLETED],
                    "failed": ended[JobState.FAILED],
                    "inProgress": summary.running,
                    "inQueue": summary.waiting,
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

    async def _get(self, task_id: str) -> JobSnapshot:
        job = await self._queue.get(task_id)
        if job is None:
            raise ApiError(ServerErrorCode.TASK_NOT_FOUND, "job not found")
        return job

    async def _described(self, job: JobSnapshot) -> dict[str, Any]:
        """A job as RunPod's /status shows it; a running one has its last progress as `output`."""
        shown: dict[str, Any] = {"id": job.task_id, "status": STATE_WORDS[job.state]}
        if job.state is JobState.COMPLETED:
            shown["output"] = await self._queue.output(job.task_id)
        elif job.failure is not None:
            shown["error"] = job.failure.model_dump_json()
        elif job.state is JobState.RUNNING:
            progress = Progress(progress=job.progress, stage=job.stage, elapsed_time=job.elapsed_time)
            if job.preview is not None:
                progress = progress.model_copy(update={"preview": await self._queue.preview(job.task_id)})
            shown["output"] = progress.model_dump(mode="json")
        timing = "delayTime" if job.state is JobState.QUEUED else "executionTime"
        shown[timing] = int(job.elapsed_time * 1000)
        return shown
