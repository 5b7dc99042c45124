"""Loads the image that a video starts from, out of a data URL or from the public internet.

A client must not make the worker read what only the worker can reach. So the host's addresses are resolved once, must
all be public, and are the addresses connected to; redirects are not followed. A server must not occupy the worker. So
time, bytes and pixels are limited, and a compressed response body is not decompressed.
Source: OWASP Server-Side Request Forgery Prevention Cheat Sheet.
"""

import asyncio
import base64
import binascii
import contextlib
import io
import ipaddress
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final

import httpx
from PIL import Image, ImageOps

MAX_BYTES: Final = 20 * 1024 * 1024
MAX_PIXELS: Final = 50_000_000
_FORMATS: Final = ("JPEG", "PNG", "WEBP")
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

#: Returns whether the worker may connect to an address.
Allowed = Callable[[str], bool]


class ImageError(ValueError):
    """The image can't be used. The client reads the message."""


def is_public(address: str) -> bool:
    """Whether the address is on the public internet: not private, loopback, link-local, multicast or reserved."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inside = _ipv4_inside(parsed)
        if inside is None:
            return parsed.is_global and parsed in _GLOBAL_UNICAST
        parsed = inside
    return parsed.is_global and not parsed.is_multicast


def _ipv4_inside(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address inside a mapped, a 6to4 or a NAT64 (RFC 6052) address; None in any other."""
    if address in _NAT64:
        return ipaddress.IPv4Address(address.packed[-4:])
    return address.ipv4_mapped or address.sixtofour


def load_image(source: str, *, allowed: Allowed = is_public, seconds: float = 20.0) -> Image.Image:
    """The image in a data URL, or at an http(s) URL that must answer within `seconds`; upright and as RGB.

    Blocks, and runs its own event loop.

    Raises:
        ImageError: the image can't be fetched, is no JPEG, PNG or WebP, or is larger than 20 MB or 50 megapixels.
    """
    return _decoded(_from_data_url(source) if source.startswith("data:") else _fetched(source, allowed, seconds))


def _from_data_url(source: str) -> bytes:
    head, comma, body = source.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ImageError("a data URL must start with data:image/...;base64,")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ImageError("the image is larger than 20 MB")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as exc:
        raise ImageError("the data URL is not valid base64") from exc


def _fetched(source: str, allowed: Allowed, seconds: float) -> bytes:
    try:
        url = httpx.URL(source)
    except httpx.InvalidURL as exc:
        raise ImageError("the image's URL is malformed") from exc
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise ImageError("the image must be an http or https URL with no user name, or a data URL")
    try:
        return asyncio.run(_first_body(url, _addresses(url, allowed), seconds))
    except httpx.HTTPError as exc:
        raise ImageError(f"the image can't be fetched ({type(exc).__name__})") from exc
    except TimeoutError as exc:
        raise ImageError(f"the image took longer than {seconds:g} s to download") from exc


async def _first_body(url: httpx.URL, addresses: Sequence[str], seconds: float) -> bytes:
    """The body from the first address that accepts a connection.

    Raises:
        TimeoutError: the body was incomplete after `seconds`, even if bytes kept arriving.
    """
    async with asyncio.timeout(seconds):
        for address in addresses[:-1]:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await _body(url, address)
        return await _body(url, addresses[-1])


async def _body(url: httpx.URL, address: str) -> bytes:
    """The body from this address. The host is not resolved again, because the answer could differ."""
    headers = {
        "Host": url.netloc.decode(),
        "Accept": "image/jpeg, image/png, image/webp",
        "Accept-Encoding": "identity",
    }
    body = bytearray()
    async with (
        httpx.AsyncClient(timeout=httpx.Timeout(10, connect=3.05), trust_env=False) as client,
        client.stream(
            "GET", url.copy_with(host=address), headers=headers, extensions={"sni_hostname": url.host}
        ) as response,
    ):
        if response.status_code != 200:
            raise ImageError(f"the image's server answered {response.status_code}")
        async for chunk in response.aiter_raw():  # undecoded: a few bytes can decompress to gigabytes
            body += chunk
            if len(body) > MAX_BYTES:
                raise ImageError("the image is larger than 20 MB")
    return bytes(body)


def _addresses(url: httpx.URL, allowed: Allowed) -> list[str]:
    """Every address of the host, IPv4 first, because some networks have no IPv6."""
    try:
        found = socket.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise ImageError("the image's host name can't be resolved") from exc
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0])))
    if not addresses or not all(allowed(address) for address in addresses):
        raise ImageError("the image's host is not on the public internet")
    return addresses


def _decoded(body: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(body), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError("the image has more than 50 megapixels")
            return ImageOps.exif_transpose(image).convert("RGB")
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as exc:
        raise ImageError("the image is no readable JPEG, PNG or WebP") from exc
