"""Retries a job's requests to its bucket. `storage.videos` owns the objects, their keys and their order."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final, TypeVar

from contract.result import Manifest
from contract.retry import RetryPolicy
from handler.video_model.base import RenderCancelledError
from storage.errors import StorageError, StorageUnavailableError
from storage.videos import Videos

#: Seconds between two checks whether the job was cancelled.
_POLL_INTERVAL: Final = 0.1
#: Seconds to retry before the render, when there is no finished video to lose.
_LONGEST_LOOKUP: Final = 120.0

T = TypeVar("T")
log = logging.getLogger(__name__)


class JobStore:
    """Finds and stores the objects of one job.

    Every method blocks, calls `keep_alive` several times a second and `on_progress` when a request begins or waits for
    its retry, and raises RenderCancelledError as soon as
    `cancelled` is set, even while the S3 server does not answer.
    """

    def __init__(
        self,
        videos: Videos,
        task_id: str,
        *,
        is_ours: bool,
        policy: RetryPolicy,
        cancelled: Event,
        keep_alive: Callable[[], None],
        on_progress: Callable[[], None],
    ) -> None:
        self._videos = videos
        self._task_id = task_id
        self._policy = policy
        self._cancelled = cancelled
        self._keep_alive = keep_alive
        self._on_progress = on_progress
        # An operator can repair our bucket's settings while a finished video waits; a job's s3Config can't change.
        self._retried_on_upload = StorageError if is_ours else StorageUnavailableError
        #: The latest request. After a cancellation it may still be running.
        self._request: Future[Any] | None = None

    def find(self) -> Manifest | None:
        """The manifest if the job was completed before. Retries only while the bucket is unavailable.

        Raises:
            StorageError: the bucket denied the request, or stayed unavailable.
        """
        policy = replace(self._policy, total=min(self._policy.total, _LONGEST_LOOKUP))
        return self._retry(policy, StorageUnavailableError, "looking up the manifest", self._find)

    def put(self, video: Path, poster: Path, make_manifest: Callable[[], Manifest]) -> Manifest:
        """Stores the job's objects. `make_manifest` is called after the video and the poster are stored.

        If another worker has completed the job meanwhile, its objects stay and its manifest is returned.

        Raises:
            StorageError: the bucket rejected the upload until the retry deadline. Objects already uploaded are deleted.
        """
        finished = self._upload("looking up the manifest", self._find)
        if finished is not None:
            return finished
        try:
            self._upload("storing the video", partial(self._videos.put_video, self._task_id, video))
            self._upload("storing the poster", partial(self._videos.put_poster, self._task_id, poster))
            manifest = make_manifest()
            self._upload("storing the manifest", partial(self._videos.put_manifest, manifest))
        except (StorageError, RenderCancelledError):
            _start_thread(self._discard, "discard")
            raise
        return manifest

    def _find(self) -> Manifest | None:
        return self._videos.find(self._task_id)

    def _discard(self) -> None:
        """Deletes the uploaded objects unless a manifest completes them. Tries once, after the running request."""
        if self._request is not None:
            wait([self._request])
        try:
            self._videos.discard_unfinished(self._task_id)
        except StorageError as exc:
            log.warning("the video or the poster of this failed task may remain in the bucket: %s", exc)

    def _upload(self, what: str, call: Callable[[], T]) -> T:
        return self._retry(self._policy, self._retried_on_upload, what, call)

    def _retry(self, policy: RetryPolicy, on: type[StorageError], what: str, call: Callable[[], T]) -> T:
        return policy.retrying(on, what=what, sleep=self._sleep)(lambda: self._send(call))

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._check_cancelled()
            self._on_progress()
            self._cancelled.wait(min(left, _POLL_INTERVAL))

    def _send(self, call: Callable[[], T]) -> T:
        """`call()` in its own thread, so that a cancelled job need not wait for a server that does not answer."""
        self._check_cancelled()
        self._on_progress()
        self._request = request = Future[T]()
        _start_thread(partial(_fulfil, request, call), "store")
        while not wait([request], _POLL_INTERVAL).done:
            self._check_cancelled()
        return request.result()

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise RenderCancelledError("cancelled during a request to the bucket")
        self._keep_alive()


def _start_thread(target: Callable[[], None], name: str) -> None:
    """A daemon thread that logs with the ids bound here."""
    Thread(target=copy_context().run, args=(target,), name=name, daemon=True).start()


def _fulfil(request: Future[T], call: Callable[[], T]) -> None:
    try:
        request.set_result(call())
    except BaseException as exc:  # noqa: BLE001 - raised again in the thread that waits
        request.set_exception(exc)
