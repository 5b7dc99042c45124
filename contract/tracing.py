"""Spans of OpenTelemetry: a request, its wait in the queue, its job, the job's stages.

Off, with no SDK imported, unless OTEL_EXPORTER_OTLP_ENDPOINT is set. It is part of the contract because one trace has
spans of server and worker: the context of the request travels in the input of its job. Configured once, as logging:

    with span("submit", task_id=task_id):
        ...

OpenTelemetry reads its other OTEL_* variables itself. It needs the extra `otel`. Spans carry no prompts and no texts of
errors. Source: https://www.w3.org/TR/trace-context/, https://opentelemetry.io/docs/specs/otel/protocol/exporter/.
"""

import importlib
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, Final, Literal

from pydantic import Field

from contract.settings import Settings

Kind = Literal["INTERNAL", "SERVER", "CONSUMER"]
log = logging.getLogger(__name__)


class TraceOptions(Settings):
    """Settings of traces, part of the server's and of the worker's settings."""

    otlp_endpoint: str | None = Field(
        default=None,
        validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="Collector of OpenTelemetry that gets traces by OTLP over HTTP, for example "
        "`http://localhost:4318`. Needs the extra `otel`, whose SDK reads the other `OTEL_*` variables. Default: no "
        "traces.",
    )


class Span:
    """An open span. This one goes nowhere."""

    def describe(self, name: str, **attributes: Any) -> None:
        """Replaces the name and adds attributes."""


_NO_SPAN: Final = nullcontext(Span())


def configure(options: TraceOptions, service: str, version: str) -> None:
    """Sends the spans of this process to the collector, if `options` name one. Call it once.

    `service` is the name of the process there, unless OTEL_SERVICE_NAME is set.
    """
    global _recorder
    if options.otlp_endpoint is None:
        return
    try:
        _recorder = _Recorder(service, version)
    except ImportError as exc:
        log.warning(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but there are no traces without the extra otel: "
            "pip install 'hunyuan-video-service[otel]' (%s)",
            exc,
        )


def span(
    name: str, *, parent: str | None = None, kind: Kind = "INTERNAL", **attributes: Any
) -> AbstractContextManager[Span]:
    """A span around a block. `parent` is a W3C traceparent; by default the parent is the open span."""
    return _NO_SPAN if _recorder is None else _recorder.span(name, parent, kind, attributes)


def bucket_request(operation: str) -> AbstractContextManager[object]:
    """A span of a request to the bucket, if a span is open. For the `observe` of `storage.bucket.Bucket`."""
    return _NO_SPAN if traceparent() is None else span(f"bucket {operation}")


def record(name: str, seconds: float, *, parent: str | None = None, **attributes: Any) -> None:
    """A span that ends now and has lasted for `seconds`."""
    if _recorder is not None:
        _recorder.record(name, seconds, parent, attributes)


def traceparent() -> str | None:
    """The W3C traceparent of the open span; None outside of spans."""
    return None if _recorder is None else _recorder.traceparent()


def traceparent_of(job_input: object) -> str | None:
    """The traceparent in the input of a queued job, which may be any JSON."""
    found = job_input.get("traceparent") if isinstance(job_input, dict) else None
    return found if isinstance(found, str) else None


class _OpenSpan(Span):
    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def describe(self, name: str, **attributes: Any) -> None:
        self._opened.update_name(name)
        self._opened.set_attributes(attributes)


class _Recorder:
    """Makes spans. Raises ImportError if OpenTelemetry is not installed."""

    def __init__(self, service: str, version: str) -> None:
        resources = _import("sdk.resources")
        sdk = _import("sdk.trace")
        self._trace = _import("trace")
        self._w3c = _import("trace.propagation.tracecontext").TraceContextTextMapPropagator()
        exporter = _import("exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter()
        resource = resources.Resource.create({"service.version": version})
        if resource.attributes["service.name"].startswith("unknown_service"):
            resource = resource.merge(resources.Resource({"service.name": service}))
        provider = sdk.TracerProvider(resource=resource)  # sends what is left when the process exits
        provider.add_span_processor(_import("sdk.trace.export").BatchSpanProcessor(exporter))
        self._tracer = provider.get_tracer("hunyuan", version)

    @contextmanager
    def span(self, name: str, parent: str | None, kind: Kind, attributes: dict[str, Any]) -> Iterator[Span]:
        with self._tracer.start_as_current_span(
            name,
            context=self._context(parent),
            kind=self._trace.SpanKind[kind],
            attributes=attributes,
            record_exception=False,  # its text may have a part of the prompt
            set_status_on_exception=False,
        ) as opened:
            try:
                yield _OpenSpan(opened)
            except BaseException as exc:
                opened.set_status(self._trace.StatusCode.ERROR, type(exc).__name__)
                raise

    def record(self, name: str, seconds: float, parent: str | None, attributes: dict[str, Any]) -> None:
        ended = time.time_ns()
        started = ended - int(seconds * 1e9)
        made = self._tracer.start_span(name, context=self._context(parent), start_time=started, attributes=attributes)
        made.end(ended)

    def traceparent(self) -> str | None:
        carrier: dict[str, str] = {}
        self._w3c.inject(carrier)
        return carrier.get("traceparent")

    def _context(self, parent: str | None) -> Any:
        return None if parent is None else self._w3c.extract({"traceparent": parent})


_recorder: _Recorder | None = None


def _import(name: str) -> ModuleType | Any:
    return importlib.import_module(f"opentelemetry.{name}")
