"""`make release`: the wheel and the source archive of this version, built and looked through."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
#: What the wheel must carry: a file of each room, and what is no Python but needed.
_CARRIED: Final = (
    "handler/__main__.py",
    "handler/video_model/catalog.py",
    "shim/__main__.py",
    "shim/queue/migrations/env.py",
    "shim/web/app.js",
    "shim/web/index.html",
    "storage/bucket.py",
)
_ROOMS: Final = {"handler", "shim", "storage"}


class ReleaseError(Exception):
    """The version can't be released as it is; the message says why."""


def version() -> str:
    """The version, from its one place: pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def check_changelog(text: str, version: str, *, draft: bool) -> None:
    """The changelog tells users of this version, and since when it is there.

    Raises:
        ReleaseError: it does not.
    """
    heading = re.search(rf"^## {re.escape(version)} - (.+)$", text, re.M)
    if heading is None:
        raise ReleaseError(f"CHANGELOG.md has no section for {version}")
    if not draft and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", heading[1]):
        raise ReleaseError(f"CHANGELOG.md: {version} is {heading[1]}, and needs the day of its release")


def check_wheel(wheel: Path) -> None:
    """The wheel carries our packages whole and nothing else.

    Raises:
        ReleaseError: something is missing, or too much.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    if missing := [name for name in _CARRIED if name not in names]:
        raise ReleaseError(f"{wheel.name} lacks {', '.join(missing)}")
    foreign = {name.split("/")[0] for name in names if ".dist-info/" not in name} - _ROOMS
    if foreign:
        raise ReleaseError(f"{wheel.name} carries {', '.join(sorted(foreign))}, too")


def release(to: Path, *, draft: bool) -> tuple[Path, Path]:
    """Build into `to`; the wheel and the source archive.

    Raises:
        ReleaseError: the changelog or what was built is not as it must be.
    """
    check_changelog((ROOT / "CHANGELOG.md").read_text(), version(), draft=draft)
    _run("build", "--no-isolation", "--outdir", str(to), str(ROOT))
    stem = f"hunyuan_video_service-{version()}"
    wheel, archive = to / f"{stem}-py3-none-any.whl", to / f"{stem}.tar.gz"
    _run("twine", "check", "--strict", str(wheel), str(archive))
    check_wheel(wheel)
    return wheel, archive


def _run(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{module} failed:\n{done.stdout}{done.stderr}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Release, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=ROOT / "dist", help="directory to build into")
    parser.add_argument("--draft", action="store_true", help="the changelog need not name the day yet")
    options = parser.parse_args(arguments)
    try:
        built = release(options.to, draft=options.draft)
    except ReleaseError as exc:
        sys.exit(f"error: {exc}")
    for path in built:
        print(path)


if __name__ == "__main__":
    main()
