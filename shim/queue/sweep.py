"""Looks for lost jobs, again and again."""

import asyncio
import logging
from typing import Final

from shim.queue.base import QueueUnavailableError
from shim.queue.dispatch import Dispatcher

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
