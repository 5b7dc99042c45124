"""A task's objects in the bucket: video, poster and manifest. This module owns their order.

The manifest is written last and deleted first, so a manifest means that the video is complete.
"""

import logging
from pathlib import Path

from pydantic import ValidationError

from contract.result import JobResult, Manifest
from storage.bucket import Bucket
from storage.errors import ObjectNotFoundError
from storage.layout import manifest_key, poster_key, video_key

log = logging.getLogger(__name__)


class Videos:
    """The videos of one bucket, by task id. Every method except `result` sends requests and may raise StorageError."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def find(self, task_id: str) -> Manifest | None:
        """The manifest of a completed task; None if the bucket has no valid one."""
        try:
            return Manifest.model_validate_json(self._bucket.get_bytes(manifest_key(task_id)))
        except ObjectNotFoundError:
            return None
        except ValidationError:
            log.error("the object at %s is not a valid manifest; ignoring it", manifest_key(task_id))
            return None

    def find_result(self, task_id: str) -> JobResult | None:
        """The result of a completed task's job; None if there is no manifest."""
        manifest = self.find(task_id)
        return self.result(manifest) if manifest is not None else None

    def result(self, manifest: Manifest) -> JobResult:
        """What a job returns: the manifest and presigned URLs."""
        return JobResult(
            **dict(manifest),
            video_url=self._bucket.presign(video_key(manifest.task_id)),
            poster_url=self._bucket.presign(poster_key(manifest.task_id)),
        )

    def put_video(self, task_id: str, path: Path) -> None:
        """Step 1 of storing a task."""
        self._bucket.put_file(path, video_key(task_id), content_type="video/mp4")

    def put_poster(self, task_id: str, path: Path) -> None:
        """Step 2 of storing a task."""
        self._bucket.put_file(path, poster_key(task_id), content_type="image/jpeg")

    def put_manifest(self, manifest: Manifest) -> None:
        """Step 3 of storing a task, which completes it."""
        self._bucket.sync()
        body = manifest.model_dump_json().encode()
        self._bucket.put_bytes(body, manifest_key(manifest.task_id), content_type="application/json")
        self._bucket.sync()

    def discard(self, task_id: str) -> None:
        """Deletes a task's objects."""
        for key in (manifest_key(task_id), video_key(task_id), poster_key(task_id)):
            self._bucket.delete(key)

    def discard_unfinished(self, task_id: str) -> None:
        """Deletes a task's video and poster unless a manifest shows that another worker completed the task."""
        if self.find(task_id) is None:
            self._bucket.delete(video_key(task_id))
            self._bucket.delete(poster_key(task_id))
