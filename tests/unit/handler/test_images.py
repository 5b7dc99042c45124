"""Images from data URLs and from the network, hostile ones included."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import random
import socket
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from contract.job import MAX_IMAGE_BYTES
from handler.images import ImageError, load_image


def encoded(kind: str = "PNG") -> bytes:
    body = io.BytesIO()
    Image.new("RGB", (8, 4), (200, 40, 40)).save(body, kind)
    return body.getvalue()


def data_url(body: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(body).decode()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_data_url_is_decoded(kind: str) -> None:
    image = load_image(data_url(encoded(kind), kind.lower()))
    assert (image.size, image.mode) == ((8, 4), "RGB")


def test_a_photograph_is_turned_upright() -> None:
    body, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (8, 4)).save(body, "JPEG", exif=exif)
    assert load_image(data_url(body.getvalue())).size == (4, 8)


@pytest.mark.parametrize(
    "source",
    [
        "data:text/html;base64,aGk=",
        "data:image/png,raw",
        "data:image/png;base64,!!!",
        "data:image/png;base64,",
        data_url(b"not an image at all"),
        data_url(encoded()[:40]),
        data_url(encoded("GIF"), "gif"),
        data_url(b"%!PS-Adobe-3.0 EPSF-3.0"),
    ],
)
def test_a_data_url_without_an_image_is_refused(source: str) -> None:
    with pytest.raises(ImageError):
        load_image(source)


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    body = io.BytesIO()
    Image.new("1", (10_000, 5_001)).save(body, "PNG")
    with pytest.raises(ImageError, match="megapixels"):
        load_image(data_url(body.getvalue()))


@pytest.mark.parametrize(
    "source",
    [
        "http://localhost/x.png",
        "http://127.0.0.1:9/x.png",
        "http://[::1]/x.png",
        "http://2130706433/x.png",
        "http://0x7f.1/x.png",
        "https://user:password@example.com/x.png",
        "ftp://example.com/x.png",
        "file:///etc/passwd",
        "http:///x.png",
        "http://no.such.host.invalid/x.png",
        "https://exa mple.com/",
        "https://xn--/x.png",
        "https://xn--a.com/x.png",
        "https://xn--" + "9" * 200 + ".com/x.png",
        "https://-\u00e9.com/x.png",
        "https://a..b/x.png",
        "https://" + "a" * 70 + ".com/x.png",
        "https://127.0.0.1:99999/x.png",
    ],
)
def test_an_image_is_fetched_from_the_public_internet_only(source: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert "password" not in str(caught.value)


class Server(HTTPServer):
    answer: Callable[[BaseHTTPRequestHandler], None]
    asked_at: str


class Request(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked_at = self.connection.getsockname()[0]
        self.server.answer(self)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Request) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def fetch(server: Server) -> Image.Image:
    return load_image(f"http://localhost:{server.server_port}/x.png", allowed=lambda address: True)


def send(request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


def test_an_image_is_fetched_under_its_own_host_name(server: Server) -> None:
    hosts: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        hosts.append(request.headers["Host"])
        send(request, 200, encoded())

    server.answer = answer
    assert fetch(server).size == (8, 4)
    assert hosts == [f"localhost:{server.server_port}"]


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.answer = lambda request: send(request, 302, Location="http://169.254.169.254/")
    with pytest.raises(ImageError, match="302"):
        fetch(server)


def test_an_endless_body_is_aborted(server: Server) -> None:
    sent = 0

    def answer(request: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        request.send_response(200)
        request.end_headers()
        try:
            while sent < 4 * MAX_IMAGE_BYTES:
                request.wfile.write(b"x" * 65_536)
                sent += 65_536
        except OSError:
            pass

    server.answer = answer
    with pytest.raises(ImageError, match="20 MB"):
        fetch(server)
    assert sent < 2 * MAX_IMAGE_BYTES


def test_a_connection_that_is_reset_is_an_image_error(server: Server) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        request.connection.close()

    server.answer = answer
    with pytest.raises(ImageError, match="can't be fetched"):
        fetch(server)


def test_the_checked_address_is_the_one_connected_to(server: Server) -> None:
    """A host name is resolved once, because its answer could change (DNS rebinding)."""
    server.answer = lambda request: send(request, 200, encoded())
    checked: list[str] = []

    def allowed(address: str) -> bool:
        checked.append(address)
        return True

    assert load_image(f"http://localhost:{server.server_port}/x.png", allowed=allowed).size == (8, 4)
    assert len(checked) == len(set(checked)), "each address is checked once, and the name is not resolved again"
    assert server.asked_at in checked


def test_a_compressed_body_is_not_decompressed(server: Server) -> None:
    bomb = gzip.compress(bytes(200 * 1024 * 1024), 1)
    server.answer = lambda request: send(request, 200, bomb, **{"Content-Encoding": "gzip"})
    tracemalloc.start()
    with pytest.raises(ImageError, match="no readable JPEG"):
        fetch(server)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * 1024 * 1024


@pytest.mark.parametrize("dripped", [b"X-Slow: " + b"a" * 1000, b"\r\n" + b"x" * 1000])
def test_a_server_that_sends_byte_by_byte_times_out(server: Server, dripped: bytes) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(OSError):
            request.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for byte in dripped:
                request.wfile.write(bytes([byte]))
                time.sleep(0.02)

    server.answer = answer
    started = time.monotonic()
    with pytest.raises(ImageError, match=r"longer than 0\.5 s"):
        load_image(f"http://localhost:{server.server_port}/x.png", allowed=lambda address: True, seconds=0.5)
    assert time.monotonic() - started < 5


def test_a_resolver_that_does_not_answer_counts_against_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
        answered.wait(20)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    started = time.monotonic()
    with pytest.raises(ImageError, match=r"longer than 0\.5 s"):
        load_image("http://images.example.com/x.png", allowed=lambda address: True, seconds=0.5)
    assert time.monotonic() - started < 5
    answered.set()


def test_every_broken_image_is_an_image_error() -> None:
    chance = random.Random(7)
    for kind in ("PNG", "JPEG", "WEBP"):
        body = photograph(kind)
        for _ in range(1000):
            broken = bytearray(body)
            reach = min(len(broken), chance.choice([60, 300, len(broken)]))  # the head breaks in more ways
            for _ in range(chance.randrange(1, 12)):
                broken[chance.randrange(reach)] = chance.choice([0, 255, chance.randrange(256)])
            with contextlib.suppress(ImageError), warnings.catch_warnings(action="ignore"):
                load_image(data_url(bytes(broken)))


def photograph(kind: str) -> bytes:
    """An image with the metadata that a camera adds."""
    body, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    texts = PngInfo()
    texts.add_text("comment", "words " * 200, zip=True)
    options = {"pnginfo": texts} if kind == "PNG" else {}
    picture = Image.effect_noise((40, 30), 80).convert("RGB")
    picture.save(body, kind, exif=exif, icc_profile=bytes(200), **options)
    return body.getvalue()


def test_a_text_chunk_that_decompresses_to_megabytes_is_an_image_error() -> None:
    body, texts = io.BytesIO(), PngInfo()
    texts.add_text("bomb", "x" * 50_000_000, zip=True)
    Image.new("RGB", (8, 4)).save(body, "PNG", pnginfo=texts)
    assert len(body.getvalue()) < 100_000
    with pytest.raises(ImageError, match="no readable JPEG"):
        load_image(data_url(body.getvalue()))
