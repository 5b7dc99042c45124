"""RunPod's worker loop around `handler.worker`. The SDK is imported here and nowhere else.

What the SDK (1.12) makes of a handler, and what is done about it: an async handler survives a platform that restarts
in mid-job and hears of a cancellation at once, a blocking one does neither; an `error` that is no string may be shown
as COMPLETED; an exception becomes a traceback in the client's hands; its ping process outlives a killed worker.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import Any, Final

import runpod
from runpod.serverless.modules.rp_logger import RunPodLogger

from handler.contract import Progress
from handler.video_model.base import RenderCancelledError
from handler.worker import Job, JobError, Worker

#: The id that the SDK gives to each job of `--test_input`.
_TEST_ID: Final = "local_test"
_PR_SET_PDEATHSIG: Final = 1

log = logging.getLogger(__name__)

RunPodJob = dict[str, Any]


def serve(worker: Worker, *, tells_progress: bool) -> None:
    """Take jobs from the platform until SIGTERM, or run the one of `--test_input`. Never returns from the latter."""
    os.register_at_fork(after_in_child=_die_with_parent)
    if RunPodLogger.level in ("TRACE", "DEBUG"):  # the SDK's default, at which it logs jobs with their s3Config
        RunPodLogger().level = "INFO"
    runpod.serverless.start({"handler": make_handler(worker, tells_progress=tells_progress)})


def make_handler(worker: Worker, *, tells_progress: bool) -> Callable[[RunPodJob], Awaitable[dict[str, Any]]]:
    """The handler for `runpod.serverless.start`: one render at a time, in a thread of its own."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")

    async def handler(job: RunPodJob) -> dict[str, Any]:
        cancelled = Event()
        tell = partial(_tell, job) if tells_progress else _keep
        render = asyncio.get_running_loop().run_in_executor(thread, worker.run, _job(job), tell, cancelled)
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
