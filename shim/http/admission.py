"""Which connections may be open, and which is closed when a new one finds the server full.

One address cannot use up the server: it may open so many connections, and if all are used, the address with the most
of them gives one up that waits for its client. Workers have a reserve.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

from shim.access import ConnectionLimits, client_of_address
from shim.errors import ApiError, ServerErrorCode

#: In the state of a request's scope: a function to call when the request has sent the platform token.
TRUST_CONNECTION: Final = "trust_connection"
#: There, too: a function that a route calls whose response has no end of its own. Its connection counts as one that
#: waits for its client, so it may be given up. Returns the event that is set when the response has to end, because of
#: that or because the server stops.
STREAM_CONNECTION: Final = "stream_connection"
#: The addresses that sent the platform token most recently.
_MAX_TRUSTED: Final = 1_000
#: Seconds between two log lines about rejected connections.
_LOG_INTERVAL: Final = 60.0

log = logging.getLogger(__name__)


class Guest(Protocol):
    """An open connection. `waiting_since` is the time since which the server waits for the client; None if it
    does not. `in_progress` says whether a request has begun. A `trusted` one has sent the platform token.
    """

    waiting_since: float | None
    trusted: bool

    @property
    def in_progress(self) -> bool: ...

    def give_up(self) -> None:
        """Closes the connection in favour of another."""


class Admission:
    """The open connections of one server. `is_proxy` says whether many clients may be behind an address."""

    def __init__(self, limits: ConnectionLimits, is_proxy: Callable[[str], bool]) -> None:
        self._limits = limits
        self._is_proxy = is_proxy
        self._open: dict[str, set[Guest]] = {}
        self._total = 0
        self._trusted: OrderedDict[str, None] = OrderedDict()
        self._logged = float("-inf")

    def enter(self, guest: Guest, address: str) -> None:
        """Counts the connection, until `leave`.

        Raises:
            ApiError: SERVER_BUSY. The connection is not counted.
        """
        client = client_of_address(address)
        own = self._open.get(client, set())
        has_limit = client not in self._trusted and not self._is_proxy(address)
        if has_limit and len(own) >= self._limits.per_address and not self._make_room([own], own):
            raise self._busy(
                f"{client} has {len(own)} connections open, the limit in HUNYUAN_MAX_CONNECTIONS_PER_ADDRESS"
            )
        if self._total >= self._limits.total and not self._make_room(self._larger_than(own), own):
            reserve = self._limits.reserve if client in self._trusted else 0
            if self._total >= self._limits.total + reserve:
                raise self._busy("too many connections are open")
        self._open.setdefault(client, set()).add(guest)
        self._total += 1

    def leave(self, guest: Guest, address: str) -> None:
        client = client_of_address(address)
        guests = self._open.get(client, set())
        if guest in guests:
            guests.remove(guest)
            self._total -= 1
            if not guests:
                del self._open[client]

    def trust(self, address: str) -> None:
        """The address has sent the platform token."""
        client = client_of_address(address)
        self._trusted[client] = None
        self._trusted.move_to_end(client)
        if len(self._trusted) > _MAX_TRUSTED:
            self._trusted.popitem(last=False)

    def _larger_than(self, own: set[Guest]) -> list[set[Guest]]:
        """The connections of each address that has more than `own`, and `own`; the largest first."""
        others = [guests for guests in self._open.values() if len(guests) > len(own)]
        return [*sorted(others, key=len, reverse=True), own]

    def _make_room(self, groups: list[set[Guest]], own: set[Guest]) -> bool:
        """Gives up the connection of the first group with one that waits: one without a request, else the oldest."""
        now = time.monotonic()
        for guests in groups:
            waiting = [
                (guest.in_progress, guest.waiting_since, guest)
                for guest in guests
                if guest.waiting_since is not None
                and not guest.trusted
                and (now - guest.waiting_since > self._limits.patience or (guests is not own and not guest.in_progress))
            ]
            if waiting:
                min(waiting, key=lambda entry: entry[:2])[2].give_up()
                return True
        return False

    def _busy(self, why: str) -> ApiError:
        now = time.monotonic()
        if now - self._logged > _LOG_INTERVAL:
            self._logged = now
            log.warning("rejecting connections: %s", why)
        return ApiError(ServerErrorCode.SERVER_BUSY, why)
