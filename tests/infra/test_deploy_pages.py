"""Commands, files and names in the pages on deployment exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.offered import COMPOSE, ENV_EXAMPLE, KUBERNETES, OUR_PREFIXES, ROOT, SETTINGS, STAGES, SUBCOMMANDS

DOCKER_PAGE = ROOT / "docs" / "deploy-docker.md"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
BUILD_ARGUMENTS = {
    word.partition("=")[0] for stage in STAGES.values() for argument in stage.all("ARG") for word in argument.words
}
#: Files that the reader creates. Git must ignore them.
MADE_BY_THE_READER = {"infra/.env", "infra/kubernetes/secrets.yaml"}

PAGES = pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("deploy-*.md")), ids=lambda page: page.name)


def blocks(page: Path) -> list[str]:
    """The shell blocks of a page."""
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)


@PAGES
def test_shell_blocks_parse(page: Path) -> None:
    assert blocks(page)
    for block in blocks(page):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@PAGES
def test_files_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w./])(?:infra|overlays|base|components)/[\w./-]*[\w-]", page.read_text()))
    for name in named - MADE_BY_THE_READER:
        assert (ROOT / name).exists() or (KUBERNETES / name).exists(), name


def test_git_ignores_the_files_that_the_reader_creates() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {f"/{name}" for name in MADE_BY_THE_READER} <= set(ignored)


@PAGES
def test_settings_and_commands_exist(page: Path) -> None:
    names = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", page.read_text()))
    assert {name for name in names if name.startswith(OUR_PREFIXES)} <= SETTINGS
    assert set(re.findall(r"(?:^|[ /`=])hunyuan ([a-z][a-z-]+)", page.read_text(), re.M)) <= SUBCOMMANDS


@PAGES
def test_targets_arguments_profiles_and_services_exist(page: Path) -> None:
    text = page.read_text()
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", [])}
    assert set(re.findall(r"--target (\w+)", text)) <= set(STAGES)
    assert set(re.findall(r"--build-arg (\w+)", text)) <= BUILD_ARGUMENTS
    assert set(re.findall(r"(?:--profile |COMPOSE_PROFILES=)(\w+)", text)) <= profiles
    assert set(re.findall(r" run --rm --no-deps ([\w-]+)", text)) <= set(SERVICES)


@PAGES
def test_foreign_images_have_the_same_tags_as_in_compose(page: Path) -> None:
    named = set(re.findall(r"\bdocker\.io/(?:pgsty|library)/\S+", page.read_text()))
    assert named <= {service["image"] for service in SERVICES.values()}


@PAGES
def test_foreign_images_have_an_exact_version(page: Path) -> None:
    """The images of the stores are named with their digest, too."""
    for image in re.findall(r"\b(?:docker|quay|ghcr)\.io/(?!OWNER/)\S+:\S+", page.read_text()):
        assert re.search(r":\d+\.\d+-\w+$|:[\w.-]+@sha256:[0-9a-f]{64}$", image), image


def test_every_build_argument_is_in_the_table() -> None:
    table = DOCKER_PAGE.read_text().partition("| build argument |")[2].partition("\n\n")[0]
    first_cells = "".join(row.split("|")[1] for row in table.splitlines()[2:])
    assert set(re.findall(r"`([A-Z_]+)`", first_cells)) == BUILD_ARGUMENTS


def test_the_loop_fills_the_example_file(tmp_path: Path) -> None:
    """The loop of the page, run unchanged, generates a different secret for each empty variable."""
    (tmp_path / "infra").mkdir()
    (tmp_path / "infra" / ".env.example").write_text(ENV_EXAMPLE.read_text())
    loop = blocks(DOCKER_PAGE)[0].partition("\n\n")[0]
    subprocess.run(["bash", "-e", "-c", loop], cwd=tmp_path, check=True)
    filled = dict(re.findall(r"^([A-Z_]+)=(.*)$", (tmp_path / "infra" / ".env").read_text(), re.M))
    blank = re.findall(r"^([A-Z_]+)=$", ENV_EXAMPLE.read_text(), re.M)
    assert len(blank) == 6
    assert all(re.fullmatch(r"[0-9a-f]{40}", filled[name]) for name in blank)
    assert len({filled[name] for name in blank}) == len(blank)
    assert filled["COMPOSE_PROFILES"] == "cpu"
