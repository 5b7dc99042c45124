"""RunPod's worker loop around `handler.worker`. The SDK is imported here and nowhere else.

What the SDK (1.12) makes of a handler, and what is done about it: an async handler survives a platform that restarts
in mid-job and hears of a cancellation at once, a blocking one does neither; an `error` that is no string may be shown
as COMPLETED; an exception becomes a traceback in the client's hands; its ping process outlives a killed worker; a
platform that is away is asked for jobs in a frenzy, and never gets the result that was ready just then.
"""

from __future__ import annotations

import asyncio
import ctypes
import io
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from itertools import count
from threading import Event
from types import FrameType
from typing import Any, Final

import runpod
from runpod.serverless.modules import rp_http, rp_scale
from runpod.serverless.modules.rp_logger import RunPodLogger

from contract.log_fields import begin
from contract.result import Progress
from handler.video_model.base import RenderCancelledError
from handler.worker import Job, JobError, Worker

#: The id that the SDK gives to each job of `--test_input`.
_TEST_ID: Final = "local_test"
_PR_SET_PDEATHSIG: Final = 1
#: Seconds before a platform that is away is asked again: the first time, the second, ... and from then on.
_BACK_OFF: Final = (0.25, 0.5, 1.0, 2.0, 5.0)
#: Seconds for which a result is offered to it. Later it is found in the bucket, by its manifest.
_RESULT_PATIENCE: Final = 600.0
#: Seconds that it may take to answer to one: ours waits up to 120 s for its database.
_ANSWER_PATIENCE: Final = 150.0
#: "Later", not "never": https://www.rfc-editor.org/rfc/rfc9110#section-15.5.9, https://www.rfc-editor.org/rfc/rfc6585#section-4.
_LATER: Final = (408, 429)

#: Its DEBUG and TRACE are left out: they show jobs with their s3Config.
_SDK_LEVELS: Final = {
    "TIP": logging.INFO,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "ERROR": logging.ERROR,
}

log = logging.getLogger(__name__)
_sdk_log = logging.getLogger("runpod")

RunPodJob = dict[str, Any]
Request = Callable[..., Awaitable[Any]]


def serve(
    worker: Worker,
    *,
    tells_progress: bool,
    on_stop: Callable[[], None],
    answer_patience: float = _ANSWER_PATIENCE,
) -> None:
    """Take jobs from the platform until SIGTERM, or run the one of `--test_input`. Never returns from the latter.

    `on_stop` is called by the signal handler, which the SDK's own one follows. A result that is not answered within
    `answer_patience` seconds is offered again.
    """
    os.register_at_fork(after_in_child=_die_with_parent)
    if RunPodLogger.level in ("TRACE", "DEBUG"):  # the SDK's default, at which it logs jobs with their s3Config
        RunPodLogger().level = "INFO"
    rp_scale.get_job = _unhurried(rp_scale.get_job)
    rp_http._transmit = _persistent(rp_http._transmit, answer_patience)
    runpod.serverless.start(
        {
            "handler": make_handler(worker, tells_progress=tells_progress),
            "concurrency_modifier": _stop_announcer(on_stop),
        }
    )


def log_as_ours() -> None:
    """Let the SDK's lines be lines of ours, with the job's id as a field. At INFO: see `serve`."""
    RunPodLogger.log = _log_for_sdk
    sys.stdout = _Lines()  # it prints a banner


def _log_for_sdk(_: RunPodLogger, message: object, message_level: str = "INFO", job_id: str | None = None) -> None:
    level = _SDK_LEVELS.get(message_level)
    if level is not None:
        _sdk_log.log(level, "%s", message, extra={"task_id": job_id} if job_id else None)


class _Lines(io.TextIOBase):
    """A stdout of which each line is logged."""

    def write(self, text: str, /) -> int:
        for line in text.splitlines():
            if line.strip():
                _sdk_log.info("%s", line)
        return len(text)


def _delay(failures: int) -> float:
    return _BACK_OFF[min(failures, len(_BACK_OFF) - 1)]


def _unhurried(get_job: Request) -> Request:
    """The SDK asks again at once when its platform is away, a thousand times a second: wait before it does."""
    failures = 0

    async def get_job_or_wait(*arguments: Any) -> Any:
        nonlocal failures
        try:
            jobs = await get_job(*arguments)
        except Exception:
            await asyncio.sleep(_delay(failures))
            failures += 1
            raise
        failures = 0
        return jobs

    return get_job_or_wait


def _persistent(transmit: Request, answer_patience: float) -> Request:
    """The SDK drops a result that it can't deliver at once, and waits ten minutes for an answer: go on for a while.

    Progress is not worth it.
    """

    async def transmit_once(session: Any, url: str, body: str) -> None:
        try:
            async with asyncio.timeout(answer_patience):
                await transmit(session, url, body)
        except TimeoutError as exc:  # the SDK expects no such error here
            raise rp_http.ClientError("no answer") from exc

    async def transmit_until_taken(session: Any, url: str, body: str) -> None:
        deadline = time.monotonic() + _RESULT_PATIENCE
        for failures in count():
            try:
                await transmit_once(session, url, body)
                return
            except rp_http.ClientError as exc:
                status = getattr(exc, "status", 0)
                refused = 400 <= status < 500 and status not in _LATER
                if refused or time.monotonic() > deadline or json.loads(body).get("status") == "IN_PROGRESS":
                    raise
                log.warning("the platform does not take the result, trying again: %s", exc)
            await asyncio.sleep(_delay(failures))

    return transmit_until_taken


def _stop_announcer(on_stop: Callable[[], None]) -> Callable[[int], int]:
    """A `concurrency_modifier`: the SDK asks it once it has set its signal handlers, which ours is put before."""
    announced = False

    def modify(concurrency: int) -> int:
        nonlocal announced
        if not announced:
            announced = True
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, partial(_stop, on_stop, signal.getsignal(number)))
        return concurrency

    return modify


def _stop(on_stop: Callable[[], None], sdk: Any, number: int, frame: FrameType | None) -> None:
    on_stop()
    sdk(number, frame)


def make_handler(worker: Worker, *, tells_progress: bool) -> Callable[[RunPodJob], Awaitable[dict[str, Any]]]:
    """The handler for `runpod.serverless.start`: one render at a time, in a thread of its own."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")

    async def handler(job: RunPodJob) -> dict[str, Any]:
        work = _job(job)
        begin(task_id=work.task_id)  # the SDK runs each job in an asyncio task of its own
        cancelled = Event()
        tell = partial(_tell, job) if tells_progress else _keep
        run = partial(copy_context().run, worker.run, work, tell, cancelled)
        render = asyncio.get_running_loop().run_in_executor(thread, run)
        try:
            result = await asyncio.shield(render)
        except asyncio.CancelledError:
            cancelled.set()
            # The thread is the next job's, too: not before it has let go is this one over.
            await asyncio.wait([render])
            if not render.cancelled() and isinstance(render.exception(), RenderCancelledError):
                log.info("%s: cancelled", job["id"])
            raise
        except JobError as exc:
            log.warning("%s: failed with %s", work.task_id, exc.failure.error_code)
            return {"error": exc.failure.model_dump_json()}
        return result.model_dump(mode="json")

    return handler


def _job(job: RunPodJob) -> Job:
    # A test job's id is always the same: it must not find the video of the test before it.
    task_id = str(uuid.uuid4()) if job["id"] == _TEST_ID else str(job["id"])
    return Job(task_id, job["input"], job.get("s3Config"))


def _tell(job: RunPodJob, progress: Progress) -> None:
    runpod.serverless.progress_update(job, progress.model_dump(mode="json"))


def _keep(_: Progress) -> None:
    """There is nobody to tell."""


def _die_with_parent() -> None:
    """The SDK's ping process would say for minutes that a killed worker lives (Linux: prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
