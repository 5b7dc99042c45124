"""The workflows pass actionlint, and can do no more than they must."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

from tests.infra.offered import ROOT, SCRIPTS, STAGES

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
EACH = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def workflow(name: str) -> dict[str, Any]:
    text = (ROOT / ".github" / "workflows" / name).read_text()
    content: dict[str, Any] = yaml.load(text, Loader=yaml.BaseLoader)  # keeps `on` a string
    return content


def test_actionlint_finds_nothing() -> None:
    command = [str(SCRIPTS / "actionlint"), "-shellcheck", str(SCRIPTS / "shellcheck"), *map(str, WORKFLOWS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@EACH
def test_actions_are_pinned_by_commit_with_the_version_beside_it(path: Any) -> None:
    used = re.findall(r"uses: *(.*)", path.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


@EACH
def test_a_workflow_may_read_and_a_job_names_what_it_writes(path: Any) -> None:
    content = workflow(path.name)
    assert content["permissions"] == {"contents": "read"}
    writes = {
        (name, scope)
        for name, job in content["jobs"].items()
        for scope, access in job.get("permissions", {}).items()
        if access == "write"
    }
    allowed = {("images", "packages"), ("release", "contents")} if path.name == "release.yml" else set()
    assert writes == allowed
    assert all("timeout-minutes" in job for job in content["jobs"].values())


def test_a_tag_releases_after_all_tests_and_both_trials() -> None:
    content = workflow("release.yml")
    assert content["on"] == {"push": {"tags": ["v*.*.*"]}}
    assert set(content["jobs"]["images"]["needs"]) == {"test", "compose", "kind"}
    assert content["jobs"]["release"]["needs"] == "images"


def test_both_images_are_published_with_sbom_and_provenance_in_this_repositorys_registry() -> None:
    job = workflow("release.yml")["jobs"]["images"]
    targets = job["strategy"]["matrix"]["target"]
    assert set(targets) == {"shim", "worker"} <= set(STAGES)
    build = next(step["with"] for step in job["steps"] if "build-push" in step.get("uses", ""))
    assert (build["push"], build["sbom"], build["provenance"]) == ("true", "true", "mode=max")
    assert "ghcr.io/${REPOSITORY,,}/" in job["steps"][1]["run"]


def test_the_night_runs_all_tests_and_compares_runpods_api() -> None:
    jobs = workflow("nightly.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run test-full", "make runpod-schema"]
    assert re.search(r"^runpod-schema:.*\n\t.*-m tools\.runpod_schema$", (ROOT / "Makefile").read_text(), re.M)
