"""Loads the image that a video starts from, out of a data URL or from the public internet.

A client must not make the worker read what only the worker can reach: see contract.addresses. A server must not occupy
the worker. So time, bytes and pixels are limited, and a compressed response body is not decompressed.
"""

import asyncio
import base64
import binascii
import contextlib
import io
import struct
import time
from collections.abc import Sequence
from typing import Final

import httpx
from PIL import Image, ImageOps

from contract.addresses import AddressError, Allowed, is_public, resolve
from contract.job import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS

_FORMATS: Final = ("JPEG", "PNG", "WEBP")


class ImageError(ValueError):
    """The image can't be used. The client reads the message."""


def load_image(source: str, *, allowed: Allowed = is_public, seconds: float = 20.0) -> Image.Image:
    """The image in a data URL, or at an http(s) URL that must answer within `seconds`; upright and as RGB.

    Blocks, and runs its own event loop.

    Raises:
        ImageError: the image can't be fetched, is no JPEG, PNG or WebP, or is larger than 20 MB or 50 megapixels.
    """
    return decoded(_from_data_url(source) if source.startswith("data:") else _fetched(source, allowed, seconds))


def _from_data_url(source: str) -> bytes:
    head, comma, body = source.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ImageError("a data URL must start with data:image/...;base64,")
    if len(body) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise ImageError("the image is larger than 20 MB")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as exc:
        raise ImageError("the data URL is not valid base64") from exc


def _fetched(source: str, allowed: Allowed, seconds: float) -> bytes:
    url, host = _checked_url(source)
    deadline = time.monotonic() + seconds
    try:
        addresses = _addresses(host, url.port or 443, allowed, seconds)
        return asyncio.run(_first_body(url, host, addresses, deadline - time.monotonic()))
    except httpx.HTTPError as exc:
        raise ImageError(f"the image can't be fetched ({type(exc).__name__})") from exc
    except TimeoutError as exc:
        raise ImageError(f"the image took longer than {seconds:g} s to download") from exc


def _checked_url(source: str) -> tuple[httpx.URL, str]:
    """The URL, and its host in ASCII: an address, or a name in IDNA's form."""
    try:
        url = httpx.URL(source)
        host = url.raw_host.decode("ascii")
        # httpx encodes Unicode names itself, and decodes names in IDNA's form only here.
        decodable = bool(url.host)
    except (httpx.InvalidURL, UnicodeError) as exc:  # idna's errors are UnicodeErrors
        raise ImageError("the image's URL is malformed") from exc
    if url.scheme not in ("http", "https") or not decodable or url.userinfo:
        raise ImageError("the image must be an http or https URL with no user name, or a data URL")
    return url, host


async def _first_body(url: httpx.URL, host: str, addresses: Sequence[str], seconds: float) -> bytes:
    """The body from the first address that accepts a connection.

    Raises:
        TimeoutError: the body was incomplete after `seconds`, even if bytes kept arriving.
    """
    async with asyncio.timeout(seconds):
        for address in addresses[:-1]:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await _body(url, host, address)
        return await _body(url, host, addresses[-1])


async def _body(url: httpx.URL, host: str, address: str) -> bytes:
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
            "GET", url.copy_with(host=address), headers=headers, extensions={"sni_hostname": host}
        ) as response,
    ):
        if response.status_code != 200:
            raise ImageError(f"the image's server answered {response.status_code}")
        async for chunk in response.aiter_raw():  # undecoded: a few bytes can decompress to gigabytes
            body += chunk
            if len(body) > MAX_IMAGE_BYTES:
                raise ImageError("the image is larger than 20 MB")
    return bytes(body)


def _addresses(host: str, port: int, allowed: Allowed, seconds: float) -> Sequence[str]:
    """Every address of the host.

    Raises:
        TimeoutError: the resolver did not answer within `seconds`.
    """
    try:
        return resolve(host, port, allowed).result(seconds)
    except AddressError as exc:
        raise ImageError(f"the image's host {exc}") from exc


def decoded(body: bytes) -> Image.Image:
    """The image in a JPEG, PNG or WebP file; upright and as RGB. Raises ImageError."""
    try:
        with Image.open(io.BytesIO(body), formats=_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ImageError("the image has more than 50 megapixels")
            return ImageOps.exif_transpose(image).convert("RGB")
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as exc:
        raise ImageError("the image is no readable JPEG, PNG or WebP") from exc
