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
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final

import httpx
from PIL import Image, ImageOps

from contract.job import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS

MAX_BYTES: Final = MAX_IMAGE_BYTES
MAX_PIXELS: Final = MAX_IMAGE_PIXELS
_FORMATS: Final = ("JPEG", "PNG", "WEBP")
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
#: Networks that `ipaddress` counts as global and that lead to a provider, a relay or a router instead of a public host.
#: Sources: https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16,
#: https://www.iana.org/assignments/iana-ipv4-special-registry, https://www.iana.org/assignments/iana-ipv6-special-registry.
_SPECIAL: Final = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's platform: DNS, DHCP and the host agent of a virtual machine
        "192.0.0.0/24",  # IETF protocol assignments; 192.0.0.192 is the metadata service of Oracle Cloud
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT relays
        "192.88.99.0/24",  # 6to4 relays, deprecated
        "192.175.48.0/24",  # AS112
        "2001::/23",  # IETF protocol assignments: Teredo, AMT relays, ORCHID
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
#: The middle of an ISATAP address (RFC 5214), which ends with an IPv4 address.
_ISATAP: Final = (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe")

#: What `socket.getaddrinfo` returns for each address; the last field begins with the address.
_AddressInfo = tuple[Any, Any, int, str, tuple[Any, ...]]

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
            return parsed.is_global and parsed in _GLOBAL_UNICAST and not _is_special(parsed)
        parsed = inside
    return parsed.is_global and not parsed.is_multicast and not _is_special(parsed)


def _is_special(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return any(address in network for network in _SPECIAL)  # False for a network of the other version


def _ipv4_inside(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address inside a mapped, a 6to4, an ISATAP or a NAT64 (RFC 6052) address; None in any other."""
    if address in _NAT64 or address.packed[8:12] in _ISATAP:
        return ipaddress.IPv4Address(address.packed[-4:])
    return address.ipv4_mapped or address.sixtofour


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
    if len(body) > MAX_BYTES * 4 // 3 + 4:
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
            if len(body) > MAX_BYTES:
                raise ImageError("the image is larger than 20 MB")
    return bytes(body)


def _addresses(host: str, port: int, allowed: Allowed, seconds: float) -> list[str]:
    """Every address of the host, IPv4 first, because some networks have no IPv6.

    Raises:
        TimeoutError: the resolver did not answer within `seconds`.
    """
    try:
        found = _resolve(host, port).result(seconds)
    except TimeoutError:
        raise
    except (OSError, UnicodeError, OverflowError) as exc:
        raise ImageError("the image's host name can't be resolved") from exc
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0])))
    if not addresses or not all(allowed(address) for address in addresses):
        raise ImageError("the image's host is not on the public internet")
    return addresses


def _resolve(host: str, port: int) -> Future[Sequence[_AddressInfo]]:
    """`getaddrinfo` in a daemon thread: it has no timeout, and nothing waits for one that is late."""
    answer: Future[Sequence[_AddressInfo]] = Future()

    def run() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as exc:  # noqa: BLE001 - raised again in the thread that waits
            answer.set_exception(exc)

    threading.Thread(target=run, name="resolve", daemon=True).start()
    return answer


def decoded(body: bytes) -> Image.Image:
    """The image in a JPEG, PNG or WebP file; upright and as RGB. Raises ImageError."""
    try:
        with Image.open(io.BytesIO(body), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError("the image has more than 50 megapixels")
            return ImageOps.exif_transpose(image).convert("RGB")
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as exc:
        raise ImageError("the image is no readable JPEG, PNG or WebP") from exc
