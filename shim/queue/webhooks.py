"""Webhooks: tells receivers how tasks ended, at least once each.

The transaction that ends a job with a webhook sets `webhook_due_at`, so a server that is killed delays the webhook and
never loses it. `webhook_due_at` is when the next attempt is due; None is the normal state. Any number of servers send:
the one that makes an attempt keeps the others from it.
"""

import asyncio
import contextlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, and_, select, update

from contract.log_fields import bound
from shim.queue.base import QueueUnavailableError
from shim.queue.clock import moment
from shim.queue.database import Database, fetch_one
from shim.queue.job import JobSnapshot, JobState, WebhookState
from shim.queue.observer import JobObserver
from shim.queue.reader import snapshot
from shim.queue.schema import jobs
from shim.queue.webhook_columns import MAX_AGE, stored
from shim.queue.webhook_request import Outcome, WebhookOptions, WebhookSender

#: Seconds for which the server that makes an attempt keeps the others from it, beyond the attempt's own time limit.
_CLAIM: Final = 10.0
#: Attempts at the same moment, of all receivers and of one: a slow receiver delays its own webhooks only.
_MOST: Final = 64
_MOST_OF_ONE: Final = 4
#: The longest and the shortest time in seconds between two looks for webhooks that are due.
_POLL: Final = 5.0
_SHORTEST_POLL: Final = 0.05

#: What GET /status answers for a task.
Describe = Callable[[JobSnapshot], Mapping[str, Any]]

log = logging.getLogger(__name__)


class Webhooks:
    """Sends the webhooks that are due. `describe` makes the `data` of their bodies."""

    def __init__(
        self,
        database: Database,
        options: WebhookOptions,
        describe: Describe,
        observer: JobObserver | None = None,
    ) -> None:
        self._database = database
        self._options = options
        self._describe = describe
        self._observer = observer or JobObserver()
        self._sender = WebhookSender(options)
        self._under_way: Counter[str] = Counter()

    async def send_forever(self) -> None:
        """Sends webhooks as they become due. Runs until it is cancelled; attempts under way are then made again."""
        try:
            async with asyncio.TaskGroup() as attempts:
                while True:
                    changed = self._database.changed
                    wait = await self._start_due(attempts)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(wait):  # on Python 3.11, wait_for may swallow a cancellation
                            await changed.wait()
        finally:
            await self._sender.close()

    async def _start_due(self, attempts: asyncio.TaskGroup) -> float:
        """Starts the attempts that are due. Returns the seconds until the next one, unless `changed` is set before."""
        try:
            while self._under_way.total() < _MOST:
                job = await self._claim_next()
                if job is None:
                    return await self._seconds_to_next()
                self._under_way[job.webhook_host] += 1
                attempts.create_task(self._attempt(job))
        except QueueUnavailableError as exc:
            log.error("sending webhooks failed, retrying in %.0f s: %s", _POLL, exc)
        return _POLL

    async def _claim_next(self) -> Row[Any] | None:
        now = self._database.clock()
        due = self._by_due_time(jobs.c.webhook_due_at <= now)
        return await self._database.claim_next(due, {"webhook_due_at": now + self._options.timeout + _CLAIM})

    async def _seconds_to_next(self) -> float:
        due_at = await self.next_due()
        return min(max(due_at - self._database.clock(), _SHORTEST_POLL), _POLL) if due_at is not None else _POLL

    async def next_due(self) -> float | None:
        """When the next webhook is due, by the database's clock. None if none is pending."""
        async with self._database.read() as connection:
            row = await fetch_one(connection, self._by_due_time())
        return row.webhook_due_at if row is not None else None

    def _by_due_time(self, *which: ColumnElement[bool]) -> Any:
        busy: Collection[str] = [host for host, count in self._under_way.items() if count >= _MOST_OF_ONE]
        due = and_(jobs.c.webhook_due_at.is_not(None), jobs.c.webhook_host.not_in(busy), *which)
        columns = jobs.c.task_id, jobs.c.webhook_due_at
        return select(*columns).where(due).order_by(jobs.c.webhook_due_at).limit(1)

    async def _attempt(self, job: Row[Any]) -> None:
        with bound(task_id=job.task_id):
            try:
                body = self._body(job)
                outcome = await self._sender.send(job.webhook_url, _webhook_id(job), body)
            except Exception as exc:  # a client chooses the URL, and no URL may stop the server
                log.exception("the webhook could not be sent; this is a bug of the server")
                outcome = Outcome(error=f"the server could not send it ({type(exc).__name__})")
            finally:
                self._under_way -= Counter([job.webhook_host])  # drops a host that has none left
            try:
                await self._record(job, outcome)
            except QueueUnavailableError as exc:
                log.error("cannot store how a webhook's attempt ended, so it is repeated: %s", exc)

    def _body(self, job: Row[Any]) -> bytes:
        ended = replace(snapshot(job, self._database.clock()), webhook=None)
        at = moment(job.finished_at).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        event = {"type": f"task.{_end(ended)}", "timestamp": at, "data": self._describe(ended)}
        return json.dumps(event, separators=(",", ":")).encode()

    async def _record(self, job: Row[Any], outcome: Outcome) -> None:
        """Stores the outcome, unless the job was queued again meanwhile. Wakes `send_forever`."""
        now = self._database.clock()
        attempts = WebhookState.model_validate(job.webhook).attempts + 1
        wait = None if outcome.is_delivered else self._wait(attempts, outcome, now - job.finished_at)
        pending = "pending" if wait is not None else "failed"
        state = WebhookState(
            state="delivered" if outcome.is_delivered else pending,
            attempts=attempts,
            last_status=outcome.status,
            last_error=outcome.error,
            next_attempt=moment(now + wait) if wait is not None else None,
        )
        due_at = now + wait if wait is not None else None
        async with self._database.write(notify=True) as connection:
            await connection.execute(
                update(jobs)
                .where(jobs.c.task_id == job.task_id, jobs.c.webhook_due_at == job.webhook_due_at)
                .values(webhook_due_at=due_at, webhook=stored(state))
            )
        self._observer.webhook_attempted(state.state)
        _log(job.webhook_host, outcome, attempts, wait)

    def _wait(self, attempts: int, outcome: Outcome, age: float) -> float | None:
        """Seconds until the next attempt; None to give up. Webhooks that failed together do not return together."""
        if outcome.is_refused or attempts > len(self._options.retries):
            return None
        wait = max(self._options.retries[attempts - 1] * random.uniform(0.9, 1.1), outcome.retry_after)
        return wait if age + wait <= MAX_AGE else None


def _log(host: str, outcome: Outcome, attempts: int, wait: float | None) -> None:
    """Names the host alone: the rest of the URL may contain a key."""
    if outcome.is_delivered:
        log.info("the webhook is delivered to %s, attempt %d", host, attempts)
    elif wait is not None:
        log.warning(
            "attempt %d of the webhook to %s failed, retrying in %.0f s: %s", attempts, host, wait, outcome.reason
        )
    else:
        log.error("the webhook to %s is given up after %d attempts: %s", host, attempts, outcome.reason)


def _end(job: JobSnapshot) -> JobState:
    """How the task ended, as clients see it: one without a video has failed."""
    if job.result is not None or job.state is JobState.CANCELLED:
        return job.state
    return JobState.FAILED


def _webhook_id(job: Row[Any]) -> str:
    """The same for every attempt. A task that is rendered again gets another one when it ends again."""
    return f"{job.task_id}_{int(job.finished_at * 1000)}"
