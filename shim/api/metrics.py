"""GET /metrics for Prometheus: this server's counters, and the queue at the time of the scrape."""

import asyncio
import logging
from typing import Final

from fastapi import APIRouter, Request, Response

from shim.api.dependencies import GetServices
from shim.queue.base import JobQueue, QueueSummary, QueueUnavailableError

#: Seconds that the queue gets to answer. Prometheus gives up a scrape after 10 s.
_QUEUE_SECONDS: Final = 3.0

log = logging.getLogger(__name__)
router = APIRouter(include_in_schema=False)


@router.get("/metrics")
async def metrics(request: Request, services: GetServices) -> Response:
    """Every metric; without those of the queue if the queue does not answer."""
    queue = await _summary(services.queue)
    body, media_type = services.metrics.exposition(request.headers.get("accept", ""), services.version, queue)
    return Response(body, headers={"Content-Type": media_type})


async def _summary(queue: JobQueue) -> QueueSummary | None:
    try:
        async with asyncio.timeout(_QUEUE_SECONDS):
            return await queue.summary()
    except TimeoutError:
        log.warning("/metrics has no queue metrics: the queue did not answer within %.0f s", _QUEUE_SECONDS)
    except QueueUnavailableError as exc:
        log.warning("/metrics has no queue metrics: %s", exc)
    return None
