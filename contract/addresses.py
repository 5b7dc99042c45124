"""Which addresses a URL of a client may lead to, and the addresses of a host.

A client must not make server or worker reach what only they can reach. So they resolve the host of such a URL once,
check every address with `is_public`, connect to exactly these addresses, and follow no redirect.
Source: OWASP Server-Side Request Forgery Prevention Cheat Sheet.
"""

import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final

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

#: Returns whether a connection to an address is allowed.
Allowed = Callable[[str], bool]


class AddressError(Exception):
    """The host has no address, or one that is not allowed. The message follows the host's name in a sentence."""


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


def resolve(host: str, port: int, allowed: Allowed) -> Future[Sequence[str]]:
    """Every address of the host, IPv4 first, because some networks have no IPv6.

    The future gets an AddressError if the host can't be resolved or if one of its addresses is not `allowed`. It is
    filled by a daemon thread, because `getaddrinfo` has no timeout: nothing waits for an answer that is late.
    """
    answer: Future[Sequence[str]] = Future()

    def run() -> None:
        if not answer.set_running_or_notify_cancel():  # from here on, nobody can cancel it
            return
        try:
            answer.set_result(_checked_addresses(host, port, allowed))
        except Exception as exc:  # noqa: BLE001 - raised again in the thread that waits
            answer.set_exception(exc)

    threading.Thread(target=run, name="resolve", daemon=True).start()
    return answer


def _checked_addresses(host: str, port: int, allowed: Allowed) -> Sequence[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError) as exc:
        raise AddressError("can't be resolved") from exc
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0])))
    if not addresses or not all(allowed(address) for address in addresses):
        raise AddressError("is not on the public internet")
    return addresses
