"""What the routes are given: one bundle, made in `create_app`."""

from __future__ import annotations

from dataclasses import dataclass

import anyio.to_thread
import httpx
from fastapi import Request

from shim.metrics import Metrics
from shim.queue.base import JobQueue
from shim.tasks import Tasks
from storage.bucket import Bucket


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

    async def check_bucket(self) -> None:
        """Raise StorageError unless the bucket answers."""
        await anyio.to_thread.run_sync(self.bucket.check)


def services(request: Request) -> Services:
    """The app's services."""
    bundle: Services = request.app.state.services
    return bundle


def public_url(request: Request, use: Services) -> str:
    """Where clients reach this server, with no slash at the end: as configured, else as this request came."""
    return (use.public_url or str(request.base_url)).rstrip("/")
