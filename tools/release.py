"""`make release` builds the wheel and the source archive of this version and checks their contents."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Annotated, Final

import typer

ROOT: Final = Path(__file__).parents[1]
_PACKAGES: Final = {"contract", "handler", "hunyuan", "shim", "storage"}
#: Files that the wheel must contain: one of each package's parts, and those that are not Python modules.
_REQUIRED: Final = (
    *(f"{package}/py.typed" for package in sorted(_PACKAGES)),
    "contract/job.py",
    "handler/__main__.py",
    "handler/video_model/catalog.py",
    "handler/weights/download.py",
    "hunyuan/__main__.py",
    "hunyuan/cli/main.py",
    "hunyuan/deploy/deployment.py",
    "shim/api/documented.py",
    "shim/host/serve.py",
    "shim/queue/migrations/env.py",
    "shim/web/app.js",
    "shim/web/index.html",
    "storage/bucket.py",
)


class ReleaseError(Exception):
    """This version can't be released; the message says why."""


def version() -> str:
    """The version that pyproject.toml states."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def check_changelog(text: str, version: str, *, draft: bool) -> None:
    """Checks that the changelog has a section for this version. Only a draft may leave the release date open.

    Raises:
        ReleaseError: the section or its date is missing.
    """
    heading = re.search(rf"^## {re.escape(version)} - (.+)$", text, re.M)
    if heading is None:
        raise ReleaseError(f"CHANGELOG.md has no section for {version}: add `## {version} - YYYY-MM-DD`")
    if not draft and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", heading[1]):
        raise ReleaseError(
            f"CHANGELOG.md states {heading[1]!r} as the date of {version}: write YYYY-MM-DD, or build with --draft"
        )


def check_wheel(wheel: Path) -> None:
    """Checks that the wheel contains our packages, each with its data files, and nothing else.

    Raises:
        ReleaseError: a file is missing, or the wheel contains a package that is not ours.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    if missing := [name for name in _REQUIRED if name not in names]:
        raise ReleaseError(f"{wheel.name} lacks {', '.join(missing)}")
    foreign = {name.split("/")[0] for name in names if ".dist-info/" not in name} - _PACKAGES
    if foreign:
        raise ReleaseError(f"{wheel.name} contains {', '.join(sorted(foreign))}, which must not be in it")


def release(to: Path, *, draft: bool) -> tuple[Path, Path]:
    """Builds both into `to`, checks them and returns their paths: the wheel, then the source archive.

    Raises:
        ReleaseError: the changelog, the build or the wheel's contents are wrong.
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


def main(
    to: Annotated[Path, typer.Option(help="Directory to build into.")] = ROOT / "dist",
    draft: Annotated[bool, typer.Option("--draft", help="Accept a changelog without the release date.")] = False,
) -> None:
    """Builds the wheel and the source archive of this version."""
    try:
        built = release(to, draft=draft)
    except ReleaseError as exc:
        sys.exit(f"error: {exc}")
    for path in built:
        print(path)


if __name__ == "__main__":
    typer.run(main)
