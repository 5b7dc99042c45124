"""What has happened to each job: an event for each state and each stage that it has reached.

The transaction that changes a job raises its `last_event` and adds the event, so none is lost and none has two numbers.
A job keeps its last 200 events: workers that are lost and clients that retry could add to them for ever. They are
deleted with their job. Jobs of releases without events have the number 0.
"""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, Select, delete, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from contract.errors import JobFailure
from contract.result import Stage
from shim.queue.engine import insert_into
from shim.queue.job import JobEvent, JobState
from shim.queue.schema import events, jobs

#: The new `last_event` in an update that changes a job's state.
NEXT_EVENT: Final = jobs.c.last_event + 1
#: The most events that a job keeps.
KEPT: Final = 200

_OF_JOB: Final = "state", "stage", "progress", "attempts", "worker_id", "failure"


async def add_events(connection: AsyncConnection, now: float, *which: ColumnElement[bool]) -> None:
    """Adds the present state of the jobs that `which` selects. A job whose `last_event` has not changed gets none."""
    columns = ["job", "number", "at", *_OF_JOB]
    values = jobs.c.seq, jobs.c.last_event, literal(now), *(jobs.c[name] for name in _OF_JOB)
    chosen = select(*values).where(jobs.c.last_event > 0, *which)
    await connection.execute(insert_into(connection, events).from_select(columns, chosen).on_conflict_do_nothing())


async def drop_oldest_events(connection: AsyncConnection, *which: ColumnElement[bool]) -> None:
    """Deletes what the one job that `which` selects has beyond its last `KEPT` events."""
    seq = select(jobs.c.seq).where(*which).scalar_subquery()
    last_dropped = select(jobs.c.last_event - KEPT).where(*which).scalar_subquery()
    await connection.execute(delete(events).where(events.c.job == seq, events.c.number <= last_dropped))


def select_events(task_id: str, after: int = 0) -> Select[Any]:
    """The rows of a job's events, in order."""
    seq = select(jobs.c.seq).where(jobs.c.task_id == task_id).scalar_subquery()
    return select(events).where(events.c.job == seq, events.c.number > after).order_by(events.c.number)


def job_events(rows: Sequence[Row[Any]]) -> Sequence[JobEvent]:
    """The events whose rows `select_events` has selected."""
    return [
        JobEvent(
            number=row.number,
            at=row.at,
            state=JobState(row.state),
            stage=Stage(row.stage) if row.stage and row.state != JobState.QUEUED else Stage.QUEUED,
            progress=row.progress,
            attempts=row.attempts,
            worker_id=row.worker_id,
            failure=JobFailure.model_validate(row.failure) if row.failure is not None else None,
        )
        for row in rows
    ]
