"""One signed POST to a receiver of webhooks.

Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import httpx

from contract.addresses import AddressError, Allowed, is_public, resolve
from shim.http_client import HttpClient

#: Slightly over a multiple of 3 s, the TCP retransmission timer.
_CONNECT_SECONDS: Final = 3.05


@dataclass(frozen=True)
class WebhookOptions:
    """How webhooks are sent. `key` signs them. `default_url` gets those of tasks that name no URL.

    An attempt takes at most `timeout` seconds. `retries` are the seconds to wait after each failed attempt; when they
    are used up, the webhook is given up.
    """

    key: bytes = field(repr=False)
    default_url: str | None = field(default=None, repr=False)  # it may contain a key
    allow_private: bool = False
    timeout: float = 15.0
    retries: Sequence[float] = ()


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: with an HTTP `status`, or with an `error` if there was no answer.

    `retry_after` is the answer's Retry-After in seconds, 0 without one.
    """

    status: int | None = None
    error: str | None = None
    retry_after: float = 0.0

    @property
    def is_delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    @property
    def is_refused(self) -> bool:
        """Whether the receiver wants no webhooks any more: 410 Gone."""
        return self.status == 410

    @property
    def reason(self) -> str:
        return self.error or f"the receiver answered {self.status}"


def signature(key: bytes, webhook_id: str, timestamp: int, body: bytes) -> str:
    """The header webhook-signature."""
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


class WebhookSender:
    """Sends webhooks.

    A client chooses the URL, so the addresses of its host must be public, unless the operator allows private ones or
    has set the URL: see contract.addresses. Redirects are not followed, and the body of an answer is not read.
    """

    def __init__(self, options: WebhookOptions) -> None:
        self._options = options
        self._http = HttpClient(
            timeout=httpx.Timeout(options.timeout, connect=_CONNECT_SECONDS),
            # No connection is used twice: it belongs to one host name, and httpx knows its address only.
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def send(self, url: str, webhook_id: str, body: bytes) -> Outcome:
        """Makes one attempt. It ends within `timeout` seconds, whatever the receiver does."""
        timestamp = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "hunyuan-video-service",
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(self._options.key, webhook_id, timestamp, body),
        }
        try:
            async with asyncio.timeout(self._options.timeout):
                return await self._first_answer(httpx.URL(url), self._allowed(url), headers, body)
        except TimeoutError:
            return Outcome(error=f"no answer within {self._options.timeout:g} s")
        except AddressError as exc:
            return Outcome(error=f"the receiver's host {exc}")
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            return Outcome(error=f"the connection failed ({type(exc).__name__})")

    def _allowed(self, url: str) -> Allowed:
        trusted = self._options.allow_private or url == self._options.default_url
        return (lambda _: True) if trusted else is_public

    async def _first_answer(self, url: httpx.URL, allowed: Allowed, headers: dict[str, str], body: bytes) -> Outcome:
        """The answer from the first address that accepts a connection. The host is resolved once."""
        host = url.raw_host.decode("ascii")
        port = url.port or (443 if url.scheme == "https" else 80)
        addresses = await asyncio.wrap_future(resolve(host, port, allowed))
        headers = {"Host": url.netloc.decode(), **headers}
        for address in addresses[:-1]:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await self._answer(url.copy_with(host=address), host, headers, body)
        return await self._answer(url.copy_with(host=addresses[-1]), host, headers, body)

    async def _answer(self, url: httpx.URL, host: str, headers: dict[str, str], body: bytes) -> Outcome:
        async with self._http.stream(
            "POST", url, content=body, headers=headers, extensions={"sni_hostname": host}
        ) as response:
            wait = response.headers.get("retry-after", "")
            return Outcome(response.status_code, retry_after=float(wait) if wait.isdecimal() else 0.0)
