"""Who may use the server, and how much: API keys, limits, CORS origins and host names."""

import hashlib
import hmac
import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import SecretStr

from contract.settings import HEADER_KEY_RULE, is_header_token

MIN_KEY_LENGTH: Final = 16
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,32}", re.ASCII)
#: The number of clients whose token buckets are in memory.
_MAX_CLIENTS: Final = 10_000


@dataclass(frozen=True)
class ApiKey:
    """A key, and its name in logs and limits."""

    name: str
    secret: SecretStr


def parse_api_keys(text: str) -> tuple[ApiKey, ...]:
    """Comma-separated keys, each `key` or `name:key`. A key without a name is named by its place: `key-1`.

    Raises:
        ValueError: a key is invalid. The message contains its place and never its value.
    """
    keys: list[ApiKey] = []
    for place, item in enumerate((part.strip() for part in text.split(",") if part.strip()), start=1):
        own_name, colon, secret = item.rpartition(":")
        name = own_name if colon else f"key-{place}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"the name of key {place} must be 1-32 of A-Z a-z 0-9 _ -")
        if len(secret) < MIN_KEY_LENGTH:
            raise ValueError(f"key {place} must have at least {MIN_KEY_LENGTH} characters")
        if not is_header_token(secret):
            raise ValueError(f"key {place} {HEADER_KEY_RULE}")
        if any(key.name == name or key.secret.get_secret_value() == secret for key in keys):
            raise ValueError(f"key {place} has the name or the value of an earlier key")
        keys.append(ApiKey(name, SecretStr(secret)))
    return tuple(keys)


class ApiKeys:
    """The valid API keys."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._digests = [(key.name, _digest(key.secret.get_secret_value().encode())) for key in keys]

    def name_of(self, key: bytes) -> str | None:
        """The name of a key; None for an invalid one.

        Takes the same time in every case: it compares all digests, and they have one length.
        """
        digest, found = _digest(key), None
        for name, known in self._digests:
            if hmac.compare_digest(digest, known):
                found = name
        return found


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


class RateLimit:
    """A token bucket for each client, in this process's memory: each of several servers counts for itself.

    A token bucket holds `per_minute` tokens and fills evenly. The 10,000 most recent clients are kept.
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = float(per_minute)
        self._per_second = per_minute / 60
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> float:
        """Take a token and return 0; without a token, the seconds until `client` has one."""
        now = self._clock()
        tokens, seen = self._buckets.pop(client, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - seen) * self._per_second)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) / self._per_second


def client_of_address(address: str) -> str:
    """The client behind an address. For IPv6 it is the /64 network: one host can use all of its addresses."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed.packed[:8] + bytes(8), 64)))


def host_name(host: str) -> str:
    """The name or address in a Host header, in lower case, without its port."""
    name = host.strip().lower()
    if name.startswith("["):
        address, _, port = name[1:].partition("]")
        return address if re.fullmatch(r"(:\d*)?", port) else name
    return name.rpartition(":")[0] if re.search(r":\d*$", name) else name


def is_allowed_host(host: str, allowed: Collection[str]) -> bool:
    """Whether a Host header is an address, a name of this machine, or in `allowed`. `*` allows every name."""
    name = host_name(host).removesuffix(".")
    if "*" in allowed or name in allowed or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return not name  # an HTTP/1.0 client may send none; a browser always does
    return True


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections may be open. `total` and `reserve` stay under the usual limit of 1,024 open files, which
    the bucket's connections need too.
    """

    total: int = 600
    #: Further connections for addresses that have sent the platform token.
    reserve: int = 100
    #: Of one address; of one /64 network for IPv6. Proxies and workers may have more.
    per_address: int = 128
    #: Seconds for which a connection must have waited for its client before it is given up for one of the same address,
    #: or while a request is in progress.
    patience: float = 1.0


@dataclass(frozen=True)
class Access:
    """The access settings. `rate_limit` is in requests per minute for each key, or for each address without keys.

    `allowed_hosts` are the names that a Host header may have; None for any.
    """

    api_keys: tuple[ApiKey, ...] = ()
    rate_limit: int | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: frozenset[str] | None = None


#: No keys and no limits.
OPEN_TO_ALL: Final = Access()
#: The usual limits.
CONNECTION_LIMITS: Final = ConnectionLimits()
