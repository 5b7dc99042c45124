"""A server whose answers a test scripts: what a client does with servers that ours is not, or not at will."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Request:
    """A request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass
class Answer:
    """What is sent: `body` as JSON unless it is bytes. `length` promises another size of it."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None


#: The connection is closed without an answer.
LOST = Answer(0)


def refusal(status: int, code: str, error: str = "no", **headers: str) -> Answer:
    """An error of the API."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"error": error, "error_code": code}, named)


def events(*statuses: Mapping[str, Any], comment: str = ": hello\n\n") -> Answer:
    """A stream of a task's events that ends after the last one."""
    texts = [f"id: {n}\nevent: status\ndata: {json.dumps(status)}\n\n" for n, status in enumerate(statuses, 1)]
    return Answer(body=(comment + "".join(texts)).encode(), headers={"Content-Type": "text/event-stream"})


class ScriptedApi:
    """Answers each request by `answer`, and remembers it."""

    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.address = ""

    def paths(self, method: str = "GET") -> list[str]:
        return [request.path for request in self.requests if request.method == method]


@contextmanager
def scripted_api(answer: Callable[[Request], Answer]) -> Iterator[ScriptedApi]:
    api = ScriptedApi(answer)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            is_file = self.headers.get("Content-Type", "").startswith("image/")
            read = body if is_file else json.loads(body) if body else None
            request = Request(self.command, self.path, dict(self.headers), read)
            api.requests.append(request)
            answer = api.answer(request)
            self.close_connection = True
            if answer.status == 0:
                return
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            self.send_header("Content-Length", str(answer.length if answer.length is not None else len(content)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_DELETE(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            api.address = f"http://127.0.0.1:{server.server_port}"
            yield api
        finally:
            server.shutdown()
            thread.join()
