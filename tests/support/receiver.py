"""A receiver of webhooks on loopback, and the reference library that verifies them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook

#: The example of Standard Webhooks.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@dataclass(frozen=True)
class Received:
    """One request, as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def webhook_id(self) -> str:
        return self.headers["webhook-id"]

    def verified(self, secret: str = SECRET) -> dict[str, Any]:
        """The event, if its signature and its time are right."""
        event: dict[str, Any] = Webhook(secret).verify(self.body, self.headers)
        return event


class Request(BaseHTTPRequestHandler):
    """What `Receiver.answer` gets."""

    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.receiver.received.append(Received(self.path, headers, body))
        with contextlib.suppress(OSError):  # the sender has closed the connection
            self.server.receiver.answer(self)

    def reply(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    receiver: Receiver


@dataclass
class Receiver:
    """Keeps what it received. `answer` answers each request, with 204 by default. `close` refuses connections."""

    answer: Callable[[Request], object] = field(default=lambda request: request.reply(204))
    received: list[Received] = field(default_factory=list)
    port: int = 0
    _server: _Server | None = None

    def open(self) -> None:
        """Listens on `port`, or on a free one, which becomes `port`."""
        self._server = _Server(("127.0.0.1", self.port), Request)
        self._server.receiver = self
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"


@contextmanager
def receiving(answer: Callable[[Request], object] | None = None) -> Iterator[Receiver]:
    receiver = Receiver() if answer is None else Receiver(answer)
    receiver.open()
    try:
        yield receiver
    finally:
        receiver.close()
