"""Processes are killed and connections break at any moment: every accepted task ends once, with a true status.

`make test-full` runs a short form with a fixed seed, `make test-faults` the full one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.faults.checks import ended, orphans, violations
from tests.faults.clients import Clients, Record
from tests.faults.drivers import Driver, Network, Signals
from tests.faults.forms import FULL, KINDS, NOT_YET, SHORT, Form
from tests.faults.late_workers import Clocks, HungRenders, Partitions
from tests.faults.system import System, running_system
from tests.support.service import eventually

#: Seconds within which all tasks end after the last fault.
END_SECONDS = 180.0
#: The longest time that faults are injected, in seconds.
MAX_FAULT_SECONDS = 1500.0

pytestmark = [pytest.mark.timeout(2400), pytest.mark.full]


@pytest.fixture(scope="module")
def form(request: pytest.FixtureRequest) -> Form:
    return {form.name: form for form in (SHORT, FULL)}[request.config.getoption("--faults")]


@pytest.fixture(scope="module")
def seed(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--fault-seed"))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("system"), step_seconds=0.25) as running:
        yield running


Report = Callable[[str], None]


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Report:
    """Prints a text at the end of the run, whether or not the test passes."""
    return lambda text: record_property("faults", text)


def test_each_server_is_killed_once_and_every_task_is_completed(
    system: System, form: Form, seed: str, report: Report
) -> None:
    """Two servers, four workers, one PostgreSQL, one bucket. Clients send requests to either server."""
    clients = Clients(form.clients, range(form.machines_tasks), system.addresses, seed, cancels=False)
    before = ended(system)
    for share, shim in enumerate(system.shims, start=1):
        some = share * form.machines_tasks // 4
        eventually(f"the end of {some} tasks", lambda some=some: len(clients.record.ended) >= some, END_SECONDS)  # type: ignore[misc]
        shim.kill()
        shim.start()
        eventually(f"{shim.name} up", shim.is_up, 120)
    clients.finish(END_SECONDS)
    report(table(f"{len(system.shims)} servers killed once", seed, clients.record, system, Counter()))
    check(system, clients.record, form.machines_tasks, before, seed)
    assert {status["status"] for status in clients.record.ended.values()} == {"completed"}


def test_every_task_ends_once_as_completed_or_with_a_true_error_whatever_breaks(
    system: System, form: Form, seed: str, report: Report
) -> None:
    before = ended(system)
    numbers = range(form.machines_tasks, form.machines_tasks + form.tasks)
    clients = Clients(form.clients, numbers, system.addresses, seed, cancels=True)
    kinds_of_driver = (Signals, HungRenders, Partitions, Network, Clocks)
    drivers: list[Driver] = [kind(kind.__name__, system, form, seed) for kind in kinds_of_driver]
    started = time.monotonic()
    for driver in drivers:
        driver.start()
    while (
        any(driver.is_alive() for driver in drivers[:3])
        and clients.left() > form.tasks // 50
        and time.monotonic() - started < MAX_FAULT_SECONDS
    ):
        drivers[0].join(0.2)
        time.sleep(0.1)
    for driver in drivers:
        driver.stop()
    drivers[0].restart_ended()
    for link in system.links.values():
        link.heal()  # several drivers may have broken the same link
    broken = time.monotonic() - started
    clients.finish(END_SECONDS)
    codes = system.stop_workers()  # a late worker writes what it still wants to write before the checks
    clients.record.violations += [
        f"{name} ended with code {code} after SIGTERM" for name, code in codes.items() if code
    ]
    counts = sum((driver.counts for driver in drivers), clients.record.faults)
    kinds = [kind for kind in KINDS if counts[kind]]
    clients.record.violations += [violation for driver in drivers for violation in driver.violations]
    for name, link in system.links.items():
        counts.update({f"hit by {fault}: {name}": hits for fault, hits in link.hits.items()})
    title = f"{len(kinds)} kinds of fault for {broken:.0f} s"
    report(table(title, seed, clients.record, system, counts))
    check(system, clients.record, form.tasks, before, seed)
    if form.repeats:
        assert set(kinds) >= set(KINDS) - NOT_YET


def check(system: System, record: Record, tasks: int, before: int, seed: str) -> None:
    found = violations(system, record, tasks, before)
    where = f"--fault-seed {seed}, logs in {system.directory}"
    assert not found, "\n".join([*found, where, system.log_tails()])


def table(title: str, seed: str, record: Record, system: System, faults: Counter[str]) -> str:
    """The numbers of a run."""
    renders = [note for note in system.notes() if note.event == "rendering" and note.task_id in record.ended]
    outcomes = Counter(status.get("error_code", status["status"]) for status in record.ended.values())
    rows = [
        *faults.items(),
        *((f"client met {what}", count) for what, count in record.troubles.items()),
        *((f"task ended as {what}", count) for what, count in outcomes.items()),
        ("renders begun", len(renders)),
        ("orphan objects at this moment", len(orphans(system, record))),
        ("violations", len(record.violations)),
    ]
    return "\n".join([f"{title}, --fault-seed {seed}", *(f"{count:6}  {what}" for what, count in sorted(rows))])
