"""Fixtures every room's tests share."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.postgres import Postgres, running_postgres

# A few examples on each run of everything; many with --hypothesis-profile=full.
hypothesis.settings.register_profile("short", max_examples=40, print_blob=True)
hypothesis.settings.register_profile("full", max_examples=400, print_blob=True)
hypothesis.settings.load_profile("short")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run beside each other already: torch with a thread for each core would only get in its own way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", choices=["short", "full"], default="short", help="form of tests/faults")
    parser.addoption("--fault-seed", type=int, help="else fixed in the short form, random in the full one")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.fault_seed is None:
        config.option.fault_seed = 1 if config.option.faults == "short" else random.randrange(10**6)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The reports of tests/faults; from the processes of xdist, too."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, text in getattr(report, "user_properties", ()):
                if name == "faults" and report.when == "call":
                    terminalreporter.write_line(f"\n{text}")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One for all tests of a process; each makes a database of its own."""
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/queue.sqlite3"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_database()
