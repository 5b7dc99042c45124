"""An id, a count and a log line for each request."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Final

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contract.log_fields import begin, bind
from shim.metrics import Metrics
from storage import layout

_REQUEST_ID: Final = "X-Request-ID"
_OTHER: Final = "other"
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ACCEPTED_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
#: Routes that are asked every few seconds by workers, load balancers and Prometheus: what goes well there is DEBUG.
_BEATS: Final = re.compile(r"/(health|metrics|ready)|/v2/\w+/(job-stop|job-take|job-take-batch|ping|worker-report)/.*")

log = logging.getLogger(__name__)


class AccessLog:
    """ASGI middleware. A request's own X-Request-ID is kept where it is fit for a log, and is in the answer.

    The id stays bound: the HTTP server runs each request in a context of its own, and what it logs after we are through
    belongs to the request, too. A pipelined request's context is a copy of its predecessor's: it begins anew.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, and tell of it when it is over."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        begin(request_id=request_id)
        started = time.perf_counter()
        answer: tuple[int, float] | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal answer
            if message["type"] == "http.response.start":
                answer = message["status"], time.perf_counter() - started
                MutableHeaders(scope=message)[_REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            status, latency = answer or (500, time.perf_counter() - started)
            self._record(scope, status, latency, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, latency: float, seconds: float) -> None:
        route = getattr(scope.get("route"), "path_format", _OTHER)
        method = scope["method"] if scope["method"] in _METHODS else _OTHER
        self._metrics.http_request(route, method, status, latency)
        level = logging.DEBUG if status < 400 and _BEATS.fullmatch(route) else logging.INFO
        milliseconds = round(seconds * 1000)
        fields = {"method": method, "route": route, "status": status, "duration_ms": milliseconds}
        log.log(level, "%s %s %d in %d ms", method, route, status, milliseconds, extra=fields)


async def bind_path_ids(request: Request) -> None:
    """Put the task and the worker that the path names on the lines of this request (a dependency of routes)."""
    ids = {name: request.path_params.get(name, "") for name in ("task_id", "worker_id")}
    bind(**{name: value for name, value in ids.items() if layout.is_task_id(value)})


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get(_REQUEST_ID, "")
    return given if _ACCEPTED_ID.fullmatch(given) else uuid.uuid4().hex
