"""The search for objects that no task owns: a slow scan of the bucket, some objects at a time.

The outbox tidies up after every job that ended in a way that the queue has seen. What is left comes from workers that
were killed, or came back, at a moment that nobody has seen.
"""

import logging
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Row, select

from contract.log_fields import bound
from contract.result import Manifest, Verdict
from shim.queue.base import TaskObjects, valid_manifest
from shim.queue.database import Database, fetch_all
from shim.queue.job import JobState
from shim.queue.outbox import put_in_outbox
from shim.queue.schema import jobs
from storage import layout
from storage.bucket import ObjectInfo

#: Keys of attempts. Anything else may be somebody's own file.
_ATTEMPT_KEY: Final = re.compile(r"videos/[^/]+/[0-9a-f]{12}\.(?:mp4|jpg|sheet\.jpg)")

log = logging.getLogger(__name__)


@dataclass
class Orphans:
    """Scans the bucket for objects that no job and no verdict names, and has them deleted.

    A step visits `page` objects and costs the same for any number of jobs. Objects of a waiting or running job are left
    alone. Those of an ended job go through the outbox. Those of a task that the queue does not know are deleted
    when they are older than `grace` seconds and the task's verdict does not name them.
    """

    database: Database
    objects: TaskObjects
    #: Objects that one step visits.
    page: int = 50
    #: Seconds between two steps, and between two scans of the whole bucket.
    step_seconds: float = 5.0
    scan_seconds: float = 600.0
    #: Seconds for which an object may belong to a task that this queue does not know: a worker may still be storing it.
    grace: float = 3600.0
    _cursor: str = field(default="", init=False)
    _next_step_at: float = field(default=0.0, init=False)

    async def step(self) -> None:
        """Visits the next objects, unless the last step was a moment ago.

        Raises:
            StorageError: the bucket is unavailable. The next step visits the same objects.
        """
        if time.monotonic() < self._next_step_at:
            return
        self._next_step_at = time.monotonic() + self.step_seconds
        page = await self.objects.list_objects(self._cursor, self.page)
        if not page:
            self._cursor = ""
            self._next_step_at = time.monotonic() + self.scan_seconds
            return
        await self._visit(page)
        self._cursor = page[-1].key

    async def _visit(self, page: Sequence[ObjectInfo]) -> None:
        by_task: Mapping[str, list[ObjectInfo]] = defaultdict(list)
        for item in page:
            if (task_id := layout.task_id_of(item.key)) is not None:
                by_task[task_id].append(item)
        columns = jobs.c.task_id, jobs.c.state, jobs.c.output, jobs.c.bucket_due_at
        async with self.database.read() as connection:
            rows = await fetch_all(connection, select(*columns).where(jobs.c.task_id.in_(by_task)))
        job_of = {row.task_id: row for row in rows}
        for task_id, items in by_task.items():
            with bound(task_id=task_id):
                if task_id not in job_of:
                    await self._visit_unknown(task_id, items)
                elif JobState(job_of[task_id].state).is_terminal:
                    await self._visit_ended(job_of[task_id], [item.key for item in items])

    async def _visit_ended(self, job: Row[Any], keys: Sequence[str]) -> None:
        """Puts the job in the outbox if the bucket does not agree with it."""
        manifest = valid_manifest(job.output) if job.state == JobState.COMPLETED else None
        if job.bucket_due_at is not None or (job.state == JobState.COMPLETED and manifest is None):
            return
        verdict_key = layout.manifest_key(job.task_id)
        agrees = _named(manifest).issuperset(key for key in keys if key != verdict_key)
        if agrees and verdict_key in keys:
            verdict = await self.objects.find_verdict(job.task_id)
            agrees = verdict is not None and _named(verdict) == _named(manifest)
        if not agrees:
            log.warning("the bucket has objects of another attempt of this task, or another verdict")
            async with self.database.write(notify=True) as connection:
                which = jobs.c.task_id == job.task_id
                await connection.execute(put_in_outbox(self.database.clock(), which))

    async def _visit_unknown(self, task_id: str, items: Sequence[ObjectInfo]) -> None:
        now = datetime.now(UTC)
        old = [
            item.key
            for item in items
            if _ATTEMPT_KEY.fullmatch(item.key) and (now - item.modified).total_seconds() > self.grace
        ]
        if not old:
            return
        named = _named(await self.objects.find_verdict(task_id))
        for key in old:
            if key not in named:
                log.warning("deleting %s: no task owns it", key)
                await self.objects.delete(key)


def _named(verdict: Verdict | None) -> frozenset[str]:
    """The keys of the objects that belong to a task with this verdict, besides the verdict itself."""
    return verdict.object_keys if isinstance(verdict, Manifest) else frozenset()
