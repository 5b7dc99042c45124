"""The commands of a page in docs/, run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


def block(page: Path, heading: str, number: int = 0) -> str:
    """The n-th block of commands under a heading of the page, up to the next heading."""
    section = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#+ [A-Z]|\Z)", page.read_text(), re.M | re.S)
    assert section is not None, heading
    commands: list[str] = re.findall(r"^```bash\n(.*?)^```", section[1], re.M | re.S)
    return commands[number]


class Terminal:
    """A shell in `directory`. `hunyuan` and `pip` are programs of that directory; `pip install` does nothing."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self.directory = directory
        programs = directory / "programs"
        programs.mkdir(parents=True)
        scripts = {
            "hunyuan": f'exec {sys.executable} -m hunyuan "$@"',
            "python3": f'exec {sys.executable} "$@"',
            "pip": "exit 0",
        }
        for name, script in scripts.items():
            (programs / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / name).chmod(0o755)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("BUCKET_", "HUNYUAN_"))}
        self.environment: dict[str, str] = {
            **clean,
            "PATH": f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{clean.get('PYTHONPATH', '')}",
            "RCLONE_CONFIG": str(directory / "rclone.conf"),
            **environment,
        }

    def type_in(self, *blocks: str) -> str:
        """Runs the blocks in one shell, which stops at the first error. Returns what it printed."""
        done = self.attempt(*blocks)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def attempt(self, *blocks: str) -> subprocess.CompletedProcess[str]:
        """As `type_in`, and returns the result, whatever it is."""
        with (self.directory / "terminal.log").open("w+") as log:  # a file: a server in the background keeps it open
            done = subprocess.run(
                self._command(blocks), cwd=self.directory, env=self.environment, stdout=log, stderr=log, check=False
            )
            log.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, log.read(), "")

    @contextmanager
    def running(self, *blocks: str) -> Iterator[None]:
        """The blocks run until the end of the `with` block, which sends SIGTERM."""
        with (self.directory / "server.log").open("ab") as log:
            process = subprocess.Popen(
                self._command(blocks),
                cwd=self.directory,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield
        finally:
            os.killpg(process.pid, 15)
            process.wait(60)

    def _command(self, blocks: tuple[str, ...]) -> list[str]:
        return ["bash", "-eu", "-c", "\n".join(blocks)]
