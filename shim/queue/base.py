"""The job queue as the server sees it: the protocol that the SQL queue and RunPod's queue share."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self

from pydantic import ValidationError

from contract.errors import ErrorCode, JobFailure
from contract.job import UPLOAD_PREFIX, JobInput, Resolution
from contract.offer import SamplingLimits
from contract.result import JobResult, Manifest, Verdict
from contract.worker import WorkerReport, WorkerState
from shim.queue.job import JobEvent, JobPage, JobRecord, JobSnapshot, JobStatus
from storage.bucket import ObjectInfo

#: The failure of a job that completed without a manifest in its output.
NO_VIDEO: Final = JobFailure(error="The worker returned no video", error_code=ErrorCode.GENERATION_FAILED)

#: Why a request with a `webhook_url` is refused.
NO_WEBHOOKS: Final = JobFailure(
    error="webhook_url: this server sends no webhooks. Its operator can set HUNYUAN_WEBHOOK_SECRET, unless RunPod has "
    "the queue; poll the status of the task instead",
    error_code=ErrorCode.INVALID_REQUEST,
)

#: Reads a finished job's result from the bucket by its task id; None if the bucket has no manifest. Raises StorageError
#: if the bucket is unavailable, and nothing else.
FindResult = Callable[[str], Awaitable[JobResult | None]]

#: Jobs of one kind take about the same time to render: model, resolution, duration in seconds.
RenderKind = tuple[str, Resolution, int]

#: Render seconds of each kind: the mean of those observed, else what a worker expects.
RenderTimes = Mapping[RenderKind, float]


def render_kind(job_input: JobInput) -> RenderKind:
    """The kind that the job's render time is averaged with."""
    return job_input.model, job_input.resolution, job_input.duration


def valid_manifest(output: Any) -> Manifest | None:
    """A job's output as a manifest; None if it is not one."""
    try:
        return Manifest.model_validate(output)
    except ValidationError:
        return None


class QueueError(Exception):
    """The queue rejected the request."""


class QueueFullError(QueueError):
    """The limit of waiting jobs is reached."""


class IdempotencyConflictError(QueueError):
    """The idempotency key was used before, with another request."""


class QueueUnavailableError(QueueError):
    """The queue's server did not respond, or responded with an error that passes."""


class ModelNotLoadedError(QueueError):
    """No worker has the model loaded; the message says why."""


class NotSupportedError(QueueError):
    """This kind of queue cannot do that; the message says what to use instead."""


@dataclass(frozen=True)
class Idempotency:
    """Identifies a repeated request: a digest of the client's key and one of the rest of the request.

    Source: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/.
    """

    key: str
    fingerprint: str

    @classmethod
    def of(cls, key: str, job_input: JobInput, webhook_url: str | None = None) -> Self:
        request = job_input.wire() | ({"webhook_url": webhook_url} if webhook_url is not None else {})
        if job_input.upload_id is not None:
            request["image"] = UPLOAD_PREFIX  # a client that repeats its request may upload the same image again
        return cls(_digest(key), _digest(json.dumps(request, sort_keys=True)))

    def check(self, fingerprint: str | None) -> None:
        """Raises IdempotencyConflictError unless `fingerprint`, stored with the key, is this request's."""
        if fingerprint != self.fingerprint:
            raise IdempotencyConflictError("This Idempotency-Key was sent with another request before")


@dataclass(frozen=True)
class Backlog:
    """The work ahead of a new job: the input of each waiting and running job, None for each that the queue hides.

    `workers` counts the workers that have the model loaded.
    """

    waiting: Sequence[JobInput | None]
    running: Sequence[JobInput | None]
    workers: int


@dataclass(frozen=True)
class Submission:
    """A submitted job, and what an estimate of its end needs: the backlog before it and recent render times."""

    job: JobSnapshot
    backlog: Backlog
    render_times: RenderTimes

    @property
    def task_id(self) -> str:
        return self.job.task_id


@dataclass(frozen=True)
class Workers:
    """The workers that are alive, counted by state.

    `ready` have the model loaded. `reports_by_id` holds each worker's last report; it is empty if the queue hides them.
    """

    ready: int
    loading: int
    failed: int
    reports_by_id: Mapping[str, WorkerReport] = field(default_factory=dict)

    @property
    def reports(self) -> Sequence[WorkerReport]:
        return list(self.reports_by_id.values())

    @property
    def models(self) -> Sequence[str]:
        """The `model` values that ready workers can render; empty if one of them does not report its own."""
        reported = [report.models for report in self._ready_reports]
        return sorted({model for models in reported for model in models}) if all(reported) else ()

    @property
    def takes_images(self) -> bool:
        """Whether a ready worker can start from an image; True if none reports."""
        return not self._ready_reports or any(report.takes_images for report in self._ready_reports)

    @property
    def loras(self) -> Collection[str] | None:
        """Names of the LoRA adapters that a ready worker has; None if none reports."""
        ready = self._ready_reports
        return sorted({name for report in ready for name in report.loras}) if ready else None

    @property
    def limits(self) -> Collection[SamplingLimits]:
        """The limits that all ready workers which offer their `model` share; workers may have different weights."""
        ready = self._ready_reports
        return [
            limit
            for limit in {limit for report in ready for limit in report.limits}
            if all(limit in report.limits for report in ready if limit.model in (report.models or (limit.model,)))
        ]

    @property
    def estimates(self) -> RenderTimes:
        """What ready workers expect a kind of job to take; of several workers, the slowest."""
        found: dict[RenderKind, float] = {}
        for report in self._ready_reports:
            for one in report.estimates:
                kind = (one.model, one.resolution, one.duration)
                found[kind] = max(one.seconds, found.get(kind, 0.0))
        return found

    @property
    def _ready_reports(self) -> Sequence[WorkerReport]:
        return [report for report in self.reports if report.state is WorkerState.READY]


class TaskObjects(Protocol):
    """The tasks' objects in the bucket, as the SQL queue needs them. Every method may raise StorageError."""

    async def settle(self, job: JobSnapshot) -> None:
        """Makes the bucket agree with an ended job: its verdict, and no objects of other attempts."""
        ...

    async def reopen(self, task_id: str) -> None:
        """Deletes the tombstone of a failed job that will be rendered again."""
        ...

    async def find_verdict(self, task_id: str) -> Verdict | None: ...

    async def list_objects(self, start_after: str, limit: int) -> Sequence[ObjectInfo]:
        """The next objects of tasks, in the order of their keys."""
        ...

    async def delete(self, key: str) -> None: ...


@dataclass(frozen=True)
class QueueSummary:
    """The numbers of waiting and running jobs, and the workers that are alive."""

    waiting: int
    running: int
    workers: Workers


class JobQueue(Protocol):
    """Submits, finds and cancels jobs. Implementations are safe to call from many asyncio tasks at once.

    Every method may raise QueueUnavailableError.
    """

    async def submit(
        self,
        job_input: JobInput,
        idempotency: Idempotency | None = None,
        check: Callable[[], None] | None = None,
        *,
        client: str = "",
        webhook_url: str | None = None,
    ) -> Submission:
        """Queues a job. A repeated idempotency key returns the job of the first request as it is now.

        `client` is the name of an API key: each has a limit of its own, and clients with waiting jobs take turns.
        `webhook_url` gets a POST when the job has ended. Nothing is queued when it raises. `check` is called last
        before a job is queued, and may raise.

        Raises:
            InvalidInputError: no ready worker has the weights for this input, or the queue sends no webhooks.
            IdempotencyConflictError: the key was used before, with another input.
            ModelNotLoadedError: no worker could run the job now.
            QueueFullError: the client's limit of waiting jobs is reached.
        """
        ...

    async def get(self, task_id: str) -> JobSnapshot | None:
        """The job as it is now; None if the queue has never seen it or has deleted it."""
        ...

    async def cancel(self, task_id: str) -> JobSnapshot | None:
        """Cancels a waiting or running job. A finished job stays unchanged. None for an unknown job."""
        ...

    async def delete_video(self, task_id: str) -> bool:
        """Gives a completed job the failure VIDEO_DELETED in place of its result. False if the queue will not keep it.

        The caller deletes the objects. A queue that returns True repeats that until the bucket has deleted them.
        """
        ...

    async def list_jobs(
        self,
        client: str,
        *,
        limit: int,
        status: JobStatus | None = None,
        cursor: int | None = None,
        after: str | None = None,
        oldest_first: bool = False,
    ) -> JobPage:
        """At most `limit` jobs of that client, newest first: all, or those with `status`.

        They come after those of the page with this `next_cursor`, or after the task `after`.

        Raises:
            NotSupportedError: the queue has no list.
        """
        ...

    async def history(self, task_id: str, after: int = 0) -> Sequence[JobEvent]:
        """The job's events with a number above `after`; empty if the queue keeps none."""
        ...

    async def record(self, task_id: str) -> JobRecord | None:
        """The job's record; None if the queue keeps none."""
        ...

    async def retry(self, task_id: str, objects: TaskObjects | None = None) -> bool:
        """Queues a failed job again, under its id and with all its attempts; False if the job has not failed.

        Its tombstone is deleted from `objects` first, because it would stop the next worker. Without `objects` the
        caller has done that.

        Raises:
            QueueFullError: the client's limit of waiting jobs is reached.
            StorageError: the bucket is unavailable.
        """
        ...

    async def preview(self, task_id: str) -> bytes | None:
        """The JPEG of a running job's latest preview; None if it has none."""
        ...

    def watching(self, task_id: str) -> AbstractContextManager[asyncio.Event]:
        """An event that is set when the job has changed, until the block ends. Clear it before you read the job."""
        ...

    @property
    def watch_interval(self) -> float:
        """Seconds after which a watched job is to be read again even if no change was signalled."""
        ...

    async def summary(self) -> QueueSummary:
        """The numbers of waiting and running jobs and the workers, for callers that ask often."""
        ...

    async def check_ready(self) -> None:
        """Raises ModelNotLoadedError if a job submitted now would be rejected for lack of a worker."""
        ...

    async def close(self) -> None: ...


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
