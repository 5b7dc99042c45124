"""What the server counts and measures, for Prometheus.

Counters and histograms hold what this process saw: sum them over several servers. The gauges of the queue and of the
workers are read from the queue at each scrape, and are the same from every server on it: take one, with `max`. Every
label has few values: codes, states and route templates, never a path or a task.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from contract.errors import ErrorCode, JobFailure
from contract.result import Manifest, Stage
from contract.worker import WorkerState
from shim.errors import ApiError
from shim.queue.base import Backlog, JobObserver, JobState, Workers
from storage.errors import ObjectNotFoundError, StorageDeniedError

#: From 1 s to 30 min: a 4-step render of 5 seconds at 720p and a 50-step one of 10 at 1080p both lie well inside.
_JOB_SECONDS: Final = (1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600, 900, 1800)
_REQUEST_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
#: What a worker itself makes of a job.
_FAILURES: Final = (ErrorCode.OOM_ERROR, ErrorCode.GENERATION_FAILED, ErrorCode.STORAGE_UNAVAILABLE)

# Of each counter and histogram the client library would export its time of birth, too: half as many series again.
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class QueueFigures:
    """The queue as it answered a scrape."""

    backlog: Backlog
    workers: Workers


class Metrics(JobObserver):
    """The metrics of one server. `data_directory` is the one whose free space is watched."""

    def __init__(self, *, data_directory: Path | None = None) -> None:
        self._data_directory = data_directory
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._submitted = Counter(
            "hunyuan_tasks_submitted", "Tasks that this server put on the queue.", registry=registry
        )
        self._ended = Counter(
            "hunyuan_tasks_ended",
            "Tasks whose end this server stored, or on RunPod saw, each once; error_code is empty for completed ones.",
            ("state", "error_code"),
            registry=registry,
        )
        self._requeued = Counter(
            "hunyuan_tasks_requeued",
            "Times that a task went back to the queue because its worker was lost.",
            registry=registry,
        )
        self._wait = Histogram(
            "hunyuan_task_wait_seconds",
            "Time from a task's submission to its first start.",
            buckets=_JOB_SECONDS,
            registry=registry,
        )
        self._render = Histogram(
            "hunyuan_task_render_seconds",
            "Time that workers took for completed tasks, by resolution and by seconds of video.",
            ("resolution", "duration"),
            buckets=_JOB_SECONDS,
            registry=registry,
        )
        self._stage = Histogram(
            "hunyuan_task_stage_seconds",
            "The same by stage.",
            ("stage",),
            buckets=_JOB_SECONDS,
            registry=registry,
        )
        self._s3 = Histogram(
            "hunyuan_s3_request_duration_seconds",
            "Time of this server's requests to the bucket, retries included; of a video up to its first byte.",
            ("operation",),
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._s3_errors = Counter(
            "hunyuan_s3_errors",
            "This server's requests to the bucket that failed. An object that is not there is no error.",
            ("operation", "error"),
            registry=registry,
        )
        self._http = Counter(
            "hunyuan_http_requests",
            'Requests by route template ("other": no such route), method and status.',
            ("route", "method", "status"),
            registry=registry,
        )
        self._http_seconds = Histogram(
            "hunyuan_http_request_duration_seconds",
            "Time from a request to the head of its answer; workers' questions for jobs are held for up to 20 s.",
            ("route", "method"),
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._restarts = Counter(
            "hunyuan_process_restarts",
            "Times that a worker or S3 gateway of this server ended unasked and was started again.",
            ("process",),
            registry=registry,
        )
        # Known from the start: increase() does not see a series' first value.
        self._ended.labels(JobState.COMPLETED, "")
        self._ended.labels(JobState.CANCELLED, ErrorCode.CANCELLED)
        for code in _FAILURES:
            self._ended.labels(JobState.FAILED, code)

    def submitted(self) -> None:
        """Count it."""
        self._submitted.inc()

    def started(self, waited: float) -> None:
        """Measure the wait."""
        self._wait.observe(max(waited, 0.0))

    def requeued(self) -> None:
        """Count it."""
        self._requeued.inc()

    def ended(
        self, state: JobState, *, failure: JobFailure | None = None, result: Manifest | None = None, count: int = 1
    ) -> None:
        """Count the outcome, and measure what the result says of the render."""
        if state is JobState.COMPLETED and failure is not None:
            state = JobState.FAILED  # as clients are told
        self._ended.labels(state, failure.error_code if failure is not None else "").inc(count)
        if result is None:
            return
        timings = result.timings
        if "total" in timings:
            self._render.labels(result.input.resolution, result.input.duration).observe(timings["total"])
        for stage in Stage:
            if stage in timings:
                self._stage.labels(stage).observe(timings[stage])

    @contextmanager
    def s3_request(self, operation: str) -> Iterator[None]:
        """Measure one request to the bucket, and count the error that it ends with."""
        for known in ("denied", "unavailable"):
            self._s3_errors.labels(operation, known)
        started = time.perf_counter()
        try:
            yield
        except Exception as exc:
            if (error := _storage_error(exc)) is not None:
                self._s3_errors.labels(operation, error).inc()
            raise
        finally:
            self._s3.labels(operation).observe(time.perf_counter() - started)

    def http_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request. `route` is a template."""
        self._http.labels(route, method, status).inc()
        self._http_seconds.labels(route, method).observe(seconds)

    def supervise(self, process: str) -> Callable[[], None]:
        """Count the restarts of a process: call what this returns at each."""
        return self._restarts.labels(process).inc

    def exposition(self, accept: str, version: str, queue: QueueFigures | None) -> tuple[bytes, str]:
        """All of it in the format that `accept` asks for, and that format's media type.

        `queue` is None where the queue could not be asked.
        """
        scrape = CollectorRegistry()
        scrape.register(self._registry)
        scrape.register(_Scrape(version, queue, self._data_directory))
        encode, media_type = choose_encoder(accept)
        return encode(scrape), media_type


def _storage_error(exc: Exception) -> str | None:
    match exc:
        case ObjectNotFoundError() | ApiError(status=404):
            return None
        case StorageDeniedError():
            return "denied"
        case _:
            return "unavailable"


@dataclass(frozen=True, eq=False)  # a registry takes it as a key
class _Scrape:
    """What is looked up at a scrape and kept nowhere: a worker that is gone leaves no series behind."""

    version: str
    queue: QueueFigures | None
    data_directory: Path | None

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("hunyuan_build", "The service's release.", {"version": self.version})
        up = GaugeMetricFamily("hunyuan_queue_up", "Whether the queue answered this server: 1 or 0.")
        up.add_metric((), 0 if self.queue is None else 1)
        yield up
        if self.queue is not None:
            yield _tasks(self.queue.backlog)
            yield from _workers(self.queue.workers)
        if self.data_directory is not None:
            yield from _disk(self.data_directory)


def _tasks(backlog: Backlog) -> Metric:
    tasks = GaugeMetricFamily(
        "hunyuan_queue_tasks", "Tasks that wait and run. The same from every server.", labels=["state"]
    )
    tasks.add_metric(["waiting"], len(backlog.waiting))
    tasks.add_metric(["running"], len(backlog.running))
    return tasks


def _workers(workers: Workers) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "hunyuan_workers", "Workers that are alive, by state. The same from every server.", labels=["state"]
    )
    states.add_metric([WorkerState.READY], workers.ready)
    states.add_metric([WorkerState.LOADING], workers.loading)
    states.add_metric([WorkerState.FAILED], workers.failed)
    labels = ["worker_id"]
    size = GaugeMetricFamily(
        "hunyuan_worker_vram_size_bytes", "Memory of a worker's GPU. The same from every server.", labels=labels
    )
    free = GaugeMetricFamily(
        "hunyuan_worker_vram_free_bytes", "Free memory of a worker's GPU. The same from every server.", labels=labels
    )
    load = GaugeMetricFamily(
        "hunyuan_worker_load_seconds",
        "Time of each phase of a worker's start. The same from every server.",
        labels=["worker_id", "phase"],
    )
    for worker_id, report in workers.reports_by_id.items():
        if report.gpu is not None:
            size.add_metric([worker_id], report.gpu.memory_total)
            free.add_metric([worker_id], report.gpu.memory_free)
        for phase, seconds in (report.load_seconds or {}).items():
            load.add_metric([worker_id, phase], seconds)
    yield from (states, size, free, load)


def _disk(directory: Path) -> Iterator[Metric]:
    try:
        usage = shutil.disk_usage(directory)
    except OSError:  # it is gone: the series end, the scrape goes on
        return
    size = GaugeMetricFamily("hunyuan_data_directory_size_bytes", "Size of the disk with HUNYUAN_DATA_DIR.")
    size.add_metric((), usage.total)
    free = GaugeMetricFamily("hunyuan_data_directory_free_bytes", "Free space on the disk with HUNYUAN_DATA_DIR.")
    free.add_metric((), usage.free)
    yield from (size, free)
