"""Deletes videos that are older than HUNYUAN_VIDEO_TTL, with their posters and manifests; and expired images."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from contract.log_fields import bound
from contract.result import Manifest
from shim.queue.base import QueueUnavailableError
from shim.tasks import NoVideoError, StoredImages, StoredVideos, TaskNotFoundError, Tasks
from storage import layout
from storage.bucket import ObjectInfo
from storage.errors import StorageError

#: The most objects that one step lists, and the most videos that it deletes.
_PAGE: Final = 1000
_LIMIT: Final = 100
#: The longest waits in seconds: between two steps, and between two scans of the bucket. A short TTL shortens both.
_STEP_SECONDS: Final = 5.0
_SCAN_SECONDS: Final = 600.0
_SHORTEST_WAIT: Final = 0.2

log = logging.getLogger(__name__)


async def delete_if_any(tasks: Tasks, task_id: str) -> None:
    """Deletes the task's video, unless another server has just deleted it."""
    try:
        await tasks.delete_video(task_id)
    except (NoVideoError, TaskNotFoundError) as exc:
        log.info("nothing to delete: %s", exc)


async def delete_expired_images(images: StoredImages) -> None:
    """Deletes uploaded images some time after they have expired, until it is cancelled."""
    while True:
        try:
            more = await images.delete_expired()
        except StorageError as exc:
            log.error("deleting expired images failed, trying again: %s", exc)
            more = False
        await asyncio.sleep(_STEP_SECONDS if more else _SCAN_SECONDS)


class Retention:
    """A scan of the bucket for videos whose manifest is older than `ttl`. `delete` gets their task ids."""

    def __init__(self, videos: StoredVideos, ttl: timedelta, delete: Callable[[str], Awaitable[None]]) -> None:
        self._videos = videos
        self._ttl = ttl
        self._delete = delete
        self._cursor = ""

    async def step(self) -> bool:
        """Lists the next objects and deletes the old videos among them; False at the end of the bucket.

        Raises:
            StorageError, QueueUnavailableError: the next step begins with the same video.
        """
        page = await self._videos.list_objects(self._cursor, _PAGE)
        before = datetime.now(UTC) - self._ttl
        deleted = 0
        for item in page:
            task_id = layout.task_id_of(item.key)
            if task_id is not None and _is_old_verdict(item, task_id, before):
                with bound(task_id=task_id):
                    deleted += await self._delete_old(task_id, before)
            self._cursor = item.key
            if deleted == _LIMIT:
                return True
        if not page:
            self._cursor = ""
        return bool(page)

    async def _delete_old(self, task_id: str, before: datetime) -> bool:
        verdict = await self._videos.find_verdict(task_id)
        if not isinstance(verdict, Manifest) or verdict.created_at > before:
            return False
        await self._delete(task_id)
        return True

    async def run_forever(self) -> None:
        """Scans again and again until it is cancelled."""
        tenth = max(self._ttl.total_seconds() / 10, _SHORTEST_WAIT)
        while True:
            try:
                more = await self.step()
            except (StorageError, QueueUnavailableError) as exc:
                log.error("deleting videos older than HUNYUAN_VIDEO_TTL failed, trying again: %s", exc)
                more = True
            await asyncio.sleep(min(tenth, _STEP_SECONDS if more else _SCAN_SECONDS))


def _is_old_verdict(item: ObjectInfo, task_id: str, before: datetime) -> bool:
    return item.key == layout.manifest_key(task_id) and item.modified < before
