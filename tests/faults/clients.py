"""Clients as they should be: they send what got no answer again, with the same key, and believe what they were told."""

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

#: A failed task may say these.
TRUE_REASONS = {ErrorCode.GENERATION_FAILED, ErrorCode.STORAGE_UNAVAILABLE}
#: Retry-After is for clients with less to do in a day.
_LONGEST_WAIT = 1.0


class Book:
    """What clients were told, and what was wrong with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.accepted: dict[int, str] = {}
        self.ended: dict[str, dict[str, Any]] = {}
        self.downloaded: dict[str, str] = {}
        self.troubles: Counter[str] = Counter()
        self.violations: list[str] = []

    def accept(self, number: int, task_id: str) -> None:
        with self._lock:
            before = self.accepted.setdefault(number, task_id)
        if before != task_id:
            self.wrong(f"request {number} was task {before}, and is {task_id}")

    def end(self, status: dict[str, Any]) -> None:
        """Note how a task ended. It may be told again and again, but never otherwise."""
        told = {name: value for name, value in status.items() if name != "video_url"}  # it names the shim
        with self._lock:
            before = self.ended.setdefault(status["task_id"], told)
        if before != told:
            self.wrong(f"{status['task_id']} had ended as {before}, and is {told}")

    def download(self, task_id: str, sha256: str) -> None:
        with self._lock:
            self.downloaded[task_id] = sha256

    def trouble(self, what: str) -> None:
        with self._lock:
            self.troubles[what] += 1

    def wrong(self, what: str) -> None:
        with self._lock:
            self.violations.append(what)


class GivenUpError(Exception):
    """The clients were told to go."""


class Client(threading.Thread):
    """Has videos made, one after another, from a common list of numbers, and asks either shim at random."""

    def __init__(self, name: str, book: Book, numbers: queue.Queue[int], addresses: Sequence[str], seed: str) -> None:
        super().__init__(name=name)
        self._book = book
        self._numbers = numbers
        self._chance = random.Random(f"{seed} {name}")
        self._http = [httpx.Client(base_url=address, timeout=10) for address in addresses]
        self.given_up = threading.Event()

    def run(self) -> None:
        try:
            while True:
                self._make(self._numbers.get_nowait())
        except (queue.Empty, GivenUpError):
            return
        except Exception as exc:  # for the test to see
            self._book.wrong(f"{self.name}: {exc!r}")
            raise
        finally:
            for http in self._http:
                http.close()

    def _make(self, number: int) -> None:
        body = {"prompt": f"A paper boat, number {number}, on a rainy street", "duration": 5, "resolution": "720p"}
        accepted = self._request("POST", "/generate", 202, json=body, headers={"Idempotency-Key": f"video {number}"})
        task_id: str = accepted.json()["task_id"]
        self._book.accept(number, task_id)
        status = self._wait(task_id)
        self._book.end(status)
        if status["status"] == "completed":
            video = self._request("GET", f"/videos/{task_id}.mp4", 200)
            sha256 = hashlib.sha256(video.content).hexdigest()
            if video.headers["ETag"] != f'"{sha256}"' or len(video.content) != status["file_size"]:
                self._book.wrong(f"{task_id}: {len(video.content)} bytes with sha256 {sha256} came as {video.headers}")
            self._book.download(task_id, sha256)
        elif status["error_code"] not in TRUE_REASONS:
            self._book.wrong(f"{task_id} ended as {status}")

    def _wait(self, task_id: str) -> dict[str, Any]:
        progress = 0
        while True:
            status: dict[str, Any] = self._request("GET", f"/status/{task_id}", 200).json()
            if status["status"] != "processing":
                return status
            if status["progress"] < progress:
                self._book.wrong(f"{task_id}: progress fell from {progress} to {status['progress']}")
            progress = status["progress"]
            self._pause(0.3)

    def _request(self, method: str, path: str, expected: int, **request: Any) -> httpx.Response:
        """The expected answer, from either shim, however often it takes."""
        while True:
            try:
                response = self._chance.choice(self._http).request(method, path, **request)
            except httpx.TransportError as exc:
                self._book.trouble(type(exc).__name__)
                self._pause(0.2)
                continue
            if response.status_code == expected:
                return response
            if response.status_code != 503:
                self._book.wrong(f"{method} {path}: {response.status_code} {response.text}")
                raise GivenUpError
            self._book.trouble(response.json()["error_code"])
            self._pause(min(float(response.headers["Retry-After"]), _LONGEST_WAIT))

    def _pause(self, seconds: float) -> None:
        if self.given_up.wait(self._chance.uniform(0.5, 1.0) * seconds):
            raise GivenUpError


class Clients:
    """So many at once, for so many videos."""

    def __init__(self, count: int, numbers: range, addresses: Sequence[str], seed: str) -> None:
        self.book = Book()
        todo: queue.Queue[int] = queue.Queue()
        for number in numbers:
            todo.put(number)
        self._total = len(numbers)
        self._threads = [Client(f"client {index}", self.book, todo, addresses, seed) for index in range(count)]
        for thread in self._threads:
            thread.start()

    def left(self) -> int:
        """How many tasks have not ended yet, as far as clients know; 0 once the clients have gone."""
        return self._total - len(self.book.ended) if any(thread.is_alive() for thread in self._threads) else 0

    def settle(self, seconds: float) -> None:
        """Let them finish; those that have not after `seconds` are told to go."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        for thread in self._threads:
            if thread.is_alive():
                self.book.wrong(f"{thread.name} was still waiting when all had to be settled")
            thread.given_up.set()
            thread.join(30)
