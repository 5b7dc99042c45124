"""A job's objects and their way into its bucket: patient with a bucket that is away, and never half there for long."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final, TypeVar

from contract.result import Manifest
from handler.video_model.base import RenderCancelledError
from storage.errors import StorageError, StorageUnavailableError
from storage.videos import Videos

#: Seconds between two looks at whether the job was cancelled.
_TICK: Final = 0.1
#: Seconds for which a bucket is waited for while there is no render to lose.
_NOTHING_TO_LOSE: Final = 120.0

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long a bucket that fails is tried again: exponential back-off with jitter, all in seconds.

    `total` counts for each object from its first try. Waits grow from `first` to `longest`, each shortened by up to a
    half at random, so that many workers do not come back at the same moment.
    """

    total: float = 600.0
    first: float = 1.0
    longest: float = 30.0

    def waits(self) -> Iterator[float]:
        """How long to wait after each failure, without end."""
        wait_for = self.first
        while True:
            yield wait_for * random.uniform(0.5, 1.0)  # nosec B311 # jitter
            wait_for = min(2 * wait_for, self.longest)


class JobStore:
    """The objects of one job in its bucket: video, poster, and last the manifest, which means that all are there.

    Every method blocks, calls `waiting` a few times a second meanwhile, and ends with RenderCancelledError as soon as
    `cancelled` is set, even while the server keeps silent.
    """

    def __init__(
        self,
        videos: Videos,
        task_id: str,
        *,
        is_ours: bool,
        patience: Patience,
        cancelled: Event,
        waiting: Callable[[], None],
    ) -> None:
        self._videos = videos
        self._task_id = task_id
        # Our own bucket's keys may be mended while a finished video waits; a job's s3Config stays as it came.
        self._kept_through = StorageError if is_ours else StorageUnavailableError
        self._patience = patience
        self._cancelled = cancelled
        self._waiting = waiting
        #: What the server was last asked; of a cancelled job it may be under way still.
        self._asked: Future[Any] | None = None

    def find(self) -> Manifest | None:
        """The manifest, if the job was done before. A bucket that refuses is not asked again.

        Raises:
            StorageError: the bucket can't be asked.
        """
        return self._patiently(self._look, min(self._patience.total, _NOTHING_TO_LOSE), StorageUnavailableError)

    def put(self, video: Path, poster: Path, make_manifest: Callable[[], Manifest]) -> Manifest:
        """Store the job's objects; the manifest, made once the others are there.

        Where another worker has stored the same job meanwhile, its objects stay and its manifest is returned.

        Raises:
            StorageError: the bucket took them not for as long as `patience` says; what it did take is removed.
        """
        finished = self._insistently(self._look)
        if finished is not None:
            return finished
        try:
            self._insistently(partial(self._videos.put_video, self._task_id, video))
            self._insistently(partial(self._videos.put_poster, self._task_id, poster))
            manifest = make_manifest()
            self._insistently(partial(self._videos.put_manifest, manifest))
        except (StorageError, RenderCancelledError):
            Thread(target=self._remove, name="remove", daemon=True).start()
            raise
        return manifest

    def _look(self) -> Manifest | None:
        return self._videos.find(self._task_id)

    def _remove(self) -> None:
        """Remove what has no manifest, once; a bucket that is away keeps it. A manifest means that all is well."""
        if self._asked is not None:
            wait([self._asked])
        try:
            self._videos.discard_unfinished(self._task_id)
        except StorageError as exc:
            log.warning("%s: parts of it may stay in the bucket: %s", self._task_id, exc)

    def _insistently(self, call: Callable[[], T]) -> T:
        return self._patiently(call, self._patience.total, self._kept_through)

    def _patiently(self, call: Callable[[], T], total: float, through: type[StorageError]) -> T:
        """Do it, and for `total` seconds again while it fails with `through`."""
        deadline = time.monotonic() + total
        waits = self._patience.waits()
        while True:
            pause = next(waits)
            try:
                return self._ask(call)
            except through as exc:
                if time.monotonic() + pause > deadline:
                    raise
                log.warning("%s: trying again in %.1f s: %s", self._task_id, pause, exc)
            until = time.monotonic() + pause
            while (left := until - time.monotonic()) > 0:
                self._alive()
                self._cancelled.wait(min(left, _TICK))

    def _ask(self, call: Callable[[], T]) -> T:
        """`call()` in a thread of its own: a server that keeps silent must not hold a cancelled job."""
        self._alive()
        answer: Future[T] = Future()
        self._asked = answer
        Thread(target=_fulfil, args=(answer, call), name="store", daemon=True).start()
        while not wait([answer], _TICK).done:
            self._alive()
        return answer.result()

    def _alive(self) -> None:
        if self._cancelled.is_set():
            raise RenderCancelledError("cancelled while the bucket was asked")
        self._waiting()


def _fulfil(answer: Future[T], call: Callable[[], T]) -> None:
    try:
        answer.set_result(call())
    except BaseException as exc:  # noqa: BLE001 - handed to the thread that waits
        answer.set_exception(exc)
