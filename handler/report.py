"""The worker's own sign of life: what it is at, told to its platform's `worker-report` from the main process.

RunPod's pings come from a process of their own that can outlive the worker, and say nothing of a model that loads
or failed to load. On RunPod itself no HUNYUAN_WORKER_REPORT_URL is set, and nothing is sent.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Final, Self

import httpx

from contract.worker import Gpu, WorkerReport, WorkerState
from handler.video_model.base import VideoModel

_INTERVAL: Final = 5.0

log = logging.getLogger(__name__)


class Reporter:
    """Tells `url` of the worker's state every 5 s and at each change. With no url it keeps silent."""

    def __init__(self, url: str | None, *, key: str, model: str) -> None:
        self._url = url
        self._http = httpx.Client(headers={"Authorization": key}, timeout=httpx.Timeout(5, connect=3.05))
        self._report = WorkerReport(state=WorkerState.LOADING, model=model)
        self._gpu: Callable[[], Gpu | None] = lambda: None
        self._unsent = True
        self._closed = False
        self._wake = threading.Event()
        self._silenced = False
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)

    def __enter__(self) -> Self:
        if self._url is not None:
            self._wake.set()
            self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Send what has not been sent, and end. A worker that ends in good order says so: it holds no job any more."""
        if error is None and self._report.state is WorkerState.STOPPING:
            self._report = self._report.model_copy(update={"state": WorkerState.STOPPED})
            self._unsent = True
        self._closed = True
        self._wake.set()
        if self._url is not None:
            self._thread.join()
        self._http.close()

    def ready(self, model: VideoModel, load_seconds: Mapping[str, float]) -> None:
        """The model is loaded, in so many seconds a phase; its GPU is asked for each report."""
        self._gpu = model.gpu
        self._report = WorkerReport(
            state=WorkerState.READY,
            model=model.name,
            models=tuple(model.models),
            takes_images=model.takes_images,
            attention=model.attention,
            load_seconds={phase: round(seconds, 3) for phase, seconds in load_seconds.items()},
        )
        self._say()

    def failed(self, error: str) -> None:
        """The model can't be loaded."""
        self._report = self._report.model_copy(update={"state": WorkerState.FAILED, "error": error})
        self._say()

    def stopping(self) -> None:
        """The worker was asked to stop: it takes no more jobs. Called by a signal handler: it only leaves word."""
        self._report = self._report.model_copy(update={"state": WorkerState.STOPPING})
        self._say()

    def _say(self) -> None:
        self._unsent = True
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait(_INTERVAL)
            self._wake.clear()
            closing = self._closed
            if self._unsent or not closing:
                self._unsent = False
                self._send()
            if closing:
                return

    def _send(self) -> None:
        report = self._report.model_copy(update={"gpu": self._gpu()})
        try:
            self._http.post(str(self._url), json=report.model_dump(mode="json")).raise_for_status()
        except httpx.HTTPError as exc:
            if not self._silenced:
                log.warning("the platform takes no report just now: %s", exc)
            self._silenced = True
        else:
            self._silenced = False
