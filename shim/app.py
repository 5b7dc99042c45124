"""Makes the server's app from its parts."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import Any, Final

import httpx
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from contract.errors import ErrorCode
from contract.job import InvalidInputError
from shim.access import OPEN_TO_ALL, Access, RateLimit
from shim.api import documented, events, images, openai_videos, page, tasks, videos
from shim.api.dependencies import Readiness, Services
from shim.api.feed import Feeds
from shim.api.gpu import LocalGpus
from shim.api.metrics import router as metrics_router
from shim.errors import ApiError, ServerErrorCode, api_error
from shim.http.access_log import AccessLog
from shim.http.guard import error_response, guarded
from shim.http_client import HttpClient, transport_with_small_buffers
from shim.metrics import Metrics
from shim.queue.base import JobQueue, QueueError
from shim.rewrite import Rewriter
from shim.tasks import NotRetryableError, NoVideoError, StoredImages, StoredVideos, TaskNotFoundError, Tasks
from storage.bucket import Bucket
from storage.errors import StorageError

DISTRIBUTION: Final = "hunyuan-video-service"
#: Paths that need no key: probes for load balancers, and what is the same on every server.
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/openapi.json"}) | page.PATHS
#: Uploads of images that are in memory at the same time.
_UPLOADS: Final = 4
_BUCKET_LIMITS: Final = httpx.Limits(max_connections=200)
#: What a route may raise. `Exception` stands for every other error: a 500.
_HANDLED: Final = (
    *(ApiError, InvalidInputError, NoVideoError, NotRetryableError, QueueError, StorageError, TaskNotFoundError),
    *(ClientDisconnect, HTTPException, RequestValidationError, Exception),
)


def create_app(
    queue: JobQueue,
    bucket: Bucket,
    *,
    metrics: Metrics | None = None,
    public_url: str | None = None,
    store_timeout: float = 10.0,
    routers: Sequence[APIRouter] = (),
    access: Access = OPEN_TO_ALL,
    provider: str | None = None,
    rewriter: Rewriter | None = None,
) -> FastAPI:
    """The REST server over `queue` and `bucket`, which the caller closes. `routers` are further routes.
    `provider` is the legal name of who offers the service. The app closes `rewriter`.

    `metrics` must be the ones that `queue` and `bucket` got; by default /metrics has those of requests only.
    A download fails if the bucket sends nothing for `store_timeout` seconds.
    """
    stored_images = StoredImages(bucket)
    found_tasks = Tasks(queue, StoredVideos(bucket), stored_images, rewriter)
    return _app(
        Services(
            tasks=found_tasks,
            feeds=Feeds(found_tasks, queue),
            images=stored_images,
            uploads=asyncio.Semaphore(_UPLOADS),
            queue=queue,
            bucket=bucket,
            # Connecting: slightly over a multiple of 3 s, the TCP retransmission timer.
            bucket_http=HttpClient(
                timeout=httpx.Timeout(store_timeout, connect=3.05),
                limits=_BUCKET_LIMITS,
                transport=transport_with_small_buffers(_BUCKET_LIMITS),
            ),
            metrics=metrics or Metrics(),
            version=version(DISTRIBUTION),
            provider=provider,
            rewriter=rewriter,
            readiness=Readiness(queue, bucket),
            public_url=public_url,
            rate_limit=RateLimit(access.rate_limit) if access.rate_limit is not None else None,
            upload_limit=RateLimit(access.rate_limit) if access.rate_limit is not None else None,
            gpus=LocalGpus(),
        ),
        access,
        routers,
    )


def _app(services: Services, access: Access, routers: Sequence[APIRouter]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(services.bucket_http)
            if services.rewriter is not None:
                stack.push_async_callback(services.rewriter.close)
            yield

    app = _GuardedApp(services.metrics, access, version=services.version, lifespan=lifespan)
    app.state.services = services
    own = documented.polled_router, documented.router, events.router, tasks.router, images.router, videos.router
    routers = (*own, openai_videos.router, page.router, metrics_router, *routers)
    # The routes themselves: `include_router` would build each of them again, in every app.
    app.router.routes.extend(route for router in routers for route in router.routes)
    for error in _HANDLED:
        app.add_exception_handler(error, _on_error)
    return app


class _GuardedApp(FastAPI):
    """FastAPI inside shim.http's middleware. Its OpenAPI document lists the API keys that shim.http.guard checks."""

    def __init__(self, metrics: Metrics, access: Access, **options: Any) -> None:
        super().__init__(
            title="HunyuanVideo API",
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            **options,
        )
        self._metrics = metrics
        self._access = access

    def build_middleware_stack(self) -> ASGIApp:
        """The access log is outermost, so that it has the 500 that FastAPI makes of an unexpected error."""
        stack = guarded(super().build_middleware_stack(), self._access, OPEN_PATHS)
        return AccessLog(stack, self._metrics)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document. On a server with keys it says which paths need one."""
        if self.openapi_schema is None and self._access.api_keys:
            document = super().openapi()
            document["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            document["security"] = [{"bearer": []}, {"header": []}]
            for path in OPEN_PATHS & document["paths"].keys():
                for operation in document["paths"][path].values():
                    operation["security"] = []
        return super().openapi()


def _methods_of(request: Request) -> list[str]:
    """The methods of the path. Starlette's own Allow header has those of the first route only."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    # `/tasks/{task_id:path}` matches /tasks/1/events, too, which has a path of its own.
    own = max((route.path_format for route in found), key=len, default="")
    return sorted(set().union(*(route.methods or set() for route in found if route.path_format == own)))


async def _on_error(request: Request, exc: Exception) -> Response:
    """Every error in the documented shape, including FastAPI's own 404 and 405."""
    if isinstance(exc, HTTPException):
        code = ServerErrorCode.METHOD_NOT_ALLOWED if exc.status_code == 405 else ServerErrorCode.NOT_FOUND
        headers = {"Allow": ", ".join(_methods_of(request))} if exc.status_code == 405 else exc.headers
        exc = ApiError(code, f"{request.method} {request.url.path}: {exc.detail}", headers)
    if isinstance(exc, RequestValidationError):
        first = exc.errors()[0]
        exc = ApiError(ErrorCode.INVALID_REQUEST, f"{first['loc'][-1]}: {first['msg']}; got {first['input']!r:.60}")
    if isinstance(exc, ClientDisconnect):
        exc = ApiError(ErrorCode.INVALID_REQUEST, "the client closed the connection before its request was complete")
    return error_response(api_error(exc), request.url.path)
