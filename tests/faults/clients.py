"""Clients that retry with the same idempotency key and note every answer. Some cancel tasks, or vanish."""

from __future__ import annotations

import hashlib
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx

from contract.errors import ErrorCode

#: Error codes with which a task may fail while parts are killed and connections break.
ALLOWED_ERRORS = {ErrorCode.GENERATION_FAILED, ErrorCode.STORAGE_UNAVAILABLE}
#: The share of tasks that their client cancels, and of requests that it abandons before it reads the answer.
_CANCELS, _VANISHES = 0.12, 0.08
#: A client cancels at a random moment within so many seconds after the task was accepted.
_CANCEL_WITHIN = 6.0
#: The longest wait for a Retry-After, to keep the test short.
_LONGEST_WAIT = 1.0


class Record:
    """What the server answered to all clients, and which answers were wrong."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.accepted: dict[int, str] = {}
        self.ended: dict[str, dict[str, Any]] = {}
        self.downloaded: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.faults: Counter[str] = Counter()
        self.troubles: Counter[str] = Counter()
        self.violations: list[str] = []

    def accept(self, number: int, task_id: str) -> None:
        with self._lock:
            before = self.accepted.setdefault(number, task_id)
        if before != task_id:
            self.wrong(f"request {number} was task {before}, and is now task {task_id}")

    def end(self, status: dict[str, Any]) -> None:
        """Notes the final status of a task. Every later answer must be the same."""
        answer = {
            name: value for name, value in status.items() if name not in ("video_url", "poster_url")
        }  # it contains the server's address
        with self._lock:
            before = self.ended.setdefault(status["task_id"], answer)
        if before != answer:
            self.wrong(f"{status['task_id']} had ended as {before}, and is now {answer}")

    def download(self, task_id: str, sha256: str) -> None:
        with self._lock:
            self.downloaded[task_id] = sha256

    def cancel(self, task_id: str) -> None:
        """Notes that a client will cancel this task."""
        with self._lock:
            self.cancelled.add(task_id)
            self.faults["task cancelled"] += 1

    def vanish(self) -> None:
        with self._lock:
            self.faults["client vanished"] += 1

    def trouble(self, what: str) -> None:
        with self._lock:
            self.troubles[what] += 1

    def wrong(self, what: str) -> None:
        with self._lock:
            self.violations.append(what)


class StoppedError(Exception):
    """The test stopped the clients."""


class Client(threading.Thread):
    """Requests videos one after another, numbered from a common queue. Sends each request to a random server.

    If it `cancels`, it also cancels some tasks, and abandons some requests.
    """

    def __init__(
        self,
        name: str,
        record: Record,
        numbers: queue.Queue[int],
        addresses: Sequence[str],
        seed: str,
        *,
        cancels: bool,
    ) -> None:
        super().__init__(name=name)
        self._cancels = cancels
        self._record = record
        self._numbers = numbers
        self._chance = random.Random(f"{seed} {name}")
        self._http = [httpx.Client(base_url=address, timeout=10) for address in addresses]
        self.stopped = threading.Event()

    def run(self) -> None:
        try:
            while True:
                self._make(self._numbers.get_nowait())
        except (queue.Empty, StoppedError):
            return
        except Exception as exc:  # the test reports it
            self._record.wrong(f"{self.name}: {exc!r}")
            raise
        finally:
            for http in self._http:
                http.close()

    def _make(self, number: int) -> None:
        body = {"prompt": f"A paper boat, number {number}, on a rainy street", "duration": 5, "resolution": "720p"}
        headers = {"Idempotency-Key": f"video {number}"}
        self._maybe_vanish("POST", "/generate", json=body, headers=headers)
        accepted = self._request("POST", "/generate", 202, json=body, headers=headers)
        task_id: str = accepted.json()["task_id"]
        self._record.accept(number, task_id)
        status = self._wait(task_id)
        self._record.end(status)
        if status["status"] == "completed":
            self._download(task_id, status["file_size"])
        elif not (
            status["error_code"] in ALLOWED_ERRORS
            or (status["error_code"] == ErrorCode.CANCELLED and task_id in self._record.cancelled)
        ):
            self._record.wrong(f"{task_id} ended as {status}")

    def _download(self, task_id: str, file_size: int) -> None:
        path = f"/videos/{task_id}.mp4"
        self._maybe_vanish("GET", path)
        video = self._request("GET", path, 200)
        sha256 = hashlib.sha256(video.content).hexdigest()
        if video.headers["ETag"] != f'"{sha256}"' or len(video.content) != file_size:
            self._record.wrong(f"{task_id}: {len(video.content)} bytes with sha256 {sha256} came as {video.headers}")
        self._record.download(task_id, sha256)

    def _maybe_vanish(self, method: str, path: str, **request: Any) -> None:
        """Now and then sends the request and closes the connection before the answer, or after a part of it."""
        if not self._cancels or self._chance.random() >= _VANISHES:
            return
        self._record.vanish()
        try:
            with self._chance.choice(self._http).stream(method, path, **request, timeout=0.5) as response:
                next(response.iter_raw(1), None)
        except httpx.TransportError:
            return

    def _wait(self, task_id: str) -> dict[str, Any]:
        progress = 0
        cancel_at = float("inf")
        if self._cancels and self._chance.random() < _CANCELS:
            cancel_at = time.monotonic() + self._chance.uniform(0, _CANCEL_WITHIN)
        while True:
            if time.monotonic() > cancel_at:
                cancel_at = float("inf")
                self._record.cancel(task_id)
                self._request("DELETE", f"/tasks/{task_id}", 200)
            status: dict[str, Any] = self._request("GET", f"/status/{task_id}", 200).json()
            if status["status"] != "processing":
                return status
            if status["progress"] < progress:
                self._record.wrong(f"{task_id}: progress fell from {progress} to {status['progress']}")
            progress = status["progress"]
            self._pause(0.3)

    def _request(self, method: str, path: str, expected: int, **request: Any) -> httpx.Response:
        """The response with the expected status. Retries with either server until it comes."""
        while True:
            try:
                response = self._chance.choice(self._http).request(method, path, **request)
            except httpx.TransportError as exc:
                self._record.trouble(type(exc).__name__)
                self._pause(0.2)
                continue
            if response.status_code == expected:
                return response
            if response.status_code != 503:
                self._record.wrong(f"{method} {path}: {response.status_code} {response.text}")
                raise StoppedError
            self._record.trouble(response.json()["error_code"])
            self._pause(min(float(response.headers["Retry-After"]), _LONGEST_WAIT))

    def _pause(self, seconds: float) -> None:
        if self.stopped.wait(self._chance.uniform(0.5, 1.0) * seconds):
            raise StoppedError


class Clients:
    """Runs `count` clients at once until they have requested every number. `cancels` as in Client."""

    def __init__(self, count: int, numbers: range, addresses: Sequence[str], seed: str, *, cancels: bool) -> None:
        self.record = Record()
        todo: queue.Queue[int] = queue.Queue()
        for number in numbers:
            todo.put(number)
        self._total = len(numbers)
        self._threads = [
            Client(f"client {index}", self.record, todo, addresses, seed, cancels=cancels) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def left(self) -> int:
        """How many tasks have not ended yet, as far as the clients know. 0 after all clients have stopped."""
        return self._total - len(self.record.ended) if any(thread.is_alive() for thread in self._threads) else 0

    def finish(self, seconds: float) -> None:
        """Waits for the clients. Those still running after `seconds` are stopped and count as wrong."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        for thread in self._threads:
            if thread.is_alive():
                self.record.wrong(f"{thread.name} was still waiting at the end of the test")
            thread.stopped.set()
            thread.join(30)
