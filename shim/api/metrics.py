"""GET /metrics, for Prometheus: what the server counted, and the queue as of now."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Request, Response

from shim.api.dependencies import Services, services
from shim.metrics import QueueSnapshot
from shim.queue.base import JobQueue, QueueUnavailableError

#: Seconds that the queue has to answer: well within the 10 s after which Prometheus gives a scrape up.
_PATIENCE: Final = 3.0

log = logging.getLogger(__name__)
router = APIRouter(include_in_schema=False)


@router.get("/metrics")
async def metrics(request: Request, use: Annotated[Services, Depends(services)]) -> Response:
    """Every metric. A queue that does not answer costs its own figures only."""
    figures = await _figures(use.queue)
    body, media_type = use.metrics.exposition(request.headers.get("accept", ""), use.version, figures)
    return Response(body, headers={"Content-Type": media_type})


async def _figures(queue: JobQueue) -> QueueSnapshot | None:
    asking = asyncio.create_task(_ask(queue))
    done, _ = await asyncio.wait({asking}, timeout=_PATIENCE)
    if done:
        return asking.result()
    # Not waited for: a database driver takes its time to give up, too.
    asking.cancel()
    log.warning("the queue takes longer than %.0f s to give its figures", _PATIENCE)
    return None


async def _ask(queue: JobQueue) -> QueueSnapshot | None:
    try:
        return QueueSnapshot(await queue.backlog(), await queue.workers())
    except QueueUnavailableError as exc:
        log.warning("the queue gives no figures: %s", exc)
        return None
