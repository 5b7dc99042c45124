"""How long a run of the fault suite is, and which kinds of fault it injects."""

from __future__ import annotations

from dataclasses import dataclass

#: The kinds of fault. CONTRIBUTING.md lists them, and a test compares the two.
KINDS = (
    "server killed",
    "server frozen",
    "server stopped",
    "worker killed",
    "worker frozen",
    "worker stopped",
    "worker killed with a result",
    "worker cut off as its upload begins",
    "encoder hung",
    "model step hung",
    "database killed",
    "database frozen",
    "database stopped",
    "bucket killed",
    "bucket frozen",
    "bucket stopped",
    "bucket full",
    "connection broken",
    "client vanished",
    "task cancelled",
    "clock stepped",
    "file emptied by a power cut",
)
#: Kinds that the code does not survive yet. A run leaves them out, or injects the mild form that their driver names.
NOT_YET: frozenset[str] = frozenset()
#: Whether the server deletes objects that no task owns. If not, a run counts them and does not fail.
HAS_RECONCILER = True


@dataclass(frozen=True)
class Form:
    """How many faults a run has. Each driver injects each of its faults once, or repeatedly if `repeats`.

    `longest_fault` is in seconds. The share `long_freezes` of a worker's freezes lasts until its lease expires.
    """

    name: str
    tasks: int
    machines_tasks: int
    clients: int
    longest_fault: float
    long_freezes: float
    repeats: bool


SHORT = Form("short", tasks=20, machines_tasks=8, clients=12, longest_fault=1.5, long_freezes=0.0, repeats=False)
FULL = Form("full", tasks=300, machines_tasks=60, clients=24, longest_fault=5.0, long_freezes=0.25, repeats=True)
