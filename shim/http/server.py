"""Uvicorn with limits on what one client may send, keep open or leave unread.

Uvicorn has no limit for a head that never ends, a body that arrives too slowly, requests that are sent before the
earlier responses, or a client that does not read. Its own errors are plain text. tests/integration/shim/
test_hostile_clients.py has a test for each.
"""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import _TrustedHosts
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from contract.errors import ErrorCode
from shim.access import CONNECTION_LIMITS, ConnectionLimits
from shim.errors import ApiError, ServerErrorCode
from shim.http.admission import STREAM_CONNECTION, TRUST_CONNECTION, Admission

#: What HttpServer serves. shim.host has the name from here, so that it imports no web framework.
App = ASGIApp

#: Bytes of a request line and its headers, and the number of headers.
MAX_HEAD: Final = 32 * 1024
MAX_HEADERS: Final = 100
#: Requests that one client may send before their responses. Browsers and client libraries send none.
MAX_PIPELINED: Final = 16
#: Bytes around the chunks of a body: `MAX_FRAMING`, and `_FRAMING_PER_BYTE` for each byte of the body. A chunk of one
#: byte has five around it.
MAX_FRAMING: Final = 16 * 1024
_FRAMING_PER_BYTE: Final = 8
#: Bytes of a response that the kernel holds and has not sent. Without a limit it takes 4 MB for a client that does not
#: read, all of it read from the bucket.
MAX_UNSENT: Final = 128 * 1024
#: Bytes of a body that may arrive after its response.
MAX_UNREAD: Final = 8 * 1024 * 1024

_BODY_HEADERS: Final = frozenset({b"content-length", b"transfer-encoding"})


class Connection(HttpToolsProtocol):
    """One client's connection. It is closed if a request does not arrive within its time.

    An invalid request gets an error in the documented shape, unless another response has begun.
    """

    #: Seconds for a request's head, from the start of the connection or from the request's first byte.
    head_seconds: ClassVar[float] = 10.0
    #: Seconds for its body: 64 KiB need 9 kbit/s, 10 MB need 1.4 Mbit/s.
    body_seconds: ClassVar[float] = 60.0
    #: Seconds in which a client must read some of its response.
    stall_seconds: ClassVar[float] = 60.0
    #: Set by HttpServer.
    admission: ClassVar[Admission]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._receive_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._reading_head = True
        self._unparsed = 0
        self._chunk = 0
        self._body = 0
        self._unread = 0
        self._error: ApiError | None = None
        self._address = "unknown"
        self.waiting_since: float | None = None
        self.trusted = False
        self._stream_end: asyncio.Event | None = None  # of a response that is an endless stream

    @property
    def in_progress(self) -> bool:
        return not self._reading_head or (self.cycle is not None and not self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._address = self.client[0] if self.client is not None else "unknown"
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT)
        self.waiting_since = time.monotonic()
        try:
            self.admission.enter(self, self._address)
        except ApiError as exc:
            self._reject(exc)
        else:
            self._start_receive_timer(self.head_seconds)

    def give_up(self) -> None:
        """Closes a connection that waits for its client, because another one needs its place."""
        self.admission.leave(self, self._address)
        if self.flow.write_paused:
            self.transport.abort()
        elif self._stream_end is not None:
            self.shutdown()
        elif self.in_progress or self._unparsed > 0:
            self._reject(ApiError(ServerErrorCode.SERVER_BUSY, "too many connections are open, and this one waits"))
        else:
            self.transport.close()

    def _trust(self) -> None:
        self.trusted = True
        self.admission.trust(self._address)

    def _stream(self) -> asyncio.Event:
        """The request's response goes on until the returned event is set. See STREAM_CONNECTION."""
        self._stream_end = asyncio.Event()
        self.waiting_since = time.monotonic()
        return self._stream_end

    def shutdown(self) -> None:
        """Closes the connection after its response, which a stream has to end now."""
        super().shutdown()
        if self._stream_end is not None:
            self._stream_end.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.admission.leave(self, self._address)
        self._stop_receive_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._receive_timer is None and self._reading_head:
            self._start_receive_timer(self.head_seconds)
        self._chunk = len(data)
        super().data_received(data)
        self._unparsed += len(data)
        if self.transport.is_closing():
            return
        if self._reading_head and self._unparsed > MAX_HEAD:
            self._reject(_head_too_large())
        elif self._unparsed - self._body > MAX_HEAD + MAX_FRAMING + _FRAMING_PER_BYTE * self._body:
            self._reject(ApiError(ErrorCode.INVALID_REQUEST, "the chunks of the body have too much around them"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._body = self._unread = 0
        self.scope["state"] |= {TRUST_CONNECTION: self._trust, STREAM_CONNECTION: self._stream}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called for trailers, too: uvicorn would add them to the headers."""
        if not self._reading_head:
            raise self._refusal(ApiError(ErrorCode.INVALID_REQUEST, "trailers are not accepted: send them as headers"))
        if len(self.headers) >= MAX_HEADERS:
            raise self._refusal(_head_too_large())
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        if self.cycle.response_complete:
            self._unread += len(body)
            if self._unread > MAX_UNREAD:
                text = "the body goes on after its response"
                raise self._refusal(ApiError(ServerErrorCode.REQUEST_TOO_LARGE, text))
        super().on_body(body)

    def _refusal(self, error: ApiError) -> ApiError:
        """The error to raise in a callback of the parser, which then calls `send_400_response`."""
        self._error = error
        return error

    def on_headers_complete(self) -> None:
        """Checks a request's head. An error raised here makes the parser call `send_400_response`."""
        self._reading_head = False
        self._error = self._error_of_head()
        if self._error is not None:
            raise self._error
        self._start_receive_timer(self.body_seconds)
        super().on_headers_complete()

    def _error_of_head(self) -> ApiError | None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD:
            return _head_too_large()
        if len(self.pipeline) >= MAX_PIPELINED:
            return ApiError(ErrorCode.INVALID_REQUEST, f"more than {MAX_PIPELINED} requests wait for their responses")
        if self.parser.should_upgrade() and _BODY_HEADERS & {name for name, _ in self.headers}:
            # httptools would pass the body on as the first bytes of the other protocol.
            return ApiError(ErrorCode.INVALID_REQUEST, "this server speaks HTTP/1.1: leave out the Upgrade header")
        return None

    def on_message_complete(self) -> None:
        self._stop_receive_timer()
        self._reading_head = True
        self._unparsed = -self._chunk  # data_received adds it again: what follows in this chunk is not counted
        self._body = 0
        if not self.flow.write_paused and self._stream_end is None:
            self.waiting_since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._stream_end = None
        if self.waiting_since is None:
            self.waiting_since = time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn fixes the signature
        self._reject(self._error or ApiError(ErrorCode.INVALID_REQUEST, "this is not an HTTP/1.1 request"))

    def pause_writing(self) -> None:
        """Starts a timer because the client does not read."""
        super().pause_writing()
        self.waiting_since = time.monotonic()
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
            self.waiting_since = None if self.in_progress and self._stream_end is None else time.monotonic()
        super().resume_writing()

    def _start_receive_timer(self, seconds: float) -> None:
        self._stop_receive_timer()
        self._receive_timer = self.loop.call_later(seconds, self._on_receive_timeout, seconds)

    def _stop_receive_timer(self) -> None:
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None

    def _on_receive_timeout(self, seconds: float) -> None:
        if self.flow.read_paused:  # the server has stopped reading, so the client may have sent everything
            self._start_receive_timer(seconds)
        elif not self.transport.is_closing():
            part = "head" if self._reading_head else "body"
            error = f"the request {part} did not arrive within {seconds:g} s"
            self._reject(ApiError(ServerErrorCode.REQUEST_TIMEOUT, error))

    def _reject(self, error: ApiError) -> None:
        """Closes the connection; sends the error first unless a response has begun. The route's own is not sent."""
        self._stop_receive_timer()
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(_raw(error))
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        self.transport.close()


def _head_too_large() -> ApiError:
    return ApiError(
        ServerErrorCode.HEADERS_TOO_LARGE,
        f"the request head is larger than {MAX_HEAD // 1024} KiB or has over {MAX_HEADERS} headers",
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
    """Serves `app` until `should_exit`; open requests then get `grace` seconds. Installs no signal handlers."""

    def __init__(
        self,
        app: App,
        *,
        grace: int,
        connection: type[Connection] = Connection,
        limits: ConnectionLimits = CONNECTION_LIMITS,
    ) -> None:
        config = uvicorn.Config(
            app,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=grace,
        )
        # Many clients may share the connections of a proxy whose X-Forwarded-For uvicorn trusts.
        proxies = _TrustedHosts(config.forwarded_allow_ips)
        admission = Admission(limits, proxies.__contains__)
        config.http = type(connection.__name__, (connection,), {"admission": admission})
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to shim.host."""
        yield
