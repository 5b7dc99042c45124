"""The one place where the parts of the server meet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from contract.errors import ErrorCode
from contract.job import InvalidInputError
from shim.access import OPEN_TO_ALL, Access, ApiKeys, RateLimit
from shim.api import documented, page, videos
from shim.api.dependencies import Services
from shim.api.metrics import router as metrics_router
from shim.errors import ApiError, ServerErrorCode, api_error
from shim.http.access_log import AccessLog
from shim.http.guard import DOCS_PATH, OPEN_PATHS, error_response, guarded
from shim.http_client import HttpClient
from shim.metrics import Metrics
from shim.queue.base import JobQueue, QueueError
from shim.tasks import StoredVideos, TaskNotFoundError, Tasks
from storage.bucket import Bucket
from storage.errors import StorageError

DISTRIBUTION = "hunyuan-video-service"


def create_app(
    queue: JobQueue,
    bucket: Bucket,
    *,
    metrics: Metrics | None = None,
    public_url: str | None = None,
    store_timeout: float = 10.0,
    routers: Sequence[APIRouter] = (),
    access: Access = OPEN_TO_ALL,
) -> FastAPI:
    """The REST server over `queue` and `bucket`, both the caller's to close; `routers` are further faces.

    `metrics` are those that `queue` and `bucket` were given, too; without them /metrics has its own of requests only.
    A store that sends nothing for `store_timeout` seconds in a download counts as away.
    """
    metrics = metrics or Metrics()
    # Connecting: slightly over a multiple of 3 s, the TCP retransmission timer.
    store = HttpClient(timeout=httpx.Timeout(store_timeout, connect=3.05), limits=httpx.Limits(max_connections=200))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with store:
            yield

    app = _Observed(
        metrics, access, title="HunyuanVideo API", version=version(DISTRIBUTION), lifespan=lifespan, redoc_url=None
    )
    app.state.services = Services(
        tasks=Tasks(queue, StoredVideos(bucket)),
        queue=queue,
        bucket=bucket,
        store=store,
        metrics=metrics,
        version=version(DISTRIBUTION),
        public_url=public_url,
        rate_limit=RateLimit(access.rate_limit) if access.rate_limit is not None else None,
    )
    for router in (documented.router, videos.router, page.router, metrics_router, *routers):
        app.include_router(router)
    for expected in (
        ApiError,
        InvalidInputError,
        QueueError,
        StorageError,
        TaskNotFoundError,
        ClientDisconnect,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(expected, _on_error)
    return app


class _Observed(FastAPI):
    """FastAPI with every request counted and logged, and behind `shim.api.guard`, which its document tells of."""

    def __init__(self, metrics: Metrics, access: Access, **options: Any) -> None:
        super().__init__(docs_url=DOCS_PATH, swagger_ui_oauth2_redirect_url=None, redirect_slashes=False, **options)
        self._metrics = metrics
        self._keys = ApiKeys(access.api_keys)
        self._cors_origins = access.cors_origins

    def build_middleware_stack(self) -> ASGIApp:
        """Everything there is, with the log outermost: what makes a 500 of an error is within it, too."""
        return AccessLog(guarded(super().build_middleware_stack(), self._keys, self._cors_origins), self._metrics)

    def openapi(self) -> dict[str, Any]:
        """The document; where keys are set, with what needs one."""
        if self.openapi_schema is None and self._keys:
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


async def _on_error(request: Request, exc: Exception) -> Response:
    """Every error in the documented shape, the framework's own 404 and 405 too."""
    if isinstance(exc, HTTPException):
        code = ServerErrorCode.METHOD_NOT_ALLOWED if exc.status_code == 405 else ServerErrorCode.NOT_FOUND
        exc = ApiError(code, f"{request.method} {request.url.path}: {exc.detail}", exc.headers)
    if isinstance(exc, ClientDisconnect):
        exc = ApiError(ErrorCode.INVALID_REQUEST, "the request broke off")
    return error_response(api_error(exc))
