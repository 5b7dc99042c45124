"""The image that a video starts from: decoded from a data URL, or fetched from the open internet and nowhere else.

Whoever sends a job must not be able to make the worker read what only the worker can reach: the host's address is
looked up once, must be public, and is the one that is connected to; redirects are not followed.
Source: OWASP Server-Side Request Forgery Prevention Cheat Sheet.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import ipaddress
import socket
import time
from collections.abc import Callable
from typing import Final

import httpx
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_BYTES: Final = 20 * 1024 * 1024
MAX_PIXELS: Final = 50_000_000
_FORMATS: Final = ("JPEG", "PNG", "WEBP")
_SECONDS: Final = 20.0

#: Whether an address may be connected to.
Allowed = Callable[[str], bool]


class ImageError(ValueError):
    """The image can't be used; the message says why, to the client."""


def is_public(address: str) -> bool:
    """Whether the address is one of the open internet's: not private, loopback, link-local, multicast or reserved."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_global and not (mapped or parsed).is_multicast


def load_image(source: str, *, allowed: Allowed = is_public) -> Image.Image:
    """The image at an http(s) URL, or in a `data:image/...;base64,` URL, upright and as RGB.

    Raises:
        ImageError: it can't be had, is no JPEG, PNG or WebP, or is larger than 20 MB or 50 megapixels.
    """
    return _decoded(_from_data_url(source) if source.startswith("data:") else _fetched(source, allowed))


def _from_data_url(source: str) -> bytes:
    head, comma, body = source.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ImageError("a data URL must read data:image/...;base64,...")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ImageError("the image is larger than 20 MB")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as exc:
        raise ImageError("the data URL is not valid base64") from exc


def _fetched(source: str, allowed: Allowed) -> bytes:
    try:
        url = httpx.URL(source)
    except httpx.InvalidURL as exc:
        raise ImageError("the image's URL is malformed") from exc
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise ImageError("the image must be an http or https URL with no user name, or a data URL")
    addresses = _addresses(url, allowed)
    try:
        for address in addresses[:-1]:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return _body(url, address)
        return _body(url, addresses[-1])
    except httpx.HTTPError as exc:
        raise ImageError(f"the image can't be fetched ({type(exc).__name__})") from exc


def _body(url: httpx.URL, address: str) -> bytes:
    """What that address answers, and no other: a second look-up could be answered differently."""
    headers = {"Host": url.netloc.decode(), "Accept": "image/jpeg, image/png, image/webp"}
    body = bytearray()
    deadline = time.monotonic() + _SECONDS
    with (
        httpx.Client(timeout=httpx.Timeout(10, connect=3.05), trust_env=False) as client,
        client.stream(
            "GET", url.copy_with(host=address), headers=headers, extensions={"sni_hostname": url.host}
        ) as response,
    ):
        if response.status_code != 200:
            raise ImageError(f"the image's server answered {response.status_code}")
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_BYTES:
                raise ImageError("the image is larger than 20 MB")
            if time.monotonic() > deadline:
                raise ImageError("the image took longer than 20 s to arrive")
    return bytes(body)


def _addresses(url: httpx.URL, allowed: Allowed) -> list[str]:
    """Every address of the host, IPv4 first: not each network carries the other."""
    try:
        found = socket.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise ImageError("the image's host can't be found") from exc
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0])))
    if not addresses or not all(allowed(address) for address in addresses):
        raise ImageError("the image's host is not on the open internet")
    return addresses


def _decoded(body: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(body), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError("the image has more than 50 megapixels")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as exc:
        raise ImageError("the image is no JPEG, PNG or WebP that can be read") from exc
