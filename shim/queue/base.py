"""The job queue as the shim sees it, whoever keeps it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol, Self

from contract.errors import ErrorCode, JobFailure
from contract.job import JobInput, Resolution
from contract.result import JobResult, Manifest, Stage
from contract.worker import WorkerReport, WorkerState

#: Of a job that completed with something else than our handler's result.
NO_VIDEO: Final = JobFailure(error="The worker returned no video", error_code=ErrorCode.GENERATION_FAILED)

#: Looks for a finished job in the bucket by its task id: what a job whose result never reached the queue left there.
#: It raises StorageError where the bucket can't be asked, and nothing else.
FindResult = Callable[[str], Awaitable[JobResult | None]]

#: Removes what a job left in the bucket, by its task id. It raises nothing.
Discard = Callable[[str], Awaitable[None]]

#: What render times are alike for: the model asked for, resolution, duration in seconds.
Kind = tuple[str, Resolution, int]

#: Mean render seconds.
RenderTimes = Mapping[Kind, float]


def kind_of(job_input: JobInput) -> Kind:
    """The kind of a job."""
    return job_input.model, job_input.resolution, job_input.duration


class QueueError(Exception):
    """The queue could not do what was asked."""


class QueueFullError(QueueError):
    """As many jobs wait as may wait."""


class IdempotencyConflictError(QueueError):
    """The same idempotency key came with another request before."""


class QueueUnavailableError(QueueError):
    """The queue's server did not answer, or answered that it can't just now."""


class ModelNotLoadedError(QueueError):
    """No worker has the model loaded; the message says why."""


class JobState(StrEnum):
    """A job's life. Only the last three are terminal."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing will happen to the job any more."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)
class Job:
    """One job as of now.

    `progress` is a percentage that never falls, at most 99 before COMPLETED. `elapsed_time` is in seconds since
    the job was submitted, up to its end. `queue_position` is 1 for the next job to start, None once it runs or
    where the queue does not tell. A COMPLETED job has a `result`, a FAILED or CANCELLED one a `failure`.
    """

    task_id: str
    state: JobState
    progress: int = 0
    stage: Stage = Stage.QUEUED
    elapsed_time: float = 0.0
    queue_position: int | None = None
    result: Manifest | None = None
    failure: JobFailure | None = None


@dataclass(frozen=True)
class Idempotency:
    """What makes a request that is sent again the same one: digests of the client's key and of what it asks for.

    Source: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/.
    """

    key: str
    fingerprint: str

    @classmethod
    def of(cls, key: str, job_input: JobInput) -> Self:
        """From the client's key and its request."""
        asked = json.dumps(job_input.wire(), sort_keys=True)
        return cls(_digest(key), _digest(asked))

    def check(self, fingerprint: str | None) -> None:
        """Raise IdempotencyConflictError unless the task that the key stands for was asked for with `fingerprint`."""
        if fingerprint != self.fingerprint:
            raise IdempotencyConflictError("This Idempotency-Key was sent with another request before")


@dataclass(frozen=True)
class Backlog:
    """The work ahead of a new job: one input for each waiting and running job, None where the queue hides it."""

    waiting: Sequence[JobInput | None]
    running: Sequence[JobInput | None]
    workers: int


@dataclass(frozen=True)
class Workers:
    """The workers that are alive, as /health tells of them.

    `ready` have the model loaded. `reports_by_id` is what workers said of themselves; empty where the queue hides it.
    """

    ready: int
    loading: int
    failed: int
    reports_by_id: Mapping[str, WorkerReport] = field(default_factory=dict)

    @property
    def reports(self) -> Sequence[WorkerReport]:
        """What workers said of themselves."""
        return list(self.reports_by_id.values())

    @property
    def models(self) -> Sequence[str]:
        """The `model` values that ready workers can render; empty where they do not tell."""
        told = [report.models for report in self._ready_reports]
        return sorted({model for models in told for model in models}) if all(told) else ()

    @property
    def takes_images(self) -> bool:
        """Whether a ready worker can start from an image, as far as is known."""
        return not self._ready_reports or any(report.takes_images for report in self._ready_reports)

    @property
    def _ready_reports(self) -> Sequence[WorkerReport]:
        return [report for report in self.reports if report.state is WorkerState.READY]


class JobObserver:
    """Is told what becomes of jobs, each time after it is stored. This one does not mind; others must raise nothing."""

    def submitted(self) -> None:
        """A job was queued."""

    def started(self, waited: float) -> None:
        """A worker took a job for the first time, so many seconds after it was submitted."""

    def requeued(self) -> None:
        """A job is back in the queue: its worker was lost."""

    def ended(
        self, state: JobState, *, failure: JobFailure | None = None, result: Manifest | None = None, count: int = 1
    ) -> None:
        """So many jobs ended, each for the first time. With `failure` NO_VIDEO even a COMPLETED one."""


class JobQueue(Protocol):
    """Submit, look up, cancel. Implementations are safe to use from many asyncio tasks at once.

    Every method may raise QueueUnavailableError.
    """

    async def submit(self, job_input: JobInput, idempotency: Idempotency | None = None) -> Job:
        """Queue a job; or, where one was submitted with the same idempotency key before, give that one as of now.

        Raises:
            IdempotencyConflictError: the one before was another; nothing was queued.
            QueueFullError: as many jobs wait as may wait; nothing was queued.
            ModelNotLoadedError: no worker could run it now; nothing was queued.
        """
        ...

    async def get(self, task_id: str) -> Job | None:
        """The job as of now; None if the queue has never known it or has forgotten it."""
        ...

    async def cancel(self, task_id: str) -> Job | None:
        """Stop a waiting or running job; a finished one stays as it is. None for one the queue does not know."""
        ...

    async def backlog(self) -> Backlog:
        """What is waiting and running."""
        ...

    async def render_times(self) -> RenderTimes:
        """What such jobs took lately, where the queue has seen any."""
        ...

    async def check_ready(self) -> None:
        """Whether a job submitted now would be taken.

        Raises:
            ModelNotLoadedError: it would not.
        """
        ...

    async def workers(self) -> Workers:
        """Who is there to work."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
