"""The client's retries."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from hunyuan.client import Client, UnreachableError


class ForgetfulServer(BaseHTTPRequestHandler):
    """Accepts a task, but its first answer is lost."""

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
        """Print nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    ForgetfulServer.keys = []
    with ThreadingHTTPServer(("127.0.0.1", 0), ForgetfulServer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_request_whose_answer_was_lost_is_sent_again_under_the_same_key(address: str) -> None:
    with Client(address) as client:
        assert client.generate({"prompt": "A paper boat on a rainy street"}) == "t1"
    assert len(ForgetfulServer.keys) == 2
    assert ForgetfulServer.keys[0] is not None
    assert len(set(ForgetfulServer.keys)) == 1


def test_an_unreachable_server_is_not_retried() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(UnreachableError):
        client.generate({"prompt": "A paper boat on a rainy street"})


class RestartingServer(BaseHTTPRequestHandler):
    """Answers /status with an error twice, as during a restart, and then with the end of the task."""

    statuses: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        self.statuses.append(503 if len(self.statuses) < 2 else 200)
        status = {"task_id": "t1", "status": "completed", "file_size": 5, "added_later": "kept"}
        body = json.dumps(status).encode() if self.statuses[-1] == 200 else b""
        self.send_response(self.statuses[-1])
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_wait_continues_when_the_server_is_back() -> None:
    RestartingServer.statuses = []
    with ThreadingHTTPServer(("127.0.0.1", 0), RestartingServer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            status = client.wait("t1")
        server.shutdown()
        thread.join()
    assert RestartingServer.statuses == [503, 503, 200]
    assert (status.status, status.file_size) == ("completed", 5)
    assert status.model_dump(exclude_unset=True)["added_later"] == "kept"
