"""Options, order and fixtures of all tests."""

import gc
import os
import random
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from storage.settings import BucketSettings
from tests.support.full import full
from tests.support.postgres import Postgres, running_postgres
from tests.support.s3_servers import juicefs
from tests.support.shared_files import read_once
from tests.support.small_videos import make_videos_small

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each xdist process has a core of its own; one torch thread per core in every process would slow all of them down.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


read_once()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", choices=["short", "full"], default="short", help="length of tests/faults")
    parser.addoption(
        "--fault-seed", type=int, help="seed of tests/faults. Default: 1 for the short form, random for the full form"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.fault_seed is None:
        config.option.fault_seed = 1 if config.option.faults == "short" else random.randrange(10**6)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The objects of the imports stay, so the garbage collector need not look at them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under xdist, starts the modules with the longest time limits first, so that they do not run alone at the end."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    limits: dict[str, float] = {}
    for item in items:
        module = item.nodeid.partition("::")[0]
        marker = item.get_closest_marker("timeout")
        limits[module] = max(limits.get(module, 0.0), float(marker.args[0]) if marker else 0.0)
    items.sort(key=lambda item: -limits[item.nodeid.partition("::")[0]])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the reports of tests/faults, also those from xdist's processes."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, text in getattr(report, "user_properties", ()):
                if name == "faults" and report.when == "call":
                    terminalreporter.write_line(f"\n{text}")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """For async fixtures of every scope."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all tests of a process. Each test creates its own database."""
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketSettings]:
    """The embedded S3 gateway, once for all tests of a process. Each module creates its own bucket."""
    with juicefs(tmp_path_factory.mktemp("juicefs")) as server:
        yield server


@pytest.fixture
def small_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the workers of this process encode small videos."""
    make_videos_small(monkeypatch)


@pytest.fixture(params=["sqlite", full("postgresql")])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without jobs. A test of what the databases do differently asks for `each_database_url`."""
    return _new_database(request, tmp_path)


@pytest.fixture(params=["sqlite", "postgresql"])
def each_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without jobs, of each kind in turn."""
    return _new_database(request, tmp_path)


def _new_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/queue.sqlite3"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_database()


@pytest.fixture
def empty_database_url(request: pytest.FixtureRequest, each_database_url: str) -> str:
    """The URL of a database without tables, of each kind in turn."""
    if each_database_url.startswith("sqlite"):
        return each_database_url
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_empty_database()
