"""The commands of docs/deploy-on-prem.md, run as they are printed. Three loopback addresses stand for three hosts.

Three things differ from the page: `docker` is a stand-in that starts the container's SeaweedFS as a process, the
tests' own PostgreSQL runs under the same address, and `pip install` does nothing, because tests/infra runs those
commands. MinIO runs nowhere here; tests/infra reads its commands.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.support.docker_stand_in import make_docker
from tests.support.mp4 import probe
from tests.support.postgres import running_postgres
from tests.support.s3_servers import SEAWEEDFS_OPTIONS
from tests.support.service import eventually

PAGE = Path(__file__).parents[2] / "docs" / "deploy-on-prem.md"
STORE, SHIM = "127.0.0.21", "127.0.0.22"

pytestmark = pytest.mark.timeout(600)


def block(heading: str, number: int = 0) -> str:
    """The n-th block of commands under a heading of the page."""
    section = re.search(rf"^##+ {heading}$(.*?)(?=^##+ |\Z)", PAGE.read_text(), re.M | re.S)
    assert section is not None
    commands: list[str] = re.findall(r"^```bash\n(.*?)^```", section[1], re.M | re.S)
    return commands[number]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The checkout of every host; its `venv` runs the Python of the tests."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name, script in (
        ("hunyuan", f'exec {sys.executable} -m hunyuan "$@"'),
        ("pip", "exit 0"),
        ("python3", f'[ "$1 $2" = "-m venv" ] && exit 0; exec {sys.executable} "$@"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    make_docker(programs, tmp_path / "containers")
    return tmp_path


def environment(host: Path) -> Mapping[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("BUCKET_", "HUNYUAN_"))}
    here = f"{PAGE.parents[1]}{os.pathsep}{clean.get('PYTHONPATH', '')}"
    path = f"{host / 'venv' / 'bin'}{os.pathsep}{clean['PATH']}"
    return {**clean, "PATH": path, "PYTHONPATH": here, "HUNYUAN_DATA_DIR": str(host / "data")}


def type_in(host: Path, *blocks: str) -> str:
    command = ["bash", "-eu", "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=host, env=environment(host), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def running(host: Path, name: str, *blocks: str) -> Iterator[None]:
    """A terminal on that host, in which the blocks are typed and keep running."""
    with (host / f"{name}.log").open("wb") as log:
        command = ["bash", "-eu", "-c", "\n".join(blocks)]
        process = subprocess.Popen(
            command, cwd=host, env=environment(host), stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def settings(host: Path) -> dict[str, str]:
    lines = (host / "hunyuan.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


@contextmanager
def store(host: Path) -> Iterator[None]:
    """The bucket and the database that the page starts in containers."""
    given = settings(host)
    with running_postgres(given["STORE"], 5432) as server:
        with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
            connection.execute("CREATE ROLE hunyuan LOGIN")
            connection.execute("CREATE DATABASE hunyuan OWNER hunyuan")
        type_in(host, block("The store"))
        try:
            type_in(host, block("SeaweedFS"))
            yield
        finally:
            os.kill(int((host / "containers" / "seaweedfs" / "pid").read_text()), signal.SIGKILL)


def test_seaweedfs_runs_with_the_options_that_the_conformance_suite_tests() -> None:
    assert set(SEAWEEDFS_OPTIONS) <= set(block("SeaweedFS").split())


@pytest.mark.full
def test_the_page_leads_to_a_video(host: Path) -> None:
    typed = block("Settings, the same on each host")
    type_in(host, typed.replace("STORE=10.0.0.1", f"STORE={STORE}").replace("SHIM=10.0.0.2", f"SHIM={SHIM}"))
    assert (host / "hunyuan.env").stat().st_mode & 0o777 == 0o600
    with ExitStack() as hosts:
        hosts.enter_context(store(host))
        hosts.enter_context(running(host, "server", block("A server")))
        for number in (1, 2):
            hosts.enter_context(running(host, f"worker{number}", block("A worker"), block("A worker", 1)))

        def workers() -> bool:
            try:
                answer = httpx.get(f"http://{SHIM}:8000/health", timeout=10).json()
            except httpx.TransportError:
                return False
            return bool(answer["workers"]["ready"] == 2)

        eventually("two ready workers", workers, 180)
        type_in(host, block("A video"))
    video = probe(host / "boat.mp4")
    assert (video.width, video.height, video.num_frames) == (1280, 720, 121)
