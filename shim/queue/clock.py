"""The clock of leases: seconds since the epoch, moved by no step of the wall clock."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], float]


class SteadyClock:
    """Returns the wall clock's time at its creation plus the `monotonic` time that has passed since.

    Python's monotonic clock stands still while the machine is suspended, and that is right for leases: no worker can
    report in that time, and one on this machine does not work in it either.
    """

    def __init__(self, wall: Clock = time.time, monotonic: Clock = time.monotonic) -> None:
        self._monotonic = monotonic
        self._offset = wall() - monotonic()

    def __call__(self) -> float:
        return self._monotonic() + self._offset

    def set(self, now: float) -> float:
        """Sets the clock to `now`; returns by how many seconds that moved it."""
        moved = now - self()
        self._offset += moved
        return moved


def moment(seconds: float) -> datetime:
    """The time from seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC)
