"""Processes are killed and connections break at any moment: every accepted task ends once, with a true status.

`make test` runs a short form with a fixed seed, `make test-faults` the full one.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator

import psycopg
import pytest

from contract.result import Manifest
from storage import layout
from storage.errors import ObjectNotFoundError
from tests.faults.clients import Clients, Record
from tests.faults.drivers import FULL, SHORT, Driver, Form, Network, Signals
from tests.faults.system import System, running_system
from tests.support.service import eventually

#: Seconds within which all tasks end after the last fault.
END_SECONDS = 180.0
#: The longest time that faults are injected, in seconds.
MAX_FAULT_SECONDS = 1500.0

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(2400)]


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
    clients = Clients(form.clients, range(form.machines_tasks), system.addresses, seed)
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
    clients = Clients(form.clients, numbers, system.addresses, seed)
    drivers: list[Driver] = [kind(kind.__name__, system, form, seed) for kind in (Signals, Network)]
    started = time.monotonic()
    for driver in drivers:
        driver.start()
    signals = drivers[0]
    while signals.is_alive() and clients.left() > form.tasks // 50 and time.monotonic() - started < MAX_FAULT_SECONDS:
        signals.join(0.2)
    for driver in drivers:
        driver.stop()
        clients.record.violations += driver.violations
    for link in system.links.values():
        link.heal()  # both drivers may have broken the same link
    broken = time.monotonic() - started
    clients.finish(END_SECONDS)
    counts = sum((driver.counts for driver in drivers), Counter[str]())
    for name, link in system.links.items():
        counts.update({f"hit by {fault}: {name}": hits for fault, hits in link.hits.items()})
    report(table(f"faults for {broken:.0f} s", seed, clients.record, system, counts))
    check(system, clients.record, form.tasks, before, seed)


def ended(system: System) -> int:
    """How many ends of tasks the queue has counted. It counts each in the transaction that ends the task."""
    with psycopg.connect(system.database.url) as connection:
        row = connection.execute("SELECT sum(total) FROM outcomes").fetchone()
    assert row is not None
    return int(row[0])


def check(system: System, record: Record, tasks: int, ended_before: int, seed: str) -> None:
    """Checks every promise against the answers that clients received."""
    violations = list(record.violations)
    if len(record.ended) == tasks:
        violations += [
            *_changed_answers(system, record),
            *_wrong_in_database(system, record, ended(system) - ended_before),
            *_wrong_videos(system, record),
            *_rendered_again(system, record),
        ]
    else:
        violations.append(f"{len(record.ended)} of {tasks} tasks ended")
    where = f"--fault-seed {seed}, logs in {system.directory}"
    assert not violations, "\n".join([*violations, where, system.log_tails()])


def _changed_answers(system: System, record: Record) -> list[str]:
    """Each server answers with the same final status as when the task ended."""
    seen = Record()
    seen.ended = dict(record.ended)
    for task_id in record.ended:
        for shim in system.shims:
            seen.end(shim.service.status(task_id))
    return seen.violations


def _wrong_in_database(system: System, record: Record, ends: int) -> list[str]:
    with psycopg.connect(system.database.url) as connection:
        rows = connection.execute("SELECT task_id, state, attempts FROM jobs").fetchall()
    wrong = [f"{task_id} is {state}" for task_id, state, _ in rows if state not in ("completed", "failed")]
    attempts = {task_id: attempts for task_id, _, attempts in rows}
    for task_id, status in record.ended.items():
        if "was lost" in status.get("error", "") and attempts.get(task_id, 0) < 3:
            wrong.append(f"{task_id} was tried {attempts.get(task_id)} times; the client received {status}")
    if ends != len(record.accepted):
        wrong.append(f"{len(record.accepted)} tasks were accepted, and {ends} ended")
    return wrong


def _wrong_videos(system: System, record: Record) -> list[str]:
    """The downloaded video, the stored video and the manifest have the same SHA-256."""
    wrong = []
    for task_id, status in record.ended.items():
        if status["status"] != "completed":
            continue
        try:
            manifest = Manifest.model_validate_json(system.bucket.get_bytes(layout.manifest_key(task_id)))
            stored = hashlib.sha256(system.bucket.get_bytes(manifest.video_key)).hexdigest()
        except ObjectNotFoundError as exc:
            wrong.append(f"{task_id} is completed but not stored: {exc}")
            continue
        if not manifest.sha256 == stored == record.downloaded.get(task_id):
            wrong.append(f"{task_id}: {manifest.sha256}, stored {stored}, downloaded {record.downloaded.get(task_id)}")
    return wrong


def _rendered_again(system: System, record: Record) -> list[str]:
    """The tasks that a worker rendered although their manifest was already stored."""
    notes = [note for note in system.notes() if note.task_id in record.ended]
    stored: dict[str, float] = {}
    for note in notes:
        if note.event == "stored":
            stored[note.task_id] = min(note.at, stored.get(note.task_id, note.at))
    return [
        f"{note.task_id} was stored at {stored[note.task_id]} and rendered again at {note.at} by {note.pid}"
        for note in notes
        if note.event == "rendering" and note.at > stored.get(note.task_id, float("inf"))
    ]


def table(title: str, seed: str, record: Record, system: System, faults: Counter[str]) -> str:
    """The numbers of a run."""
    renders = [note for note in system.notes() if note.event == "rendering" and note.task_id in record.ended]
    outcomes = Counter(status.get("error_code", status["status"]) for status in record.ended.values())
    rows = [
        *faults.items(),
        *((f"client met {what}", count) for what, count in record.troubles.items()),
        *((f"task ended as {what}", count) for what, count in outcomes.items()),
        ("renders begun", len(renders)),
        ("violations", len(record.violations)),
    ]
    return "\n".join([f"{title}, --fault-seed {seed}", *(f"{count:6}  {what}" for what, count in sorted(rows))])
