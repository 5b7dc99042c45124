"""The proxy that the fault tests stand on: each fault is what it says, and ends when it is told to."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.service import eventually

BODY = bytes(range(256)) * 1024


class Echo(BaseHTTPRequestHandler):
    """GET gives BODY, PUT gives back what came."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(BODY)

    def do_PUT(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Broken connections are what these tests make."""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with Server(("127.0.0.1", 0), Echo) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield "127.0.0.1", made.server_port
        made.shutdown()
        thread.join()


@pytest.fixture
def proxy(server: tuple[str, int]) -> Iterator[FaultProxy]:
    with FaultProxy(server) as made:
        yield made


def get(proxy: FaultProxy, timeout: float = 10.0) -> bytes:
    return httpx.get(proxy.url, timeout=timeout).content


def test_without_faults_the_proxy_forwards_both_ways(proxy: FaultProxy) -> None:
    assert get(proxy) == BODY
    with httpx.Client(base_url=proxy.url) as client:
        for _ in range(3):
            assert client.put("/x", content=BODY).content == BODY
    assert not proxy.hits


def test_refuse_closes_open_connections_and_rejects_new_ones(proxy: FaultProxy) -> None:
    with httpx.Client(base_url=proxy.url) as client:
        client.get("/")
        with proxy.broken(refuse=True):
            with pytest.raises(httpx.TransportError):
                client.get("/")
            with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", proxy.port)):
                pass
        assert client.get("/").content == BODY


def test_reset_on_accept_resets_each_connection(proxy: FaultProxy) -> None:
    with (
        proxy.broken(reset_on_accept=True),
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client,
    ):
        client.recv(1)
    assert proxy.hits == {"reset_on_accept": 1}
    assert get(proxy) == BODY


def received(proxy: FaultProxy) -> tuple[int, bool]:
    """How many bytes of a GET's answer come, and whether they end in a reset."""
    size = 0
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        try:
            while piece := client.recv(100_000):
                size += len(piece)
        except ConnectionResetError:
            return size, True
    return size, False


@pytest.mark.parametrize("limit", [0, 1, 100_000])
def test_truncate_after_closes_the_connection_after_so_many_bytes(proxy: FaultProxy, limit: int) -> None:
    with proxy.broken(truncate_after=limit):
        assert received(proxy) == (limit, False)
    assert received(proxy)[0] > len(BODY)


def test_reset_on_the_way_down(proxy: FaultProxy) -> None:
    with proxy.broken(reset_down_after=100_000):
        size, reset = received(proxy)
    assert reset
    assert size <= 100_000, "a reset may overtake what was sent before it"


def test_reset_on_the_way_up(proxy: FaultProxy) -> None:
    with proxy.broken(reset_up_after=100_000):
        assert get(proxy) == BODY, "few bytes go up for a GET"
        with pytest.raises(httpx.TransportError):
            httpx.put(proxy.url, content=BODY)
    assert httpx.put(proxy.url, content=BODY).content == BODY


def test_a_stall_holds_open_connections_until_it_ends(proxy: FaultProxy) -> None:
    with proxy.broken(stall=True):
        with pytest.raises(httpx.ReadTimeout):
            get(proxy, timeout=0.2)
        bodies: list[bytes] = []
        thread = threading.Thread(target=lambda: bodies.append(get(proxy)))
        thread.start()
        eventually("a second stall", lambda: proxy.hits["stall"] == 2, 5)
        assert bodies == []
    thread.join()
    assert bodies == [BODY]


def test_latency_and_bandwidth_take_their_time(proxy: FaultProxy) -> None:
    with proxy.broken(latency=0.2):
        started = time.monotonic()
        httpx.put(proxy.url, content=b"x")
        assert time.monotonic() - started >= 0.4, "up and down"
    with proxy.broken(bandwidth=len(BODY) * 2):
        started = time.monotonic()
        assert get(proxy) == BODY
        assert time.monotonic() - started >= 0.5


def test_random_faults_repeat_with_the_same_seed(server: tuple[str, int]) -> None:
    def sizes(seed: int) -> list[tuple[int, bool]]:
        with FaultProxy(server) as proxy:
            proxy.break_at_random(random.Random(seed), 0.5, [Faults(truncate_after=len(BODY))])
            seen = [received(proxy) for _ in range(12)]
            proxy.heal()
            assert received(proxy)[0] > len(BODY)
            return seen

    first = sizes(7)
    assert first == sizes(7)
    assert first != sizes(8)
    whole = sum(size > len(BODY) for size, _ in first)
    assert 0 < whole < 12


def test_s3_errors_are_answered_for_the_next_requests_that_match(server: tuple[str, int]) -> None:
    with FaultProxy(server, http=True) as proxy, httpx.Client(base_url=proxy.url) as client:
        proxy.answer(503, "SlowDown", times=2, method="PUT", target="/videos/")
        assert client.get("/videos/a.mp4").content == BODY
        assert client.put("/other", content=BODY).content == BODY
        for _ in range(2):
            answer = client.put("/videos/a.mp4", content=BODY)
            assert (answer.status_code, "<Code>SlowDown</Code>" in answer.text) == (503, True)
        assert client.put("/videos/a.mp4", content=BODY).content == BODY
        assert proxy.hits == {"SlowDown": 2}
        assert proxy.requests == ["GET /videos/a.mp4", "PUT /other", *["PUT /videos/a.mp4"] * 3]


async def test_it_serves_async_tests_as_well(proxy: FaultProxy) -> None:
    async with httpx.AsyncClient(base_url=proxy.url) as client:
        assert (await client.get("/")).content == BODY
        with proxy.broken(refuse=True), pytest.raises(httpx.TransportError):
            await client.get("/")
        assert (await client.get("/")).content == BODY
