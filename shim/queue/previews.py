"""The previews of running jobs: each job has one at most, and none when it does not run."""

from typing import Any

from sqlalchemy import ColumnElement, Delete, Select, delete, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from shim.queue.engine import insert_into
from shim.queue.job import JobState
from shim.queue.schema import jobs, previews


async def save_preview(connection: AsyncConnection, jpeg: bytes, *which: ColumnElement[bool]) -> None:
    """Makes `jpeg` the preview of the job that `which` selects, if it selects one."""
    chosen = select(jobs.c.seq, literal(jpeg, previews.c.jpeg.type)).where(*which)
    rows = insert_into(connection, previews).from_select(["job", "jpeg"], chosen)
    await connection.execute(rows.on_conflict_do_update(index_elements=["job"], set_={"jpeg": rows.excluded.jpeg}))


def delete_previews(*which: ColumnElement[bool]) -> Delete:
    """Deletes the previews of the jobs that `which` selects."""
    return delete(previews).where(previews.c.job.in_(select(jobs.c.seq).where(*which)))


def select_preview(task_id: str) -> Select[Any]:
    """The JPEG of a running job."""
    running = jobs.c.task_id == task_id, jobs.c.state == JobState.RUNNING
    return select(previews.c.jpeg).join(jobs, jobs.c.seq == previews.c.job).where(*running)
