"""Reports the worker's state to the server, at `worker-report`, from the main process.

RunPod's pings are no substitute: they come from a separate process and say nothing about a model that loads or failed
to load. RunPod itself sets no HUNYUAN_WORKER_REPORT_URL; then nothing is sent.
"""

import logging
import threading
from collections.abc import Mapping
from itertools import product
from typing import Final, Self

import httpx

from contract.job import MAX_DURATION, MIN_DURATION, JobInput, Resolution
from contract.worker import RenderEstimate, WorkerReport, WorkerState
from handler.video_model.base import VideoModel

_INTERVAL: Final = 5.0

log = logging.getLogger(__name__)


class Reporter:
    """Posts the worker's state to `url` every 5 s and at each change. Sends nothing if `url` is None."""

    def __init__(self, url: str | None, *, key: str, model: str) -> None:
        self._url = url
        self._http = httpx.Client(headers={"Authorization": key}, timeout=httpx.Timeout(5, connect=3.05))
        self._report = WorkerReport(state=WorkerState.LOADING, model=model)
        self._model: VideoModel | None = None
        self._unsent = True
        self._closed = False
        self._wake = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)

    def __enter__(self) -> Self:
        if self._url is not None:
            self._wake.set()
            self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Sends an unsent report. A worker that was asked to stop reports STOPPED, because it holds no job any more."""
        if error is None and self._report.state is WorkerState.STOPPING:
            self._set(state=WorkerState.STOPPED)
        self._closed = True
        self._wake.set()
        if self._url is not None:
            self._thread.join()
        self._http.close()

    def ready(self, model: VideoModel, load_seconds: Mapping[str, float]) -> None:
        """The model is loaded. `load_seconds` names each phase.

        Every report asks the model for its GPU's memory and for its LoRA adapters: both change while the worker runs.
        """
        self._model = model
        self._set(
            state=WorkerState.READY,
            model=model.name,
            models=tuple(model.models),
            takes_images=model.takes_images,
            limits=tuple(model.limits),
            estimates=_estimates(model),
            attention=model.attention,
            load_seconds={phase: round(seconds, 3) for phase, seconds in load_seconds.items()},
        )

    def failed(self, error: str) -> None:
        """The model can't be loaded, or the bucket denies access."""
        self._set(state=WorkerState.FAILED, error=error)

    def stalled(self, error: str | None) -> None:
        """The render made no progress and is being stopped; with None, it has ended and the worker is ready again."""
        before, after = (WorkerState.READY, WorkerState.FAILED) if error else (WorkerState.FAILED, WorkerState.READY)
        if self._report.state is before:  # a worker that was asked to stop goes on saying so
            self._set(state=after, error=error)

    def stopping(self) -> None:
        """The worker takes no more jobs. Called by a signal handler, so it must not block."""
        self._set(state=WorkerState.STOPPING)

    def _set(self, **fields: object) -> None:
        self._report = self._report.model_copy(update=fields)
        self._unsent = True
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait(_INTERVAL)
            self._wake.clear()
            closed = self._closed
            if self._unsent or not closed:
                self._unsent = False
                self._send()
            if closed:
                return

    def _send(self) -> None:
        model = self._model
        live = {} if model is None else {"gpu": model.gpu(), "loras": tuple(model.loras)}
        report = self._report.model_copy(update=live)
        try:
            self._http.post(str(self._url), json=report.model_dump(mode="json")).raise_for_status()
        except httpx.HTTPError as exc:
            if not self._warned:
                log.warning("the report failed; retrying every %g s until the server is back: %s", _INTERVAL, exc)
            self._warned = True
        else:
            self._warned = False


def _estimates(model: VideoModel) -> tuple[RenderEstimate, ...]:
    """Of every kind of job that the model renders."""
    kinds = product(model.models, Resolution, range(MIN_DURATION, MAX_DURATION + 1))
    jobs = (
        JobInput(prompt="A job of this kind", model=name, resolution=size, duration=length)
        for name, size, length in kinds
    )
    return tuple(
        RenderEstimate(model=job.model, resolution=job.resolution, duration=job.duration, seconds=round(seconds, 1))
        for job in jobs
        if (seconds := model.expected_seconds(job)) is not None
    )
