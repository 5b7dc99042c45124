"""A chat model behind OpenAI's API, with answers that a test chooses."""

from __future__ import annotations

import json
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatModel(ThreadingHTTPServer):
    """Gives each of `answers` once, and repeats the last one: a text, or a status with its body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.answers: deque[str | tuple[int, bytes]] = deque()
        self.requests: list[tuple[str, Mapping[str, str], Any]] = []
        self.asked = threading.Event()
        #: No answer is sent while this is not set.
        self.answering = threading.Event()
        self.answering.set()

    def handle_error(self, *_: Any) -> None:
        """Ignores connections that a client closed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(*_)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Request(BaseHTTPRequestHandler):
    server: ChatModel

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append((self.path, dict(self.headers), body))
        server.asked.set()
        server.answering.wait(60)
        answer = server.answers.popleft() if len(server.answers) > 1 else server.answers[0]
        status, content = (200, completion(answer)) if isinstance(answer, str) else answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def completion(text: str | None) -> bytes:
    """The body of an answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


@contextmanager
def chat_model() -> Iterator[ChatModel]:
    with ChatModel() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.answering.set()
            server.shutdown()
            thread.join()
