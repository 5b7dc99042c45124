"""The changes of tasks for any number of listeners: one reader for each task, however many listen.

A listener keeps its place in what the reader has read and no queue of its own, so one that is slow costs no memory.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Final

from shim.queue.base import JobQueue, QueueUnavailableError
from shim.queue.history import KEPT
from shim.queue.job import JobEvent, JobSnapshot, JobState
from shim.tasks import TaskNotFoundError, Tasks
from storage.errors import StorageError

#: Seconds between two reads at least. Changes that follow each other faster are read together.
_SHORTEST: Final = 0.1
#: Seconds until the next read after the queue has failed.
_RETRY: Final = 2.0

log = logging.getLogger(__name__)


class Feed:
    """What one task becomes. `latest` is how it was read last, `steps` what it was at each event before that."""

    def __init__(self, tasks: Tasks, queue: JobQueue, first: JobSnapshot) -> None:
        self._tasks = tasks
        self._queue = queue
        self.latest = first
        self.steps: deque[JobSnapshot] = deque(maxlen=KEPT)
        self.changed = asyncio.Event()
        self.is_over = False

    async def read(self) -> None:
        """Reads the task at each change until it has ended."""
        try:
            with self._queue.watching(self.latest.task_id) as changed:
                while not self.is_over:
                    changed.clear()
                    delay = await self._read_once()
                    await asyncio.sleep(delay)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._queue.watch_interval):
                            await changed.wait()
        finally:
            self.is_over = True
            self._notify()

    async def _read_once(self) -> float:
        """Returns the seconds until the next read at least."""
        try:
            job = await self._tasks.find(self.latest.task_id)
            missed = await missed_steps(self._queue, job, self.latest.last_event)
        except TaskNotFoundError:
            self.is_over = True
        except (QueueUnavailableError, StorageError) as exc:
            log.warning("cannot read a task that clients listen to, retrying in %.0f s: %s", _RETRY, exc)
            return _RETRY
        else:
            self.is_over = job.state.is_terminal
            if is_news(job, self.latest):
                self.steps.extend(missed)
                if job.last_event != self.latest.last_event:
                    self.steps.append(job)
                self.latest = job
                self._notify()
        return 0.0 if self.is_over else _SHORTEST

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Listener:
    """One listener's place in a feed. `last` is the snapshot that it has."""

    def __init__(self, feed: Feed, last: JobSnapshot) -> None:
        self._feed = feed
        self._last = last

    @property
    def is_over(self) -> bool:
        """Whether nothing will follow what `news` has returned."""
        return self._last.state.is_terminal or (self._feed.is_over and not self._unread())

    async def news(self, seconds: float) -> Sequence[JobSnapshot]:
        """What the task was since the last call, in order; empty if it has not changed for `seconds`."""
        changed = self._feed.changed
        if not (unread := self._unread()) and not self.is_over:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await changed.wait()
            unread = self._unread()
        if unread:
            self._last = unread[-1]
        return unread

    def _unread(self) -> Sequence[JobSnapshot]:
        steps = [step for step in self._feed.steps if step.last_event > self._last.last_event]
        latest = self._feed.latest
        if is_news(latest, steps[-1] if steps else self._last):
            steps.append(latest)
        return steps


class Feeds:
    """The feeds of the tasks that somebody listens to."""

    def __init__(self, tasks: Tasks, queue: JobQueue) -> None:
        self._tasks = tasks
        self._queue = queue
        self._feeds: dict[str, tuple[Feed, asyncio.Task[None]]] = {}
        self._listeners: dict[Feed, int] = {}

    async def missed(self, job: JobSnapshot, after: int) -> Sequence[JobSnapshot]:
        """What the job was between its event `after` and now."""
        return await missed_steps(self._queue, job, after)

    @asynccontextmanager
    async def listening(self, job: JobSnapshot) -> AsyncIterator[Listener]:
        """What follows `job`, which was just read. The task's reader ends with its last listener."""
        feed, reader = self._feeds.get(job.task_id, (None, None))
        if feed is None or reader is None or feed.is_over:
            feed = Feed(self._tasks, self._queue, job)
            reader = asyncio.create_task(feed.read(), context=Context())  # its log lines are of no one's request
            self._feeds[job.task_id] = feed, reader
        self._listeners[feed] = self._listeners.get(feed, 0) + 1
        try:
            yield Listener(feed, job)
        finally:
            self._listeners[feed] -= 1
            if self._listeners[feed] == 0:
                del self._listeners[feed]
                if self._feeds.get(job.task_id, (None,))[0] is feed:
                    del self._feeds[job.task_id]
                reader.cancel()


def is_news(job: JobSnapshot, before: JobSnapshot) -> bool:
    """Whether `job` is a later state than `before`, and a client sees the difference."""
    is_older = (job.last_event, job.progress) < (before.last_event, before.progress)
    return _seen(job) != _seen(before) and (job.state.is_terminal or not is_older)


def _seen(job: JobSnapshot) -> tuple[object, ...]:
    return job.last_event, job.state, job.stage, job.progress, job.preview, job.queue_position, job.failure


async def missed_steps(queue: JobQueue, job: JobSnapshot, after: int) -> Sequence[JobSnapshot]:
    """What the job was at each event between `after` and its last one; nothing if the queue keeps no events."""
    if not 0 < after < job.last_event - 1:
        return ()
    events = await queue.history(job.task_id, after)
    # The manifest of a video that was deleted is gone, so that it was completed cannot be shown any more.
    missed = [one for one in events if one.number < job.last_event and one.state is not JobState.COMPLETED]
    return [_at_event(job, one) for one in missed]


def _at_event(job: JobSnapshot, event: JobEvent) -> JobSnapshot:
    started_at = job.started_at if event.state is JobState.RUNNING and event.attempts == job.attempts else None
    return JobSnapshot(
        task_id=job.task_id,
        state=event.state,
        progress=event.progress,
        stage=event.stage,
        elapsed_time=max(event.at - job.submitted_at, 0.0) if job.submitted_at is not None else 0.0,
        failure=event.failure,
        last_event=event.number,
        attempts=event.attempts,
        submitted_at=job.submitted_at,
        started_at=started_at,
        running_time=max(event.at - started_at, 0.0) if started_at is not None else 0.0,
        estimated_time=job.estimated_time,
    )
