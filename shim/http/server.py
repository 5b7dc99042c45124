"""Uvicorn as this server uses it: with bounds on what one client may hold, keep open, or send.

Uvicorn itself sets none on a head that never ends, a body that drips in, requests sent ahead of their answers, or a
client that reads no answer; and it writes errors of its own as plain text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from contract.errors import ErrorCode
from shim.errors import ApiError, ServerErrorCode

#: Bytes of a request line and its headers, and how many headers there may be.
MAX_HEAD: Final = 32 * 1024
MAX_HEADERS: Final = 100
#: Requests that one client may send ahead of their answers. No browser and no client library sends any.
MAX_PIPELINED: Final = 16
#: Open connections: below the usual limit of 1,024 open files, with room for those to the bucket.
MAX_CONNECTIONS: Final = 600

_BODY_HEADERS: Final = frozenset({b"content-length", b"transfer-encoding"})


class Connection(HttpToolsProtocol):
    """One client's connection. Every request must arrive whole in its time, or the connection is closed.

    A request that can't be taken is answered in the shape that clients know, where no answer has begun.
    """

    #: Seconds for a request's head, from the connection's first moment or the request's first byte.
    head_seconds: ClassVar[float] = 10.0
    #: Seconds for the rest of it. A body of 64 KiB takes as long at 9 kbit/s; one of 10 MB needs 1.4 Mbit/s.
    body_seconds: ClassVar[float] = 60.0
    #: Seconds in which a client must read something of its answer.
    stall_seconds: ClassVar[float] = 60.0
    max_connections: ClassVar[int] = MAX_CONNECTIONS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._arrival: asyncio.TimerHandle | None = None
        self._departure: asyncio.TimerHandle | None = None
        self._reading_head = True
        self._unparsed = 0
        self._chunk = 0
        self._fault: ApiError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """A client has connected."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(ApiError(ServerErrorCode.SERVER_BUSY, "too many connections are open"))
        else:
            self._expect(self.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request, or of several."""
        if self.transport.is_closing():
            return
        if self._arrival is None and self._reading_head:
            self._expect(self.head_seconds)
        self._chunk = len(data)
        super().data_received(data)
        self._unparsed += len(data)
        if self._reading_head and self._unparsed > MAX_HEAD and not self.transport.is_closing():
            self._refuse(_head_too_large())

    def on_headers_complete(self) -> None:
        """A request's head is there. An error raised here ends the parsing, and `send_400_response` follows."""
        self._reading_head = False
        self._fault = self._fault_of_head()
        if self._fault is not None:
            raise self._fault
        self._expect(self.body_seconds)
        super().on_headers_complete()

    def _fault_of_head(self) -> ApiError | None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD or len(self.headers) > MAX_HEADERS:
            return _head_too_large()
        if len(self.pipeline) >= MAX_PIPELINED:
            return ApiError(ErrorCode.INVALID_REQUEST, "too many requests were sent ahead of their answers")
        if self.parser.should_upgrade() and _BODY_HEADERS & {name for name, _ in self.headers}:
            # httptools would take the body for the other protocol's first bytes.
            return ApiError(ErrorCode.INVALID_REQUEST, "HTTP/1.1 is spoken here: leave out the Upgrade header")
        return None

    def on_message_complete(self) -> None:
        """A request is there as a whole."""
        self._stop_waiting()
        self._reading_head = True
        self._unparsed = -self._chunk  # what follows it in this chunk is not counted
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn fixes the signature
        """What was sent is no request."""
        self._refuse(self._fault or ApiError(ErrorCode.INVALID_REQUEST, "this is no HTTP/1.1 request"))

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        if self._departure is None:
            self._departure = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        if self._departure is not None:
            self._departure.cancel()
            self._departure = None
        super().resume_writing()

    def _expect(self, seconds: float) -> None:
        self._stop_waiting()
        self._arrival = self.loop.call_later(seconds, self._late, seconds)

    def _stop_waiting(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _late(self, seconds: float) -> None:
        if self.flow.read_paused:  # the client may have sent it: it is we who do not read
            self._expect(seconds)
        elif not self.transport.is_closing():
            self._refuse(ApiError(ServerErrorCode.REQUEST_TIMEOUT, f"the request was not whole after {seconds:g} s"))

    def _refuse(self, error: ApiError) -> None:
        """Close, with an answer where the client waits for none of another request."""
        self._stop_waiting()
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(_raw(error))
        self.transport.close()


def _head_too_large() -> ApiError:
    return ApiError(
        ServerErrorCode.HEADERS_TOO_LARGE,
        f"the head is larger than {MAX_HEAD // 1024} KiB or has over {MAX_HEADERS} headers",
    )


def _raw(error: ApiError) -> bytes:
    body = error.body.model_dump_json().encode()
    headers = {
        **error.headers,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
    }
    lines = [f"HTTP/1.1 {error.status} {error.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class HttpServer(uvicorn.Server):
    """Serves `app` until `should_exit`; then requests under way get `grace` seconds. Installs no signal handlers."""

    def __init__(self, app: FastAPI, *, grace: int, connection: type[Connection] = Connection) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=grace,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """When to stop is for the caller to say."""
        yield
