"""Any part is killed at any moment and any connection breaks: every accepted task ends once, and truly.

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
from tests.faults.clients import Book, Clients
from tests.faults.drivers import FULL, SHORT, Driver, Form, Network, Signals
from tests.faults.system import System, running_system
from tests.support.service import eventually

#: Seconds within which all is settled once nothing is broken any more.
SETTLED = 180.0
#: Of so many seconds are the faults of the full form, at most.
LONGEST = 1500.0

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
    """Shows a text at the end of the run, whether or not the test passed."""
    return lambda text: record_property("faults", text)


def test_each_server_is_killed_once_and_every_task_is_completed(
    system: System, form: Form, seed: str, report: Report
) -> None:
    """Two shims, four workers, one PostgreSQL, one bucket; clients ask either shim."""
    clients = Clients(form.clients, range(form.machines_tasks), system.addresses, seed)
    before = ended(system)
    for share, shim in enumerate(system.shims, start=1):
        some = share * form.machines_tasks // 4
        eventually(f"the end of {some} tasks", lambda some=some: len(clients.book.ended) >= some, SETTLED)  # type: ignore[misc]
        shim.kill()
        shim.start()
        eventually(f"{shim.name} up", shim.is_up, 120)
    clients.settle(SETTLED)
    report(table(f"{len(system.shims)} servers killed once", seed, clients.book, system, Counter()))
    check(system, clients.book, form.machines_tasks, before, seed)
    assert {status["status"] for status in clients.book.ended.values()} == {"completed"}


def test_whatever_breaks_every_task_ends_once_as_completed_or_with_a_true_reason(
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
    while signals.is_alive() and clients.left() > form.tasks // 50 and time.monotonic() - started < LONGEST:
        signals.join(0.2)
    for driver in drivers:
        driver.stop()
        clients.book.violations += driver.violations
    for link in system.links.values():
        link.heal()  # both drivers may have been at the same one
    broken = time.monotonic() - started
    clients.settle(SETTLED)
    counts = sum((driver.counts for driver in drivers), Counter[str]())
    for name, link in system.links.items():
        counts.update({f"hit by {fault}: {name}": hits for fault, hits in link.hits.items()})
    report(table(f"faults for {broken:.0f} s", seed, clients.book, system, counts))
    check(system, clients.book, form.tasks, before, seed)


def ended(system: System) -> int:
    """How many times a task has ended: the queue counts each end in the transaction that makes it."""
    with psycopg.connect(system.database.url) as connection:
        row = connection.execute("SELECT sum(total) FROM outcomes").fetchone()
    assert row is not None
    return int(row[0])


def check(system: System, book: Book, tasks: int, ended_before: int, seed: str) -> None:
    """All that is promised, of all that clients were told."""
    violations = list(book.violations)
    if len(book.ended) == tasks:
        violations += [
            *_told_otherwise(system, book),
            *_wrong_in_database(system, book, ended(system) - ended_before),
            *_wrong_videos(system, book),
            *_rendered_again(system, book),
        ]
    else:
        violations.append(f"{len(book.ended)} of {tasks} tasks ended")
    where = f"--fault-seed {seed}, logs in {system.directory}"
    assert not violations, "\n".join([*violations, where, system.log_tails()])


def _told_otherwise(system: System, book: Book) -> list[str]:
    """Each server says of each task what was said when it ended."""
    seen = Book()
    seen.ended = dict(book.ended)
    for task_id in book.ended:
        for shim in system.shims:
            seen.end(shim.service.status(task_id))
    return seen.violations


def _wrong_in_database(system: System, book: Book, ends: int) -> list[str]:
    with psycopg.connect(system.database.url) as connection:
        rows = connection.execute("SELECT task_id, state, attempts FROM jobs").fetchall()
    wrong = [f"{task_id} is {state}" for task_id, state, _ in rows if state not in ("completed", "failed")]
    attempts = {task_id: attempts for task_id, _, attempts in rows}
    for task_id, told in book.ended.items():
        if "was lost" in told.get("error", "") and attempts.get(task_id, 0) < 3:
            wrong.append(f"{task_id} was tried {attempts.get(task_id)} times, and told {told}")
    if ends != len(book.accepted):
        wrong.append(f"{len(book.accepted)} tasks were accepted, and {ends} ended")
    return wrong


def _wrong_videos(system: System, book: Book) -> list[str]:
    """What was downloaded, what is stored, and what its manifest says is the same."""
    wrong = []
    for task_id, told in book.ended.items():
        if told["status"] != "completed":
            continue
        try:
            manifest = Manifest.model_validate_json(system.bucket.get_bytes(layout.manifest_key(task_id)))
            stored = hashlib.sha256(system.bucket.get_bytes(layout.video_key(task_id))).hexdigest()
        except ObjectNotFoundError as exc:
            wrong.append(f"{task_id} is completed, and not stored: {exc}")
            continue
        if not manifest.sha256 == stored == book.downloaded.get(task_id):
            wrong.append(f"{task_id}: {manifest.sha256}, stored {stored}, downloaded {book.downloaded.get(task_id)}")
    return wrong


def _rendered_again(system: System, book: Book) -> list[str]:
    """The tasks that a worker rendered although it had asked for the manifest when it was stored already."""
    notes = [note for note in system.notes() if note.task_id in book.ended]
    stored: dict[str, float] = {}
    for note in notes:
        if note.event == "stored":
            stored[note.task_id] = min(note.at, stored.get(note.task_id, note.at))
    return [
        f"{note.task_id} was stored at {stored[note.task_id]} and rendered again at {note.at} by {note.pid}"
        for note in notes
        if note.event == "rendering" and note.at > stored.get(note.task_id, float("inf"))
    ]


def table(title: str, seed: str, book: Book, system: System, faults: Counter[str]) -> str:
    """The figures of a run."""
    renders = [note for note in system.notes() if note.event == "rendering" and note.task_id in book.ended]
    outcomes = Counter(told.get("error_code", told["status"]) for told in book.ended.values())
    rows = [
        *faults.items(),
        *((f"client met {what}", count) for what, count in book.troubles.items()),
        *((f"task ended as {what}", count) for what, count in outcomes.items()),
        ("renders begun", len(renders)),
        ("violations", len(book.violations)),
    ]
    return "\n".join([f"{title}, --fault-seed {seed}", *(f"{count:6}  {what}" for what, count in sorted(rows))])
