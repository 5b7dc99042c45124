"""`hunyuan prune`: deletes old videos once. It needs no running server, and works beside one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta

from shim.host.bucket import open_bucket
from shim.host.data_directory import DirectoryInUseError, locked_data_directory
from shim.host.errors import StartError, settings_errors
from shim.host.gateway import running_gateway
from shim.host.retention import Retention, delete_if_any
from shim.host.serve import open_database
from shim.metrics import Metrics
from shim.queue.base import QueueUnavailableError
from shim.queue.sql import SqlQueue
from shim.settings import ShimSettings
from shim.tasks import StoredVideos, Tasks
from storage.bucket import Bucket
from storage.errors import StorageError
from storage.settings import bucket_settings


def main(*, older_than: timedelta, dry_run: bool) -> list[str]:
    """Deletes the videos that are older than that; returns the ids of their tasks. `dry_run` deletes nothing.

    Raises:
        StartError: a setting is wrong, or the bucket or the queue does not answer.
    """
    with settings_errors():
        settings = ShimSettings()
    try:
        return asyncio.run(_prune(settings, older_than, dry_run))
    except (StorageError, QueueUnavailableError) as exc:
        raise StartError(f"stopped before the end, run the same command again: {exc}") from exc


async def _prune(settings: ShimSettings, older_than: timedelta, dry_run: bool) -> list[str]:
    found: list[str] = []
    async with AsyncExitStack() as stack:
        # 1. Open the bucket, and the queue, whose tasks must not stay completed without a video.
        videos = StoredVideos(await stack.enter_async_context(_bucket(settings)))
        tasks = None
        if settings.runpod_endpoint_id is None:
            database = await open_database(settings)
            stack.push_async_callback(database.close)
            tasks = Tasks(SqlQueue(database), videos)

        # 2. Scan the bucket once.
        async def delete(task_id: str) -> None:
            found.append(task_id)
            if dry_run:
                return
            if tasks is not None:
                await delete_if_any(tasks, task_id)
            else:  # RunPod forgets its jobs after half an hour
                await videos.discard(task_id)

        retention = Retention(videos, older_than, delete)
        while await retention.step():
            pass
    return found


@asynccontextmanager
async def _bucket(settings: ShimSettings) -> AsyncIterator[Bucket]:
    """The bucket of BUCKET_*, or the embedded one: that of the running server, else started for the block."""
    with settings_errors():
        named = bucket_settings()
    if named is not None:
        yield Bucket(named)
        return
    async with AsyncExitStack() as stack:
        try:
            stack.enter_context(locked_data_directory(settings))
        except DirectoryInUseError:
            yield Bucket(running_gateway(settings.directory / "bucket"))
            return
        store = await stack.enter_async_context(open_bucket(settings, Metrics(data_directory=settings.directory)))
        await store.started
        yield store.bucket
