"""The command's client, where the network fails it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from hunyuan.client import Client, UnreachableError


class ForgetfulServer(BaseHTTPRequestHandler):
    """Takes a task, and loses its first answer on the way."""

    keys: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.keys.append(self.headers["Idempotency-Key"])
        if len(self.keys) == 1:
            self.close_connection = True
            return
        body = json.dumps({"task_id": "t1", "status": "processing", "estimated_time": 1}).encode()
        self.send_response(202)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing to say."""


@pytest.fixture
def address() -> Iterator[str]:
    ForgetfulServer.keys = []
    with ThreadingHTTPServer(("127.0.0.1", 0), ForgetfulServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_lost_answer_is_asked_for_again_under_the_same_key(address: str) -> None:
    with Client(address) as client:
        assert client.generate({"prompt": "A paper boat on a rainy street"}) == "t1"
    assert len(ForgetfulServer.keys) == 2
    assert ForgetfulServer.keys[0] is not None
    assert len(set(ForgetfulServer.keys)) == 1


def test_a_server_that_is_not_there_is_not_asked_again() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(UnreachableError):
        client.generate({"prompt": "A paper boat on a rainy street"})
