"""Who waits on this server for a change of a task."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: In place of a task id: the change may move the place of every waiting task.
EVERY_TASK: Final = ""


class Watches:
    """The watched tasks. Each has the events that its next change sets."""

    def __init__(self) -> None:
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @contextmanager
    def watching(self, task_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the task changes, until the block ends."""
        changed = asyncio.Event()
        self._events[task_id].add(changed)
        try:
            yield changed
        finally:
            self._events[task_id].remove(changed)
            if not self._events[task_id]:
                del self._events[task_id]

    def wake(self, task_id: str = EVERY_TASK) -> None:
        """Sets the events of that task, or of every task."""
        woken = self._events.values() if task_id == EVERY_TASK else [self._events.get(task_id, set())]
        for events in woken:
            for changed in events:
                changed.set()
