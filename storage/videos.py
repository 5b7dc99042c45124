"""A task's objects in the bucket: verdict, videos, posters and sprite sheets. This module owns keys and their order.

Each attempt writes its video, its poster and its sprite sheet under keys of its own. Then it writes the manifest, which
names them, at the task's one verdict key. So a late attempt never changes the bytes of a video that another one
completed. The verdict key has either that manifest or a tombstone, and whichever is there first is the verdict.
"""

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from pydantic import ValidationError

from contract.result import VERDICT, JobResult, Manifest, Tombstone, Verdict
from storage import layout
from storage.bucket import Bucket
from storage.errors import ObjectExistsError, ObjectNotFoundError, StorageUnavailableError

log = logging.getLogger(__name__)


class Videos:
    """The videos of one bucket, by task id. Every method except `result` sends requests and may raise StorageError.

    `on_bytes` is called while a file is sent, with the number of bytes since the last call.
    """

    def __init__(self, bucket: Bucket, *, on_bytes: Callable[[int], None] | None = None) -> None:
        self._bucket = bucket
        self._on_bytes = on_bytes

    def find_verdict(self, task_id: str) -> Verdict | None:
        """How the task ended; None if the bucket has no valid verdict."""
        key = layout.manifest_key(task_id)
        try:
            return VERDICT.validate_json(self._bucket.get_bytes(key))
        except ObjectNotFoundError:
            return None
        except ValidationError:
            log.error("the object at %s is not a valid manifest; ignoring it", key)
            return None

    def find(self, task_id: str) -> Manifest | None:
        """The manifest of a completed task; None if the bucket has no valid one."""
        verdict = self.find_verdict(task_id)
        return verdict if isinstance(verdict, Manifest) else None

    def find_result(self, task_id: str) -> JobResult | None:
        """The result of a completed task's job; None if there is no manifest."""
        manifest = self.find(task_id)
        return self.result(manifest) if manifest is not None else None

    def result(self, manifest: Manifest) -> JobResult:
        """What a job returns: the manifest and presigned URLs."""
        return JobResult(
            **dict(manifest),
            video_url=self._bucket.presign(manifest.video_key),
            poster_url=self._bucket.presign(manifest.poster_key),
        )

    # What a worker does

    def put_video(self, task_id: str, attempt: str, path: Path) -> None:
        """Step 1 of storing a task."""
        self._bucket.put_file(
            path, layout.video_key(task_id, attempt), content_type="video/mp4", on_bytes=self._on_bytes
        )

    def put_poster(self, task_id: str, attempt: str, path: Path) -> None:
        """Step 2 of storing a task."""
        self._bucket.put_file(
            path, layout.poster_key(task_id, attempt), content_type="image/jpeg", on_bytes=self._on_bytes
        )

    def put_sheet(self, task_id: str, attempt: str, path: Path) -> None:
        """Step 3 of storing a task."""
        self._bucket.put_file(
            path, layout.sheet_key(task_id, attempt), content_type="image/jpeg", on_bytes=self._on_bytes
        )

    def put_manifest(self, manifest: Manifest) -> Verdict:
        """Step 4 of storing a task, which completes it unless it has a verdict. Returns the verdict."""
        self._bucket.sync()
        verdict = self._put_verdict(manifest)
        self._bucket.sync()
        return verdict

    def _put_verdict(self, manifest: Manifest) -> Verdict:
        try:
            self._put(manifest, only_if_absent=True)
        except ObjectExistsError:
            if (verdict := self.find_verdict(manifest.task_id)) is not None:
                return verdict
            self._put(manifest)  # what is there is no verdict
        # Read it back: a store without conditional writes lets two workers write, and the last one stays.
        verdict = self.find_verdict(manifest.task_id)
        if verdict is None:
            raise StorageUnavailableError(f"the manifest of task {manifest.task_id} was written and is not there")
        return verdict

    def discard_attempt(self, task_id: str, attempt: str, tombstone: Tombstone | None) -> None:
        """Deletes what an attempt has stored. `tombstone` takes the place of its manifest; with None, a completed
        attempt stays as it is.
        """
        verdict = self.find_verdict(task_id)
        if isinstance(verdict, Manifest) and verdict.video_key == layout.video_key(task_id, attempt):
            if tombstone is None:
                return
            self._put(tombstone)
        for key in (layout.video_key, layout.poster_key, layout.sheet_key):
            self._bucket.delete(key(task_id, attempt))

    # What the server does

    def bury(self, tombstone: Tombstone) -> None:
        """Makes the tombstone the task's verdict, and deletes the objects of every attempt."""
        self._put(tombstone)
        self.discard_attempts(tombstone.task_id)

    def keep_only(self, manifest: Manifest) -> None:
        """Makes the manifest the verdict again if another one took its place, and deletes other attempts' objects.

        A task without a verdict has been deleted, or is in another bucket; it gets no verdict.
        """
        verdict = self.find_verdict(manifest.task_id)
        replaced = isinstance(verdict, Tombstone) or (verdict is not None and verdict.video_key != manifest.video_key)
        if replaced:
            if not self._bucket.list_keys(manifest.video_key, limit=1):
                log.error("the completed video %s is not in the bucket any more", manifest.video_key)
                return
            log.warning("another attempt has overwritten the manifest of this completed task; restoring it")
            self._put(manifest)
        self.discard_attempts(manifest.task_id, keep=manifest.object_keys)

    def discard_attempts(self, task_id: str, keep: Collection[str] = ()) -> None:
        """Deletes the objects of every attempt, except those whose keys are in `keep`."""
        old_layout = layout.video_key(task_id), layout.poster_key(task_id)
        for key in (*old_layout, *self._bucket.list_keys(layout.attempts_prefix(task_id))):
            if key not in keep:
                self._bucket.delete(key)

    def reopen(self, task_id: str) -> None:
        """Deletes the tombstone of a failed task that will be rendered again. A manifest stays."""
        if isinstance(self.find_verdict(task_id), Tombstone):
            self._bucket.delete(layout.manifest_key(task_id))

    def discard(self, task_id: str) -> None:
        """Deletes all of a task's objects."""
        self._bucket.delete(layout.manifest_key(task_id))
        self.discard_attempts(task_id)

    def _put(self, verdict: Verdict, *, only_if_absent: bool = False) -> None:
        self._bucket.put_bytes(
            verdict.model_dump_json().encode(),
            layout.manifest_key(verdict.task_id),
            content_type="application/json",
            only_if_absent=only_if_absent,
        )
