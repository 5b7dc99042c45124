"""A job as the queue knows it: its state, its events and its record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from contract.errors import JobFailure
from contract.result import Manifest, Stage


class JobStatus(StrEnum):
    """The state of a task as clients of the REST API see it."""

    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


class JobState(StrEnum):
    """The state of a job. The last three are terminal."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


class WebhookState(BaseModel):
    """The delivery of a task's webhook."""

    model_config = ConfigDict(frozen=True)

    state: Literal["pending", "delivered", "failed"] = Field(
        default="pending", description='"failed": the server has given it up.'
    )
    attempts: int = 0
    last_status: int | None = Field(
        default=None, description="HTTP status of the last attempt; null without an answer."
    )
    last_error: str | None = Field(default=None, description="Why the last attempt got no answer.")
    next_attempt: datetime | None = None


@dataclass(frozen=True)
class JobSnapshot:
    """One job at the time of the call.

    `progress` is a percentage that never falls, at most 99 before COMPLETED. `elapsed_time` is in seconds from
    submission to the end of the job, or to now. `queue_position` is 1 for the next job to start, and None for a job
    that has started or if the queue hides it. A COMPLETED job has a `result`, a FAILED or CANCELLED one a `failure`.
    `last_event` is the number of its last `JobEvent`, and 0 if the queue keeps none; `attempts` counts deliveries to
    workers. Times are in seconds since the epoch; `running_time` in seconds from the last delivery to the end of the
    job, or to now; `estimated_time` in seconds from submission to the end, as estimated then. None is unknown.
    `webhook` is None for a job without one. `preview` is the number of a running job's latest preview, and grows with
    each; None if it has none.
    """

    task_id: str
    state: JobState
    progress: int = 0
    stage: Stage = Stage.QUEUED
    elapsed_time: float = 0.0
    queue_position: int | None = None
    result: Manifest | None = None
    failure: JobFailure | None = None
    last_event: int = 0
    attempts: int = 0
    submitted_at: float | None = None
    started_at: float | None = None
    running_time: float = 0.0
    estimated_time: float | None = None
    webhook: WebhookState | None = None
    preview: int | None = None

    @property
    def status(self) -> JobStatus:
        """What clients see. A completed job whose video was deleted has failed."""
        if self.result is not None:
            return JobStatus.COMPLETED
        return JobStatus.PROCESSING if self.failure is None else JobStatus.FAILED


@dataclass(frozen=True)
class JobEvent:
    """A state or a stage that a job has reached. `number` grows by one with each event of a job.

    `at` is in seconds since the epoch. `attempts` is the number of the latest delivery to a worker, and `worker_id` is
    that worker; None if the job waits.
    """

    number: int
    at: float
    state: JobState
    stage: Stage
    progress: int
    attempts: int
    worker_id: str | None = None
    failure: JobFailure | None = None


@dataclass(frozen=True)
class JobRecord:
    """What a queue keeps of a job besides its snapshot. Times are in seconds since the epoch.

    `input` is as it was queued: not validated if it came by RunPod's API. `attempts` counts the deliveries to workers,
    `lost_attempts` the renders that a worker began and lost.
    """

    input: Any
    submitted_at: float
    started_at: float | None
    finished_at: float | None
    worker_id: str | None
    attempts: int
    lost_attempts: int
    events: Sequence[JobEvent]


@dataclass(frozen=True)
class JobPage:
    """Some of a client's jobs, and the input of each as it was queued, by its task id.

    `next_cursor` gets the jobs after them; None if there are none.
    """

    jobs: Sequence[JobSnapshot]
    inputs: Mapping[str, Any]
    next_cursor: int | None
