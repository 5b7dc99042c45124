"""Renders the items of a batch: submits them, follows their tasks and saves their videos."""

import time
from typing import Final, Protocol

from hunyuan.cli.batch_state import BatchState, Item
from hunyuan.client import Client
from hunyuan.errors import (
    QueueFullError,
    RateLimitedError,
    RefusedError,
    TaskNotFoundError,
    UnreachableError,
)
from hunyuan.models import CompletedStatus, FailedStatus
from hunyuan.part_file import remove_parts

_POLL_INTERVAL: Final = 1.0
#: Seconds between two attempts while the server is busy or away, unless it sends a Retry-After.
_BUSY_INTERVAL: Final = 5.0
#: A server that is away or has no model for longer ends the command.
_OUTAGE: Final = 600.0


class Report(Protocol):
    """What shows the batch to its user."""

    def running(self, item: Item, percent: int) -> None: ...

    def ended(self, item: Item) -> None: ...

    def waiting(self, problem: str) -> None: ...


class BatchRun:
    """At most `parallel` tasks wait or run at a time. Raises what a client raises if the server stays away."""

    def __init__(self, client: Client, state: BatchState, parallel: int, report: Report) -> None:
        self._client = client
        self._state = state
        self._parallel = parallel
        self._report = report
        self._away_since: float | None = None

    def run(self) -> None:
        """Until every item is saved or has failed."""
        for item in self._state.items:
            if not item.saved:
                remove_parts(item.output)
                if item.task_id is not None and item.output.exists():
                    self._state.saved(item)  # killed after the file got its name
        while any(not item.ended for item in self._state.items):
            pause = _POLL_INTERVAL
            try:
                self._look()
                self._submit()
                self._away_since = None
                self._report.waiting("")
            except (UnreachableError, RefusedError) as exc:
                pause = self._pause_after(exc)
                self._report.waiting(str(exc))
            time.sleep(pause)

    def _submit(self) -> None:
        running = sum(item.task_id is not None and not item.ended for item in self._state.items)
        for item in self._state.items:
            if running >= self._parallel:
                return
            if item.ended or item.task_id is not None:
                continue
            try:
                task = self._client.generate(item.row.request, idempotency_key=self._state.idempotency_key(item))
            except RefusedError as exc:
                if exc.status not in (400, 409, 413):
                    raise
                self._fail(item, exc.error, exc.error_code)
                continue
            self._state.submitted(item, task.task_id)
            running += 1

    def _look(self) -> None:
        """Finds out how far each task is, and saves the videos of those that are completed."""
        for item in self._state.items:
            if item.task_id is None or item.ended:
                continue
            try:
                status = self._client.status(item.task_id)
                if isinstance(status, CompletedStatus):
                    self._client.download(item.task_id, item.output)
            except RefusedError as exc:
                if not isinstance(exc, TaskNotFoundError):
                    raise
                self._state.forgotten(item)
                continue
            if isinstance(status, CompletedStatus):
                self._state.saved(item)
                self._report.ended(item)
            elif isinstance(status, FailedStatus):
                self._fail(item, status.error, status.error_code)
            else:
                self._report.running(item, status.progress)

    def _fail(self, item: Item, error: str, error_code: str | None) -> None:
        self._state.failed(item, error, error_code)
        self._report.ended(item)

    def _pause_after(self, exc: UnreachableError | RefusedError) -> float:
        """How long to wait for a server that is busy or away. Raises the error if it has been away for too long."""
        retry_after = exc.retry_after if isinstance(exc, RefusedError) else None
        if not isinstance(exc, QueueFullError | RateLimitedError):
            if isinstance(exc, RefusedError) and exc.status < 500:
                raise exc
            self._away_since = self._away_since or time.monotonic()
            if time.monotonic() - self._away_since > _OUTAGE:
                raise exc
        return _BUSY_INTERVAL if retry_after is None else retry_after
