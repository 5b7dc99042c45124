"""What the routes depend on: one object, made in `create_app`."""

import asyncio
import math
import time
from dataclasses import dataclass
from typing import Annotated, Final

import anyio
import anyio.to_thread
import httpx
from fastapi import Depends, Request

from shim.access import RateLimit, client_of_address
from shim.api.feed import Feeds
from shim.api.gpu import LocalGpus
from shim.errors import ApiError, ServerErrorCode
from shim.metrics import Metrics
from shim.queue.base import JobQueue
from shim.rewrite import Rewriter
from shim.tasks import StoredImages, Tasks
from storage.bucket import Bucket
from storage.errors import StorageUnavailableError

#: About as long as load balancers wait for a probe's response.
_CHECK_SECONDS: Final = 5.0
#: Seconds for which a successful check counts: probes of many clients cost one.
_READY_SECONDS: Final = 1.0


class Readiness:
    """Whether the queue and the bucket accept tasks. One check runs at a time, and a success counts for a second."""

    def __init__(self, queue: JobQueue, bucket: Bucket) -> None:
        self._queue = queue
        self._bucket = bucket
        self._checking: asyncio.Future[None] | None = None
        self._ready_until = float("-inf")

    async def check(self) -> None:
        """Raise QueueError unless the queue accepts tasks, and StorageError unless the bucket answers within 5 s."""
        if time.monotonic() < self._ready_until:
            return
        if self._checking is None or self._checking.done():
            self._checking = asyncio.ensure_future(self._check())
        await asyncio.shield(self._checking)

    async def _check(self) -> None:
        await self._queue.check_ready()
        try:
            with anyio.fail_after(_CHECK_SECONDS):
                await anyio.to_thread.run_sync(self._bucket.check, abandon_on_cancel=True)
        except TimeoutError as exc:
            raise StorageUnavailableError(f"the bucket did not answer within {_CHECK_SECONDS:.0f} s") from exc
        self._ready_until = time.monotonic() + _READY_SECONDS


@dataclass(frozen=True)
class Services:
    """The objects that routes use."""

    tasks: Tasks
    feeds: Feeds
    images: StoredImages
    uploads: asyncio.Semaphore
    queue: JobQueue
    bucket: Bucket
    bucket_http: httpx.AsyncClient
    metrics: Metrics
    version: str
    provider: str | None
    rewriter: Rewriter | None
    readiness: Readiness
    public_url: str | None
    rate_limit: RateLimit | None
    upload_limit: RateLimit | None
    gpus: LocalGpus


def services_of(request: Request) -> Services:
    """The app's services."""
    services: Services = request.app.state.services
    return services


async def get_services(request: Request) -> Services:
    """`services_of` as a dependency. It is a coroutine, because FastAPI would call a function in a thread."""
    return services_of(request)


#: A route's parameter that is the app's services.
GetServices = Annotated[Services, Depends(get_services)]


def public_url(request: Request, services: Services) -> str:
    """The URL by which clients reach this server, without a slash at its end: the setting, or the request's own."""
    return (services.public_url or str(request.base_url)).rstrip("/")


def client(request: Request) -> str:
    """Who sent the request, for limits and logs: the name of the API key, or the address."""
    name: str | None = getattr(request.state, "client", None)
    if name is not None:
        return name
    return client_of_address(request.client.host) if request.client is not None else "unknown"


def key_name(request: Request) -> str:
    """The name of the request's API key; empty on a server without keys."""
    return getattr(request.state, "client", None) or ""


def is_anonymous(request: Request) -> bool:
    """Whether the server has API keys and the request came without one: then a response must not contain details."""
    return getattr(request.state, "client", "") is None


def take_rate_token(request: Request) -> None:
    """Raise ApiError RATE_LIMITED, with the seconds to wait, if the client requested too many videos."""
    _take(request, services_of(request).rate_limit, "requested too many videos")


def take_upload_token(request: Request) -> None:
    """The same for uploaded images, which have tokens of their own: as many as videos."""
    _take(request, services_of(request).upload_limit, "uploaded too many images")


def _take(request: Request, limit: RateLimit | None, what: str) -> None:
    wait = limit.take(client(request)) if limit is not None else 0.0
    if wait > 0:
        headers = {"Retry-After": str(math.ceil(wait))}
        text = f"this client {what} in the last minute; retry in {headers['Retry-After']} s"
        raise ApiError(ServerErrorCode.RATE_LIMITED, text, headers)
