"""Looks for lost jobs, and tidies up the bucket, again and again."""

import asyncio
import contextlib
import logging
from typing import Final

from shim.queue.base import QueueUnavailableError
from shim.queue.database import Database
from shim.queue.dispatch import Dispatcher
from shim.queue.orphans import Orphans
from shim.queue.outbox import Outbox
from storage.errors import StorageError

_SECONDS: Final = 5.0

log = logging.getLogger(__name__)


async def sweep_forever(dispatcher: Dispatcher) -> None:
    """Requeue or end the jobs of workers whose lease has expired, every 5 s. Runs until it is cancelled."""
    while True:
        try:
            await dispatcher.sweep()
        except QueueUnavailableError as exc:
            log.error("the search for lost jobs failed, retrying in %.0f s: %s", _SECONDS, exc)
        await asyncio.sleep(_SECONDS)


async def tidy_bucket_forever(database: Database, outbox: Outbox, orphans: Orphans) -> None:
    """Make the bucket agree with ended jobs as they end, and scan it for orphans. Runs until it is cancelled."""
    while True:
        changed = database.changed
        try:
            await outbox.work_off()
            await orphans.step()
        except (QueueUnavailableError, StorageError) as exc:
            log.error("tidying up the bucket failed, retrying in %.0f s: %s", _SECONDS, exc)
            await asyncio.sleep(_SECONDS)
            continue
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SECONDS):  # `wait_for` of Python 3.11 can swallow a cancellation
                await changed.wait()
