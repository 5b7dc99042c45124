"""The one place where the parts of the server meet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

import httpx
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from handler.contract import ErrorCode, InvalidInputError
from shim.api import documented, videos
from shim.api.dependencies import Services
from shim.errors import ApiError, api_error
from shim.http_client import HttpClient
from shim.queue.base import JobQueue, QueueError
from shim.tasks import Manifests, TaskNotFoundError, Tasks
from storage.bucket import Bucket
from storage.errors import StorageError

DISTRIBUTION = "hunyuan-video-service"


def create_app(
    queue: JobQueue,
    bucket: Bucket,
    *,
    public_url: str | None = None,
    routers: Sequence[APIRouter] = (),
) -> FastAPI:
    """The REST server over `queue` and `bucket`, both the caller's to close; `routers` are further faces."""
    # Slightly over a multiple of 3 s, the TCP retransmission timer; a read is one chunk, not a whole video.
    store = HttpClient(timeout=httpx.Timeout(30, connect=3.05), limits=httpx.Limits(max_connections=200))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with store:
            yield

    app = FastAPI(title="HunyuanVideo API", version=version(DISTRIBUTION), lifespan=lifespan, redoc_url=None)
    app.state.services = Services(
        tasks=Tasks(queue, Manifests(bucket)),
        queue=queue,
        bucket=bucket,
        store=store,
        version=version(DISTRIBUTION),
        public_url=public_url,
    )
    for router in (documented.router, videos.router, *routers):
        app.include_router(router)
    for expected in (
        ApiError,
        InvalidInputError,
        QueueError,
        StorageError,
        TaskNotFoundError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(expected, _on_error)
    return app


async def _on_error(request: Request, exc: Exception) -> Response:
    """Every error in the documented shape, the framework's own 404 and 405 too."""
    if isinstance(exc, HTTPException):
        code = ErrorCode.METHOD_NOT_ALLOWED if exc.status_code == 405 else ErrorCode.NOT_FOUND
        exc = ApiError(code, f"{request.method} {request.url.path}: {exc.detail}", exc.headers)
    error = api_error(exc)
    return JSONResponse(error.failure.model_dump(mode="json"), status_code=error.status, headers=error.headers)
