"""`docker` for the commands of docs/deploy-on-prem.md: `docker run` starts the image's program on this machine.

A program that `make_docker` writes calls this module. It knows SeaweedFS; PostgreSQL is the test's own. The paths of a
container become directories below $CONTAINERS, and an address that is published becomes the one that the server binds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

WEED = f"{sysconfig.get_path('scripts')}/weed"


def make_docker(programs: Path, containers: Path) -> None:
    """Writes the program into a directory of the PATH."""
    program = programs / "docker"
    program.write_text(f'#!/bin/sh\nCONTAINERS={containers} exec {sys.executable} -m {__name__} "$@"\n')
    program.chmod(0o755)


def _run(words: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--detach", action="store_true", required=True)
    for option in ("--name", "--restart", "--publish", "--entrypoint"):
        parser.add_argument(option)
    parser.add_argument("--volume", action="append", default=[])
    parser.add_argument("--env", action="append")
    parser.add_argument("image")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    if "/postgres:" in given.image:
        return
    assert "/seaweedfs:" in given.image
    assert given.entrypoint == "weed"
    host, outer, inner = given.publish.split(":")
    assert outer == inner, "the stand-in maps no ports"
    directory = Path(os.environ["CONTAINERS"]) / given.name
    replaced = {"0.0.0.0": host}
    for volume in given.volume:
        source, inside = volume.split(":")[:2]
        place = Path(source) if source.startswith("/") else directory / source
        place.mkdir(parents=True, exist_ok=True)
        replaced[inside] = str(place)
    command = [WEED, *(_replace(word, replaced) for word in given.command)]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    (directory / "pid").write_text(str(process.pid))


def _replace(word: str, replaced: dict[str, str]) -> str:
    option, _, value = word.partition("=")
    for inside, here in replaced.items():
        if value == inside or value.startswith(f"{inside}/"):
            return f"{option}={here}{value.removeprefix(inside)}"
    return word


def main() -> None:
    match sys.argv[1:]:
        case ["run", *words]:
            _run(words)
        case ["exec", "--interactive", name, "weed", "shell"]:
            assert (Path(os.environ["CONTAINERS"]) / name / "pid").exists()
            os.execv(WEED, [WEED, "shell"])
        case other:
            sys.exit(f"the stand-in does not know docker {other}")


if __name__ == "__main__":
    main()
