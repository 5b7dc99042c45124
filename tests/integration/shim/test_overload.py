"""One address attacks a running server; clients and workers at other addresses must not notice."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import psutil
import pytest

from storage import layout
from storage.bucket import Bucket
from tests.support.full import full
from tests.support.queues import result
from tests.support.service import Service, eventually

MEGABYTE = 1_000_000
VIDEO = os.urandom(40 * MEGABYTE)
SHA256 = hashlib.sha256(VIDEO).hexdigest()
SLOW_READERS = 300
IDLE = 600


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The server with its bucket, one stored video, and no worker."""
    running = Service(tmp_path_factory.mktemp("service"), HUNYUAN_WORKERS="0", HUNYUAN_PLATFORM_TOKEN="t" * 32)
    try:
        running.start(until_ready=False)
        bucket = Bucket(running.embedded_bucket())
        bucket.put_bytes(VIDEO, layout.video_key("large"), content_type="video/mp4")
        manifest = result("large").model_copy(update={"file_size": len(VIDEO), "sha256": SHA256})
        body = manifest.model_dump_json().encode()
        bucket.put_bytes(body, layout.manifest_key("large"), content_type="application/json")
        yield running
    finally:
        running.http.close()
        assert running.stop() == 0, running.log.read_text()


def memory(service: Service) -> int:
    used: int = psutil.Process(service.process_id).memory_info().rss
    return used


def at(address: str, service: Service, **options: Any) -> httpx.Client:
    """A client whose connections come from `address`."""
    transport = httpx.HTTPTransport(local_address=address)
    return httpx.Client(base_url=service.address, transport=transport, timeout=60, **options)


def download(client: httpx.Client) -> None:
    digest = hashlib.sha256()
    with client.stream("GET", "/videos/large.mp4") as response:
        assert response.status_code == 200, response.read()
        for chunk in response.iter_bytes(MEGABYTE):
            digest.update(chunk)
    assert digest.hexdigest() == SHA256


def report(client: httpx.Client, worker_id: str) -> None:
    headers = {"Authorization": "Bearer " + "t" * 32}
    response = client.post(
        f"/v2/local/worker-report/{worker_id}", json={"state": "loading", "model": "demo"}, headers=headers
    )
    assert response.status_code == 200, response.text


def connect(address: str, service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=10, source_address=(address, 0))


class Attack:
    """Slow readers and idle connections, opened again as soon as the server closes one, until the block ends."""

    def __init__(self, address: str, service: Service) -> None:
        self._address = address
        self._service = service
        self._open: list[tuple[socket.socket, bool]] = []
        self._stopped = threading.Event()

    def fill(self) -> None:
        missing = {True: SLOW_READERS, False: IDLE}
        for _, reads in self._open:
            missing[reads] -= 1
        for is_reader, number in missing.items():
            for _ in range(number):
                try:
                    connection = connect(self._address, self._service)
                    if is_reader:
                        connection.send(b"GET /videos/large.mp4 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                except OSError:
                    continue
                connection.setblocking(False)
                self._open.append((connection, is_reader))

    def drop_closed(self) -> None:
        """A slow reader reads a few bytes now and then."""
        remaining = []
        for connection, is_reader in self._open:
            try:
                ended = connection.recv(4096 if is_reader else 1) == b""
            except BlockingIOError:
                ended = False
            except OSError:
                ended = True
            if ended:
                connection.close()
            else:
                remaining.append((connection, is_reader))
        self._open = remaining

    def run(self) -> None:
        while not self._stopped.wait(1.0):
            self.drop_closed()
            self.fill()

    def __enter__(self) -> None:
        self.fill()
        self._thread = threading.Thread(target=self.run)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()
        for connection, _is_reader in self._open:
            connection.close()


@contextmanager
def peak_growth(service: Service) -> Iterator[list[int]]:
    """A list of the bytes by which the server's memory has grown, until the block ends."""
    before, growth, done = memory(service), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            growth.append(memory(service) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield growth
    finally:
        done.set()
        watcher.join()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", [4, full(90)])
@pytest.mark.parametrize(("attacker", "honest"), [("127.0.0.2", "127.0.0.1"), full("127.0.0.1", "127.0.0.3")])
def test_downloads_and_reports_succeed_while_another_address_attacks(
    service: Service, attacker: str, honest: str, seconds: int
) -> None:
    with at(honest, service) as client:
        download(client)  # the first download allocates memory that is never freed
    downloads = reports = 0
    with peak_growth(service) as growth, Attack(attacker, service):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with at(honest, service) as client:
                download(client)
                downloads += 1
                for worker in range(5):
                    report(client, f"worker-{worker}")
                    reports += 1
    assert downloads > 0
    assert reports > 0
    assert max(growth) < 200 * MEGABYTE


FLOODS = {
    "trailers": b"0\r\n" + b"a:b\r\n" * 400_000,
    "a trailer's name": b"0\r\n" + b"a" * 2_000_000,
    "a chunk extension": b"1;" + b"a" * 2_000_000,
    "extensions": b"1;a=b\r\nx\r\n" * 200_000,
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_20_mb_around_the_chunks_of_bodies_cost_no_memory(service: Service, flood: bytes) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with peak_growth(service) as growth, ExitStack() as stack:
        for _ in range(10):
            connection = stack.enter_context(connect("127.0.0.1", service))
            with suppress(OSError):  # the server closes the connection
                connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + flood)
        eventually("a health check", lambda: service.http.get("/health").status_code == 200)
    assert max(growth) < 30 * MEGABYTE


def test_a_thousand_readiness_checks_at_once_are_one(service: Service) -> None:
    threads = psutil.Process(service.process_id).num_threads()
    with ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(connect("127.0.0.1", service))
            connection.sendall(b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 10)
        assert service.http.get("/ready").status_code == 503
        assert psutil.Process(service.process_id).num_threads() <= threads + 5
