"""What the routes are given: one bundle, made in `create_app`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.to_thread
import httpx
from fastapi import Request

from shim.access import RateLimit, client_of_address
from shim.errors import ApiError, ServerErrorCode
from shim.metrics import Metrics
from shim.queue.base import JobQueue
from shim.tasks import Tasks
from storage.bucket import Bucket
from storage.errors import StorageUnavailableError

#: Under the time that load balancers give a probe, or not far over it.
_CHECK_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Services:
    """The parts behind the routes."""

    tasks: Tasks
    queue: JobQueue
    bucket: Bucket
    store: httpx.AsyncClient
    metrics: Metrics
    version: str
    public_url: str | None
    rate_limit: RateLimit | None

    async def check_bucket(self) -> None:
        """Raise StorageError unless the bucket answers soon."""
        try:
            with anyio.fail_after(_CHECK_SECONDS):
                await anyio.to_thread.run_sync(self.bucket.check, abandon_on_cancel=True)
        except TimeoutError as exc:
            raise StorageUnavailableError(f"the bucket did not answer within {_CHECK_SECONDS:.0f} s") from exc


def services(request: Request) -> Services:
    """The app's services."""
    bundle: Services = request.app.state.services
    return bundle


def public_url(request: Request, use: Services) -> str:
    """Where clients reach this server, with no slash at the end: as configured, else as this request came."""
    return (use.public_url or str(request.base_url)).rstrip("/")


def client(request: Request) -> str:
    """Who asks, for limits and logs: the name of the key, else the address."""
    name: str | None = getattr(request.state, "client", None)
    if name is not None:
        return name
    return client_of_address(request.client.host) if request.client is not None else "unknown"


def is_anonymous(request: Request) -> bool:
    """Whether the server has keys and the request none of them: an open path tells it what it must and no more."""
    return getattr(request.state, "client", "") is None


async def within_rate_limit(request: Request) -> None:
    """For routes that make videos.

    Raises:
        ApiError: RATE_LIMITED, with the seconds to wait.
    """
    limit = services(request).rate_limit
    wait = limit.take(client(request)) if limit is not None else 0.0
    if wait > 0:
        headers = {"Retry-After": str(math.ceil(wait))}
        raise ApiError(ServerErrorCode.RATE_LIMITED, "too many videos were asked for in the last minute", headers)
