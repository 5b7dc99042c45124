"""RunPod's worker loop around `handler.worker`. Only this module imports the SDK.

What the SDK (1.12) does, and what this module does about it:

- An async handler survives a restart of the platform during a job, and is cancelled at once; a blocking handler is not.
  So the handler is async and renders in a thread.
- An `error` that is no string may be shown as COMPLETED, and an exception as a traceback. So failures are JSON strings.
- Its ping process outlives a killed worker. So it dies with its parent.
- While the platform is unavailable it asks for jobs a thousand times a second. So job-take waits after a failure.
- It drops a result that it can't deliver. So results are retried.
"""

import asyncio
import contextlib
import io
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from threading import Event
from types import FrameType
from typing import Any, Final

import runpod
from runpod.serverless.modules import rp_http, rp_scale
from runpod.serverless.modules.rp_logger import RunPodLogger

from contract.log_fields import begin
from contract.result import Progress
from contract.retry import RetryPolicy
from handler.machine import die_with_parent
from handler.video_model.base import RenderCancelledError
from handler.worker import Job, JobError, RenderStalledError, Worker

#: The id that the SDK gives to each job of `--test_input`.
_TEST_ID: Final = "local_test"
#: Waits between failed job-takes. The SDK's own loop repeats the request.
_JOB_TAKE_RETRIES: Final = RetryPolicy(first=0.5, longest=5.0)
#: Retries of delivering a result. Later the server finds the result in the bucket, by its manifest.
_RESULT_RETRIES: Final = RetryPolicy(first=0.5, longest=5.0, total=600.0)
#: Seconds until a delivery without an answer counts as failed. Our server waits up to 120 s for its database.
_ANSWER_TIMEOUT: Final = 150.0
#: Statuses below 500 that ask for a retry.
#: Source: https://www.rfc-editor.org/rfc/rfc9110#section-15.5.9, https://www.rfc-editor.org/rfc/rfc6585#section-4.
_RETRIED_STATUSES: Final = (408, 429)
#: The error that stands for "no result": our server queues a job again whose worker asks for the next one.
_RELEASED: Final = "released"

#: DEBUG and TRACE are left out, because they contain jobs with their s3Config.
_SDK_LEVELS: Final = {"TIP": logging.INFO, "INFO": logging.INFO, "WARN": logging.WARNING, "ERROR": logging.ERROR}

log = logging.getLogger(__name__)
_sdk_log = logging.getLogger("runpod")

RunPodJob = dict[str, Any]
Request = Callable[..., Awaitable[Any]]


def serve(
    worker: Worker,
    *,
    send_progress: bool,
    on_stop: Callable[[], None],
    answer_timeout: float = _ANSWER_TIMEOUT,
    releases_stalled: bool = False,
) -> None:
    """Take jobs from the platform until SIGTERM, or run the job of `--test_input` and exit.

    `on_stop` is called in the signal handler, before the SDK's own signal handler. A result without an answer within
    `answer_timeout` seconds is delivered again. With `releases_stalled`, a job whose render stalled is left to the
    platform for another attempt; RunPod would wait for its result, so there it fails.
    """
    _end_forks_with_their_parent()
    if RunPodLogger.level in ("TRACE", "DEBUG"):  # the SDK's default, at which it logs jobs with their s3Config
        RunPodLogger().level = "INFO"
    rp_scale.get_job = _wait_after_failure(rp_scale.get_job)
    rp_http._transmit = _retry_results(rp_http._transmit, answer_timeout)
    runpod.serverless.start(
        {
            "handler": make_handler(worker, send_progress=send_progress, releases_stalled=releases_stalled),
            "concurrency_modifier": _install_stop_hook(on_stop),
        }
    )


def capture_sdk_logs() -> None:
    """Send the SDK's log lines through our logging, with the job's id as a field. At INFO, see `serve`."""
    RunPodLogger.log = _log_for_sdk
    sys.stdout = _LoggedStdout()  # the SDK prints a banner


def _log_for_sdk(_: RunPodLogger, message: object, message_level: str = "INFO", job_id: str | None = None) -> None:
    level = _SDK_LEVELS.get(message_level)
    if level is not None:
        _sdk_log.log(level, "%s", message, extra={"task_id": job_id} if job_id else None)


class _LoggedStdout(io.TextIOBase):
    """A stdout that logs each line."""

    def write(self, text: str, /) -> int:
        for line in text.splitlines():
            if line.strip():
                _sdk_log.info("%s", line)
        return len(text)


def _wait_after_failure(get_job: Request) -> Request:
    """`get_job` that waits before it raises, because the SDK calls it again at once."""
    failures = 0

    async def get_job_and_wait(*arguments: Any) -> Any:
        nonlocal failures
        try:
            jobs = await get_job(*arguments)
        except Exception:
            failures += 1
            await asyncio.sleep(_JOB_TAKE_RETRIES.wait_after(failures))
            raise
        failures = 0
        return jobs

    return get_job_and_wait


def _retry_results(transmit: Request, answer_timeout: float) -> Request:
    """`transmit` that retries results and limits the wait for an answer. Progress is sent once, a release never."""

    async def transmit_in_time(session: Any, url: str, body: str) -> None:
        try:
            async with asyncio.timeout(answer_timeout):
                await transmit(session, url, body)
        except TimeoutError as exc:  # the SDK handles ClientError only
            raise rp_http.ClientError(f"no answer within {answer_timeout:g} s") from exc

    async def transmit_with_retries(session: Any, url: str, body: str) -> None:
        result = json.loads(body)
        if result.get("status") == "IN_PROGRESS":
            await transmit_in_time(session, url, body)
        elif result.get("error") != _RELEASED:
            retrying = _RESULT_RETRIES.async_retrying(_may_succeed_later, what="delivering the result")
            await retrying(transmit_in_time, session, url, body)

    return transmit_with_retries


def _may_succeed_later(exc: BaseException) -> bool:
    status = getattr(exc, "status", 0)
    refused = 400 <= status < 500 and status not in _RETRIED_STATUSES
    return isinstance(exc, rp_http.ClientError) and not refused


def _install_stop_hook(on_stop: Callable[[], None]) -> Callable[[int], int]:
    """A `concurrency_modifier`, which the SDK calls after it has set its signal handlers; ours then precede them."""
    installed = False

    def modify(concurrency: int) -> int:
        nonlocal installed
        if not installed:
            installed = True
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, partial(_stop, on_stop, signal.getsignal(number)))
        return concurrency

    return modify


def _stop(on_stop: Callable[[], None], sdk_handler: Any, number: int, frame: FrameType | None) -> None:
    on_stop()
    sdk_handler(number, frame)


def make_handler(
    worker: Worker, *, send_progress: bool, releases_stalled: bool = False
) -> Callable[[RunPodJob], Awaitable[dict[str, Any]]]:
    """The handler for `runpod.serverless.start`: one render at a time, in its own thread."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")

    async def handler(sdk_job: RunPodJob) -> dict[str, Any]:
        job = _job(sdk_job)
        begin(task_id=job.task_id)  # the SDK runs each job in its own asyncio task
        cancelled = Event()
        on_progress = partial(_send_progress, sdk_job) if send_progress else lambda _: None
        run = partial(copy_context().run, worker.run, job, on_progress, cancelled)
        render = asyncio.get_running_loop().run_in_executor(thread, run)
        try:
            result = await asyncio.shield(render)
        except asyncio.CancelledError:
            cancelled.set()
            await _end_of(render)  # the next job needs its thread
            if not render.cancelled() and isinstance(render.exception(), RenderCancelledError):
                log.info("render cancelled")
            raise
        except JobError as exc:
            if releases_stalled and isinstance(exc, RenderStalledError):
                log.warning("the render was stopped; the server queues the task again")
                return {"error": _RELEASED}
            log.warning("job failed with %s; the result has the details", exc.failure.error_code)
            return {"error": exc.failure.model_dump_json()}
        return result.model_dump(mode="json")

    return handler


async def _end_of(render: asyncio.Future[Any]) -> None:
    """Waits for the end of a cancelled render. The platform repeats the cancellation until the job has ended."""
    while not render.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([render])


def _job(sdk_job: RunPodJob) -> Job:
    # Every test job has the same id. Without a new one, it would find the manifest of the previous test job.
    task_id = str(uuid.uuid4()) if sdk_job["id"] == _TEST_ID else str(sdk_job["id"])
    return Job(task_id, sdk_job["input"], sdk_job.get("s3Config"))


def _send_progress(sdk_job: RunPodJob, progress: Progress) -> None:
    runpod.serverless.progress_update(sdk_job, progress.model_dump(mode="json"))


def _end_forks_with_their_parent() -> None:
    """Ends the SDK's ping process with the worker: it would report a dead worker as alive."""
    parent = 0

    def remember_parent() -> None:
        nonlocal parent
        parent = os.getpid()

    if sys.platform == "linux":
        os.register_at_fork(before=remember_parent, after_in_child=lambda: die_with_parent(parent))
