"""Who may use the server, and how often: API keys, the rate limit, and the browsers' origins."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import SecretStr

from contract.settings import HEADER_KEY_RULE, is_header_token

MIN_KEY_LENGTH: Final = 16
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,32}", re.ASCII)
#: How many clients' buckets are kept.
_REMEMBERED: Final = 10_000


@dataclass(frozen=True)
class ApiKey:
    """A key, and the name it goes by in logs and limits."""

    name: str
    secret: SecretStr


def parse_api_keys(text: str) -> tuple[ApiKey, ...]:
    """Keys with commas between, each `key` or `name:key`; one with no name is called after its place, `key-1`.

    Raises:
        ValueError: one can't be used. The message names it and never shows it.
    """
    keys: list[ApiKey] = []
    for place, item in enumerate((part.strip() for part in text.split(",") if part.strip()), start=1):
        given_name, colon, secret = item.rpartition(":")
        name = given_name if colon else f"key-{place}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"the name of key {place} must be 1-32 of A-Z a-z 0-9 _ -")
        if len(secret) < MIN_KEY_LENGTH:
            raise ValueError(f"key {place} must have at least {MIN_KEY_LENGTH} characters")
        if not is_header_token(secret):
            raise ValueError(f"key {place} {HEADER_KEY_RULE}")
        if any(key.name == name or key.secret.get_secret_value() == secret for key in keys):
            raise ValueError(f"key {place} has the name or the value of one before it")
        keys.append(ApiKey(name, SecretStr(secret)))
    return tuple(keys)


class ApiKeys:
    """The keys that open the server. With none, it is open."""

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        self._digests = [(key.name, _digest(key.secret.get_secret_value().encode())) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def name_of(self, given: bytes) -> str | None:
        """The name of the key that was given, None for a wrong one.

        Takes as long for every answer: digests are of one length, and all of them are compared.
        """
        digest, found = _digest(given), None
        for name, known in self._digests:
            if hmac.compare_digest(digest, known):
                found = name
        return found


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


class RateLimit:
    """A token bucket for each client, in this process's memory: several shims count each for itself.

    A bucket holds a minute's worth, `per_minute`, and fills evenly. The 10,000 clients seen last are remembered.
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = float(per_minute)
        self._per_second = per_minute / 60
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> float:
        """Seconds until `client` may ask again; 0 where it may now, which is then counted."""
        now = self._clock()
        tokens, seen = self._buckets.pop(client, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - seen) * self._per_second)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > _REMEMBERED:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) / self._per_second


def client_of_address(address: str) -> str:
    """Who is behind an address: of IPv6 the /64 network, since one host has all of its addresses to choose from."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed.packed[:8] + bytes(8), 64)))


@dataclass(frozen=True)
class Access:
    """What the settings say of access. `rate_limit` in requests a minute for each key, else for each address."""

    api_keys: tuple[ApiKey, ...] = ()
    rate_limit: int | None = None
    cors_origins: tuple[str, ...] = ()


#: Neither keys nor limits.
OPEN_TO_ALL: Final = Access()
