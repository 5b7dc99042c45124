"""The server's bucket: the one that BUCKET_* name, or the embedded one."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import anyio.to_thread

from shim.host.errors import StartError, settings_errors
from shim.host.gateway import EmbeddedBucket
from shim.host.supervisor import Launch, Supervised, supervising
from shim.metrics import Metrics
from shim.settings import ShimSettings
from storage.bucket import Bucket
from storage.errors import StorageDeniedError, StorageError
from storage.settings import BucketSettings, bucket_settings

_GATEWAY_GRACE: Final = 10.0
#: Seconds that the bucket has for each answer. A client waits: STORAGE_UNAVAILABLE now is better than success later.
_TIMEOUT: Final = 10.0
_ATTEMPTS: Final = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenBucket:
    """The bucket, and the variables that a worker of this machine needs in addition to ours to reach it.

    `started` ends when the bucket can be used. It raises StartError if the embedded bucket can't start.
    """

    bucket: Bucket
    started: asyncio.Task[None]
    environment: Mapping[str, str] = field(default_factory=dict)


@asynccontextmanager
async def open_bucket(settings: ShimSettings, metrics: Metrics) -> AsyncIterator[OpenBucket]:
    """The bucket that BUCKET_* name, else the embedded one, which runs until the block ends.

    Raises:
        StartError: BUCKET_* are incomplete or wrong, or a file of the embedded bucket is damaged.
    """
    with settings_errors():
        named = bucket_settings()
    if named is not None:
        bucket = _connect(named, metrics)
        await _check(bucket)
        yield OpenBucket(bucket, asyncio.create_task(asyncio.sleep(0)))
    elif settings.runpod_endpoint_id is not None:
        raise StartError(
            "BUCKET_ENDPOINT_URL is not set: with RUNPOD_ENDPOINT_ID, set BUCKET_* to the endpoint's bucket"
        )
    else:
        async with _embedded(EmbeddedBucket(settings.directory / "bucket"), metrics) as store:
            yield store


@asynccontextmanager
async def _embedded(embedded: EmbeddedBucket, metrics: Metrics) -> AsyncIterator[OpenBucket]:
    """The embedded bucket. The block begins while the gateway still starts, which takes a second or two."""
    formatted = asyncio.create_task(embedded.format())

    async def launch() -> Launch:
        await formatted
        return await embedded.launch()

    async def start() -> None:
        await formatted
        await embedded.wait_until_listening()
        await anyio.to_thread.run_sync(bucket.create)

    bucket = _connect(embedded.settings, metrics)
    started = asyncio.create_task(start())
    async with supervising([Supervised("S3 gateway", launch, metrics.supervise("S3 gateway"))], _GATEWAY_GRACE):
        try:
            yield OpenBucket(bucket, started, embedded.environment())
        finally:
            started.cancel()


def _connect(settings: BucketSettings, metrics: Metrics) -> Bucket:
    return Bucket(settings, timeout=_TIMEOUT, attempts=_ATTEMPTS, observe=metrics.s3_request)


async def _check(bucket: Bucket) -> None:
    """Sends one request: a bucket that denies access stops the start, one that does not answer doesn't."""
    try:
        await anyio.to_thread.run_sync(bucket.check)
    except StorageDeniedError as exc:
        raise StartError(str(exc)) from exc
    except StorageError as exc:
        log.error("the bucket does not answer; starting without it, /ready stays 503 until it does: %s", exc)
