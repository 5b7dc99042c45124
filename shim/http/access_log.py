"""An id, a metric and a log line for each request."""

import logging
import re
import time
import uuid
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contract import tracing
from contract.log_fields import begin, bind
from shim.metrics import Metrics
from storage import layout

_REQUEST_ID: Final = b"x-request-id"
_OTHER: Final = "other"
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_VALID_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
#: Clients, workers, load balancers and Prometheus call these every few seconds: a success is logged at DEBUG.
_POLLED: Final = re.compile(
    r"/(health|metrics|ready|status/.*|tasks/.*/events)|/v2/\w+/(health|(job-stop|job-take(-batch)?|ping|status|worker-report)/.*)"
)
#: A worker posts its progress there every second.
_WORKERS: Final = re.compile(r"/v2/\w+/job-(done|stream)/")

log = logging.getLogger(__name__)


class AccessLog:
    """ASGI middleware. Uses the request's own X-Request-ID if it is valid, and returns the id in the response.

    The id stays bound after the call, because what the HTTP server logs later belongs to the request too. A pipelined
    request's context is a copy of the previous request's, so each request first drops the fields that it inherits.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        begin(request_id=request_id)
        started = time.perf_counter()
        response: tuple[int, float] | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal response
            if message["type"] == "http.response.start":
                response = message["status"], time.perf_counter() - started
                message["headers"] = [*message.get("headers", ()), (_REQUEST_ID, request_id.encode())]
            await send(message)

        with _span(scope) as span:
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                status, latency = response or (500, time.perf_counter() - started)
                self._record(scope, span, status, latency, time.perf_counter() - started)

    def _record(self, scope: Scope, span: tracing.Span, status: int, latency: float, seconds: float) -> None:
        route = getattr(scope.get("route"), "path_format", _OTHER)
        method = scope["method"] if scope["method"] in _METHODS else _OTHER
        self._metrics.http_request(route, method, status, latency)
        names = "http.request.method", "http.route", "http.response.status_code"
        span.describe(f"{method} {route}", **dict(zip(names, (method, route, status), strict=True)))
        level = logging.DEBUG if status < 400 and _POLLED.fullmatch(route) else logging.INFO
        if not log.isEnabledFor(level):
            return
        milliseconds = round(seconds * 1000)
        fields = {"method": method, "route": route, "status": status, "duration_ms": milliseconds}
        log.log(level, "%s %s %d in %d ms", method, route, status, milliseconds, extra=fields)


async def bind_path_ids(request: Request) -> None:
    """A dependency of routes: log lines of this request carry the task id and the worker id of its path."""
    ids = {name: request.path_params.get(name, "") for name in ("task_id", "worker_id")}
    bind(**{name: value for name, value in ids.items() if layout.is_task_id(value)})


def _span(scope: Scope) -> AbstractContextManager[tracing.Span]:
    """A span of the request. What polls has none, and neither has the protocol of workers, which have their own."""
    if _POLLED.fullmatch(scope["path"]) or _WORKERS.match(scope["path"]):
        return nullcontext(tracing.Span())
    return tracing.span(scope["method"], parent=_header(scope, b"traceparent") or None, kind="SERVER")


def _header(scope: Scope, wanted: bytes) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), "")


def _request_id(scope: Scope) -> str:
    from_client = _header(scope, _REQUEST_ID)
    return from_client if _VALID_ID.fullmatch(from_client) else uuid.uuid4().hex
