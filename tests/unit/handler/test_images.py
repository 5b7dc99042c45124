"""Images from data URLs and from the network, and what a hostile one may not do."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from handler.images import MAX_BYTES, ImageError, is_public, load_image


def encoded(kind: str = "PNG", size: tuple[int, int] = (8, 4)) -> bytes:
    body = io.BytesIO()
    Image.new("RGB", size, (200, 40, 40)).save(body, kind)
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
def test_what_is_no_image_is_refused(source: str) -> None:
    with pytest.raises(ImageError):
        load_image(source)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked() -> None:
    with pytest.raises(ImageError, match="megapixels"):
        load_image(data_url(encoded(size=(10_000, 5_001))))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *("::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "224.0.0.1", "255.255.255.255"),
    ],
)
def test_only_addresses_of_the_open_internet_are_public(address: str) -> None:
    assert not is_public(address)
    assert is_public("93.184.215.14")
    assert is_public("2606:4700::1111")


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
    ],
)
def test_nothing_but_the_open_internet_is_asked(source: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert "password" not in str(caught.value)


class Server(HTTPServer):
    answer: Callable[[BaseHTTPRequestHandler], None]


class Request(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
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


def test_an_endless_body_is_cut_off(server: Server) -> None:
    sent = 0

    def answer(request: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        request.send_response(200)
        request.end_headers()
        try:
            while sent < 4 * MAX_BYTES:
                request.wfile.write(b"x" * 65_536)
                sent += 65_536
        except OSError:
            pass

    server.answer = answer
    with pytest.raises(ImageError, match="20 MB"):
        fetch(server)
    assert sent < 2 * MAX_BYTES


def test_a_server_that_breaks_off_is_an_error_of_the_image(server: Server) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        request.connection.close()

    server.answer = answer
    with pytest.raises(ImageError, match="can't be fetched"):
        fetch(server)
