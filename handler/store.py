"""Retries a job's requests to its bucket. `storage.videos` owns the objects, their keys and their order."""

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final, TypeVar

from contract.errors import TASK_CANCELLED, ErrorCode, JobFailure
from contract.result import JobResult, Manifest, Tombstone, Verdict
from contract.retry import RetryPolicy
from handler.video_model.base import RenderCancelledError
from storage import layout
from storage.errors import StorageError, StorageUnavailableError
from storage.videos import Videos

#: Seconds between two checks whether the job was cancelled.
_POLL_INTERVAL: Final = 0.1
#: Seconds to retry before the render, when there is no finished video to lose.
_LONGEST_LOOKUP: Final = 120.0

#: Retries of deleting the objects of an attempt that failed or lost. Later the server finds them.
_DISCARD_RETRIES: Final = RetryPolicy(first=1.0, longest=10.0, total=60.0)
#: The failure of a job whose video the bucket rejected.
NOT_STORED: Final = JobFailure(error="The video could not be stored", error_code=ErrorCode.STORAGE_UNAVAILABLE)

T = TypeVar("T")
log = logging.getLogger(__name__)


class _TaskEndedError(Exception):
    """The bucket has a verdict of the task."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.status)
        self.verdict = verdict


@dataclass(kw_only=True)
class JobStore:
    """Finds and stores the objects of one job.

    Every method blocks, calls `keep_alive` several times a second and `on_progress` when a request begins or waits for
    its retry, and raises RenderCancelledError as soon as `cancelled` is set, even while the S3 server does not answer.
    `is_stalled` tells whether the watchdog has set it, and not the platform.
    """

    videos: Videos
    task_id: str
    is_ours: bool
    policy: RetryPolicy
    cancelled: Event
    keep_alive: Callable[[], None]
    on_progress: Callable[[], None]
    is_stalled: Callable[[], bool] = lambda: False
    _attempt: str = field(default_factory=lambda: uuid.uuid4().hex[:12], init=False)
    #: The latest request. After a cancellation it may still be running.
    _request: Future[Any] | None = field(default=None, init=False)

    @property
    def keys(self) -> Mapping[str, str]:
        """The manifest's keys of its objects. No other attempt writes these."""
        return {
            "video_key": layout.video_key(self.task_id, self._attempt),
            "poster_key": layout.poster_key(self.task_id, self._attempt),
            "sheet_key": layout.sheet_key(self.task_id, self._attempt),
        }

    def find(self) -> Verdict | None:
        """The verdict if the task has ended before. Retries only while the bucket is unavailable.

        Raises:
            StorageError: the bucket denied the request, or stayed unavailable.
        """
        policy = replace(self.policy, total=min(self.policy.total, _LONGEST_LOOKUP))
        return self._retry(policy, StorageUnavailableError, "looking up the manifest", self._find)

    def put(self, video: Path, poster: Path, sheet: Path, make_manifest: Callable[[], Manifest]) -> Verdict:
        """Stores the job's objects. `make_manifest` is called after the others are stored.

        Returns the task's verdict. If it is not this job's manifest, the task has ended meanwhile: another worker has
        completed it, or it has failed or was cancelled. Then the objects of this job are deleted.

        Raises:
            StorageError: the bucket rejected the upload until the retry deadline. Objects already uploaded are deleted.
        """
        videos, task, attempt = self.videos, self.task_id, self._attempt
        try:
            self._upload("storing the video", lambda: videos.put_video(task, attempt, video))
            self._upload("storing the poster", lambda: videos.put_poster(task, attempt, poster))
            self._upload("storing the sprite sheet", lambda: videos.put_sheet(task, attempt, sheet))
            manifest = make_manifest()
            verdict = self._upload("storing the manifest", lambda: videos.put_manifest(manifest))
        except _TaskEndedError as exc:
            verdict = exc.verdict
        except RenderCancelledError:
            # A stalled task goes back to the queue. If its manifest is written after all, the next attempt finds it.
            self._discard_later(None if self.is_stalled() else TASK_CANCELLED)
            raise
        except StorageError:
            self._discard_later(NOT_STORED)
            raise
        if not (isinstance(verdict, Manifest) and verdict.video_key == self.keys["video_key"]):
            log.warning("the task has ended meanwhile; deleting the objects of this attempt, %s", attempt)
            self._discard_later(NOT_STORED)
        return verdict

    def result(self, manifest: Manifest) -> JobResult:
        """What the job returns."""
        return self.videos.result(manifest)

    def _find(self) -> Verdict | None:
        return self.videos.find_verdict(self.task_id)

    def _discard_later(self, failure: JobFailure | None) -> None:
        """`failure` is how the task has ended; None if it has not."""
        is_cancelled = failure is TASK_CANCELLED
        tombstone = None if failure is None else Tombstone.of(self.task_id, failure, cancelled=is_cancelled)
        _start_thread(partial(self._discard, tombstone), "discard")

    def _discard(self, tombstone: Tombstone | None) -> None:
        """Deletes the uploaded objects, after the running request. Retries for some seconds."""
        if self._request is not None:
            wait([self._request])
        try:
            retrying = _DISCARD_RETRIES.retrying(StorageUnavailableError, what="deleting the objects of this attempt")
            retrying(self.videos.discard_attempt, self.task_id, self._attempt, tombstone)
        except StorageError as exc:
            log.warning("objects of the unfinished attempt %s may remain in the bucket: %s", self._attempt, exc)

    def _put_unless_ended(self, put: Callable[[], T]) -> T:
        """A look before each upload: a worker that was stopped or cut off for a while must not go on."""
        if (verdict := self._find()) is not None:
            raise _TaskEndedError(verdict)
        return put()

    def _upload(self, what: str, call: Callable[[], T]) -> T:
        # An operator can repair our bucket's settings while a finished video waits; a job's s3Config can't change.
        on = StorageError if self.is_ours else StorageUnavailableError
        return self._retry(self.policy, on, what, partial(self._put_unless_ended, call))

    def _retry(self, policy: RetryPolicy, on: type[StorageError], what: str, call: Callable[[], T]) -> T:
        return policy.retrying(on, what=what, sleep=self._sleep)(lambda: self._send(call))

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._check_cancelled()
            self.on_progress()
            self.cancelled.wait(min(left, _POLL_INTERVAL))

    def _send(self, call: Callable[[], T]) -> T:
        """`call()` in its own thread, so that a cancelled job need not wait for a server that does not answer."""
        self._check_cancelled()
        self.on_progress()
        self._request = request = Future[T]()
        _start_thread(partial(_fulfil, request, call), "store")
        while not wait([request], _POLL_INTERVAL).done:
            self._check_cancelled()
        return request.result()

    def _check_cancelled(self) -> None:
        if self.cancelled.is_set():
            raise RenderCancelledError("cancelled during a request to the bucket")
        self.keep_alive()


def _start_thread(target: Callable[[], None], name: str) -> None:
    """A daemon thread that logs with the ids bound here."""
    Thread(target=copy_context().run, args=(target,), name=name, daemon=True).start()


def _fulfil(request: Future[T], call: Callable[[], T]) -> None:
    try:
        request.set_result(call())
    except BaseException as exc:  # noqa: BLE001 - raised again in the thread that waits
        request.set_exception(exc)
