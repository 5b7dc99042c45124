"""What is released: built as `make release` builds it, installed where there is no checkout, and used."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support.mp4 import probe
from tools.release import ROOT, ReleaseError, check_changelog, release


@pytest.mark.parametrize(
    ("text", "word"), [("## 1.4.0 - 2026-01-01\n", "no section"), ("## 1.5.0 - unreleased\n", "needs the day")]
)
def test_a_version_with_no_dated_changelog_is_not_released(text: str, word: str) -> None:
    with pytest.raises(ReleaseError, match=word):
        check_changelog(text, "1.5.0", draft=False)


@pytest.mark.timeout(900)
def test_the_wheel_in_an_empty_environment_renders_the_demo(tmp_path: Path) -> None:
    wheel, _ = release(tmp_path / "dist", draft=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"

    def run(*command: str | Path) -> None:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    run(programs / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", f"{wheel}[local]")
    run(programs / "hunyuan", "demo", "--output", "video.mp4")
    assert (probe(tmp_path / "video.mp4").width, probe(tmp_path / "video.mp4").height) == (1280, 720)


def test_the_package_says_the_version_of_pyproject() -> None:
    command = [sys.executable, "-c", "from importlib.metadata import version; print(version('hunyuan-video-service'))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f'version = "{done.stdout.strip()}"' in (ROOT / "pyproject.toml").read_text()
