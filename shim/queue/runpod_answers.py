"""What RunPod's answers mean: the states, progress, results and failures of its jobs, and its counts."""

import logging
from collections.abc import Mapping
from typing import Any, Final

import httpx
from pydantic import ValidationError

from contract.errors import TASK_CANCELLED, ErrorCode, JobFailure
from contract.result import Progress, Stage
from shim.queue.base import NO_VIDEO, Backlog, QueueUnavailableError, Workers, valid_manifest
from shim.queue.job import JobSnapshot, JobState

#: RunPod's names of the states of a job.
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

_FAILURES: Final = {
    "CANCELLED": TASK_CANCELLED,
    "TIMED_OUT": JobFailure(error="The task ran out of time", error_code=ErrorCode.GENERATION_FAILED),
}

_NO_BUCKET: Final = JobFailure(
    error="The workers of the RunPod endpoint have no bucket, so the server has no video: set their BUCKET_* variables",
    error_code=ErrorCode.STORAGE_UNAVAILABLE,
)

log = logging.getLogger(__name__)


def snapshot(task_id: str, answer: Mapping[str, Any]) -> JobSnapshot:
    """The job that an answer of /status describes."""
    word = str(answer.get("status"))
    state = _STATES.get(word)
    if state is None:
        log.warning("RunPod returned the unknown job state %s; the task counts as running", word)
        state = JobState.RUNNING
    elapsed = (answer.get("delayTime") or 0) / 1000
    if state is JobState.RUNNING:
        progress = _progress(answer.get("output"))
        running = progress.elapsed_time
        return JobSnapshot(task_id, state, progress.progress, progress.stage, elapsed + running, running_time=running)
    elapsed += (answer.get("executionTime") or 0) / 1000
    if state is JobState.COMPLETED:
        return _completed(task_id, elapsed, answer.get("output"))
    return JobSnapshot(task_id, state, elapsed_time=elapsed, failure=_failure(word, answer))


def _completed(task_id: str, elapsed: float, output: Any) -> JobSnapshot:
    if isinstance(output, dict) and "video_base64" in output:
        return JobSnapshot(task_id, JobState.COMPLETED, elapsed_time=elapsed, failure=_NO_BUCKET)
    manifest = valid_manifest(output)
    if manifest is None:
        return JobSnapshot(task_id, JobState.COMPLETED, elapsed_time=elapsed, failure=NO_VIDEO)
    return JobSnapshot(task_id, JobState.COMPLETED, 100, Stage.STORING, elapsed, result=manifest)


def backlog_of(health: Mapping[str, Any]) -> Backlog:
    """How many jobs wait and run. RunPod hides their inputs."""
    counts = health["jobs"]
    return Backlog([None] * counts["inQueue"], [None] * counts["inProgress"], workers_of(health).ready)


def workers_of(health: Mapping[str, Any]) -> Workers:
    """The endpoint's workers. RunPod hides their reports."""
    counts = health["workers"]
    return Workers(
        ready=max(counts.get("ready", 0), counts.get("idle", 0) + counts.get("running", 0)),
        loading=counts.get("initializing", 0),
        failed=counts.get("unhealthy", 0),
    )


def _failure(word: str, answer: Mapping[str, Any]) -> JobFailure | None:
    if word != "FAILED":
        return _FAILURES.get(word)
    error = answer.get("error")
    return JobFailure.from_wire(error if isinstance(error, str) else None)


def preview_in(answer: Mapping[str, Any]) -> bytes | None:
    """The preview that a running job's last progress has."""
    return _progress(answer.get("output")).preview


def _progress(output: Any) -> Progress:
    """The progress that the worker sent last. A job that has just started has sent none."""
    try:
        return Progress.model_validate(output)
    except ValidationError:
        return Progress(progress=0, stage=Stage.ENCODING_PROMPT)


def body_of(response: httpx.Response) -> Mapping[str, Any]:
    """The decoded response of RunPod.

    Raises:
        QueueUnavailableError: it is an error, or not a JSON object.
    """
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.is_error or not isinstance(answer, dict):
        log.error("RunPod: %s returned status %d and no usable body", response.request.url.path, response.status_code)
        raise QueueUnavailableError("RunPod's queue returned an unexpected response")
    return answer
