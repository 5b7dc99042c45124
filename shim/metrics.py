"""What the server counts and measures, for Prometheus.

Counters and histograms hold the events of this process: sum them over several servers. The gauges of the queue and of
the workers are read from the queue at each scrape and are the same on every server: aggregate them with `max`. Every
label has few values (codes, states and route templates), never a path or a task id.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

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
from shim.queue.base import QueueSummary
from shim.queue.job import JobState, WebhookState
from shim.queue.observer import JobObserver
from storage.errors import ObjectNotFoundError, StorageDeniedError

#: Bytes. With less free space, the queue or the embedded bucket soon accepts nothing.
_FULL_DISK: Final = 100_000_000
#: From 1 s to 30 min: renders of 4 steps at 720p and of 50 steps at 1080p fall inside.
_JOB_SECONDS: Final = (1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600, 900, 1800)
_REQUEST_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
#: The failures that a worker's render can have.
_FAILURES: Final = (ErrorCode.OOM_ERROR, ErrorCode.GENERATION_FAILED, ErrorCode.STORAGE_UNAVAILABLE)

#: name: description, labels
_COUNTERS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "hunyuan_tasks_submitted": ("Tasks that this server put on the queue.", ()),
    "hunyuan_tasks_ended": (
        "Tasks whose end this server stored, or first saw on RunPod; error_code is empty for completed ones.",
        ("state", "error_code"),
    ),
    "hunyuan_tasks_requeued": ("Times that a task returned to the queue because its worker was lost.", ()),
    "hunyuan_webhook_attempts": (
        "Attempts of this server at webhooks: delivered, pending (to be repeated) or failed (given up).",
        ("state",),
    ),
    "hunyuan_s3_errors": (
        "This server's requests to the bucket that failed. A missing object is not an error.",
        ("operation", "error"),
    ),
    "hunyuan_http_requests": (
        'Requests by route template, method and status. The route is "other" if no template matches.',
        ("route", "method", "status"),
    ),
    "hunyuan_process_restarts": (
        "Times that a worker or the S3 gateway of this server exited unexpectedly and was restarted.",
        ("process",),
    ),
}
#: name: description, labels, buckets
_HISTOGRAMS: Final[Mapping[str, tuple[str, tuple[str, ...], tuple[float, ...]]]] = {
    "hunyuan_task_wait_seconds": ("Time from a task's submission to its first start.", (), _JOB_SECONDS),
    "hunyuan_task_render_seconds": (
        "Time that workers took for completed tasks, by resolution and by seconds of video.",
        ("resolution", "duration"),
        _JOB_SECONDS,
    ),
    "hunyuan_task_stage_seconds": ("Time that workers took for completed tasks, by stage.", ("stage",), _JOB_SECONDS),
    "hunyuan_s3_request_duration_seconds": (
        "Time of this server's requests to the bucket, retries included; for a video, up to its first byte.",
        ("operation",),
        _REQUEST_SECONDS,
    ),
    "hunyuan_http_request_duration_seconds": (
        "Time from a request to the head of its response. A worker's request for a job lasts up to 20 s.",
        ("route", "method"),
        _REQUEST_SECONDS,
    ),
}

# The client library exports the creation time of each counter and histogram by default, half as many series again.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics(JobObserver):
    """The metrics of one server. `data_directory` is the directory whose free disk space is exported."""

    def __init__(self, *, data_directory: Path | None = None) -> None:
        self._data_directory = data_directory
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._counters = {
            name: Counter(name, text, labels, registry=self._registry) for name, (text, labels) in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(name, text, labels, buckets=buckets, registry=self._registry)
            for name, (text, labels, buckets) in _HISTOGRAMS.items()
        }
        self._http_series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        # These series exist from the start, because increase() misses the first value of a new series.
        ended = self._counters["hunyuan_tasks_ended"]
        ended.labels(JobState.COMPLETED, "")
        ended.labels(JobState.CANCELLED, ErrorCode.CANCELLED)
        for code in _FAILURES:
            ended.labels(JobState.FAILED, code)
        for state in get_args(WebhookState.model_fields["state"].annotation):
            self._counters["hunyuan_webhook_attempts"].labels(state)

    def disk_problems(self) -> list[str]:
        """A sentence if the disk of the data directory is full: it has the queue and the embedded bucket."""
        if self._data_directory is None:
            return []
        try:
            free = shutil.disk_usage(self._data_directory).free
        except OSError as exc:
            return [f"HUNYUAN_DATA_DIR cannot be read: {exc.strerror}"]
        if free >= _FULL_DISK:
            return []
        return [f"the disk of HUNYUAN_DATA_DIR is full: {free // 1_000_000} MB are free"]

    def submitted(self) -> None:
        self._counters["hunyuan_tasks_submitted"].inc()

    def started(self, waited: float) -> None:
        self._histograms["hunyuan_task_wait_seconds"].observe(max(waited, 0.0))

    def requeued(self) -> None:
        self._counters["hunyuan_tasks_requeued"].inc()

    def webhook_attempted(self, state: str) -> None:
        self._counters["hunyuan_webhook_attempts"].labels(state).inc()

    def ended(
        self, state: JobState, *, failure: JobFailure | None = None, result: Manifest | None = None, count: int = 1
    ) -> None:
        if state is JobState.COMPLETED and failure is not None:
            state = JobState.FAILED  # clients see a failed task
        error_code = failure.error_code if failure is not None else ""
        self._counters["hunyuan_tasks_ended"].labels(state, error_code).inc(count)
        if result is None:
            return
        timings = result.timings
        if "total" in timings:
            kind = result.input.resolution, result.input.duration
            self._histograms["hunyuan_task_render_seconds"].labels(*kind).observe(timings["total"])
        for stage in Stage:
            if stage in timings:
                self._histograms["hunyuan_task_stage_seconds"].labels(stage).observe(timings[stage])

    @contextmanager
    def s3_request(self, operation: str) -> Iterator[None]:
        """Measures one request to the bucket and counts its error."""
        errors = self._counters["hunyuan_s3_errors"]
        for error in ("denied", "unavailable"):  # from the start, as in __init__
            errors.labels(operation, error)
        started = time.perf_counter()
        try:
            yield
        except Exception as exc:
            if (failed_with := _storage_error(exc)) is not None:
                errors.labels(operation, failed_with).inc()
            raise
        finally:
            seconds = time.perf_counter() - started
            self._histograms["hunyuan_s3_request_duration_seconds"].labels(operation).observe(seconds)

    def http_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Counts one request. `route` is a template."""
        series = self._http_series.get((route, method, status))
        if series is None:  # `labels` looks them up under a lock
            series = self._http_series[route, method, status] = (
                self._counters["hunyuan_http_requests"].labels(route, method, status),
                self._histograms["hunyuan_http_request_duration_seconds"].labels(route, method),
            )
        requests, durations = series
        requests.inc()
        durations.observe(seconds)

    def supervise(self, process: str) -> Callable[[], None]:
        """Returns the function that counts a restart of the process."""
        return self._counters["hunyuan_process_restarts"].labels(process).inc

    def exposition(self, accept: str, version: str, queue: QueueSummary | None) -> tuple[bytes, str]:
        """Every metric in the format that `accept` asks for, and the media type of that format.

        `queue` is None if the queue is unavailable.
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


@dataclass(frozen=True, eq=False)  # eq=False keeps it hashable: the registry uses it as a key
class _Scrape:
    """The gauges of one scrape. They are not stored, so the series of a lost worker end."""

    version: str
    queue: QueueSummary | None
    data_directory: Path | None

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("hunyuan_build", "The service's release.", {"version": self.version})
        is_up = 0 if self.queue is None else 1
        yield _gauge("hunyuan_queue_up", "1 if the queue is available to this server, else 0.", (), [((), is_up)])
        if self.queue is not None:
            yield from _queue_gauges(self.queue)
        if self.data_directory is not None:
            yield from _disk_gauges(self.data_directory)


def _gauge(name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def _queue_gauges(queue: QueueSummary) -> Iterator[Metric]:
    same = "The same on every server."
    workers, reports = queue.workers, queue.workers.reports_by_id
    tasks = [(("waiting",), queue.waiting), (("running",), queue.running)]
    yield _gauge("hunyuan_queue_tasks", f"Waiting and running tasks. {same}", ["state"], tasks)
    states = [
        ((WorkerState.READY,), workers.ready),
        ((WorkerState.LOADING,), workers.loading),
        ((WorkerState.FAILED,), workers.failed),
    ]
    yield _gauge("hunyuan_workers", f"Workers that are alive, by state. {same}", ["state"], states)
    gpus = {worker_id: report.gpu for worker_id, report in reports.items() if report.gpu is not None}
    size = [((worker_id,), gpu.memory_total) for worker_id, gpu in gpus.items()]
    free = [((worker_id,), gpu.memory_free) for worker_id, gpu in gpus.items()]
    yield _gauge("hunyuan_worker_vram_size_bytes", f"Memory of a worker's GPU. {same}", ["worker_id"], size)
    yield _gauge("hunyuan_worker_vram_free_bytes", f"Free memory of a worker's GPU. {same}", ["worker_id"], free)
    loads = [
        ((worker_id, phase), seconds)
        for worker_id, report in reports.items()
        for phase, seconds in (report.load_seconds or {}).items()
    ]
    text = f"Time of each phase of a worker's start. {same}"
    yield _gauge("hunyuan_worker_load_seconds", text, ["worker_id", "phase"], loads)


def _disk_gauges(directory: Path) -> Iterator[Metric]:
    try:
        usage = shutil.disk_usage(directory)
    except OSError:  # the directory was deleted: export the other metrics
        return
    disk = "the disk with HUNYUAN_DATA_DIR."
    yield _gauge("hunyuan_data_directory_size_bytes", f"Size of {disk}", (), [((), usage.total)])
    yield _gauge("hunyuan_data_directory_free_bytes", f"Free space on {disk}", (), [((), usage.free)])
