"""RunPod's side of the worker protocol, with answers that a test chooses."""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from tests.support.queues import JOB

#: For `StandInPlatform.answers`: record the result and do not answer.
NO_ANSWER: Final = 0


class StandInPlatform(ThreadingHTTPServer):
    """Delivers `jobs`, holds each job-take until there is one, and answers 204 to a worker that reports STOPPING."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.changed = threading.Condition()
        self.jobs: deque[str] = deque()
        #: Number of job-takes that wait for a job.
        self.held = 0
        #: Delivered to the waiting job-take a second after a worker has reported STOPPING.
        self.last_minute_job: str | None = None
        #: Statuses for the next results; 200 after the last.
        self.answers: deque[int] = deque()
        #: Every delivery of a result, repeated ones included.
        self.results: list[tuple[str, Any]] = []
        self.reports: list[str] = []
        self.pings = 0
        self.closing = False

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.server_port

    def submit(self) -> str:
        """Queues a new job and returns its id."""
        task_id = str(uuid.uuid4())
        with self.changed:
            self.jobs.append(task_id)
            self.changed.notify_all()
        return task_id

    def delivered(self) -> list[str]:
        """The job of each delivery, in order."""
        return [task_id for task_id, _ in self.results]

    def handle_error(self, *_: Any) -> None:
        """Ignore connections that a worker closed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(*_)


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandInPlatform

    def do_GET(self) -> None:
        match self.path.partition("?")[0].split("/")[3:]:
            case ["job-take", _]:
                task_id = self._next_job()
                self._answer(204 if task_id is None else 200, task_id and {"id": task_id, "input": JOB.wire()})
            case ["job-stop", _]:
                with self.server.changed:
                    self.server.changed.wait_for(self._is_over)
                self._answer(204)
            case _:
                self.server.pings += 1
                self._answer(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        match self.path.partition("?")[0].split("/")[3:]:
            case ["job-done", _, task_id] if body.get("status") != "IN_PROGRESS":
                self._take_result(task_id, body)
            case ["worker-report", _]:
                with self.server.changed:
                    self.server.reports.append(body["state"])
                    self.server.changed.notify_all()
                self._answer(200, {})
            case _:
                self._answer(200, {})

    def _next_job(self) -> str | None:
        server = self.server
        with server.changed:
            server.held += 1
            server.changed.wait_for(lambda: server.jobs or self._is_over())
            server.held -= 1
            if server.jobs:
                return server.jobs.popleft()
            task_id, server.last_minute_job = server.last_minute_job, None
        if task_id is not None:
            time.sleep(1)  # the SDK's loop that runs jobs ends within a tenth of a second
        return task_id

    def _is_over(self) -> bool:
        return self.server.closing or "stopping" in self.server.reports

    def _take_result(self, task_id: str, body: Any) -> None:
        with self.server.changed:
            self.server.results.append((task_id, body))
            status = self.server.answers.popleft() if self.server.answers else 200
        if status == NO_ANSWER:
            with self.server.changed:
                self.server.changed.wait_for(lambda: self.server.closing)
        self._answer(status or 200, {})

    def _answer(self, status: int, body: Any = None) -> None:
        content = b"" if status == 204 else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def stand_in_platform() -> Iterator[StandInPlatform]:
    with StandInPlatform() as platform:
        thread = threading.Thread(target=platform.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield platform
        finally:
            with platform.changed:
                platform.closing = True
                platform.changed.notify_all()
            platform.shutdown()
            thread.join()
