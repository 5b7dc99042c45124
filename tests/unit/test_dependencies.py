"""pyproject.toml declares what the packages import; CI's workflows are valid."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = ("contract", "handler", "hunyuan", "shim", "storage")


def names(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


BASE = names(PROJECT["dependencies"])
WORKER = BASE | names(PROJECT["optional-dependencies"]["worker"])
#: Declared dependencies install these: boto3, pydantic, FastAPI and transformers require them.
BROUGHT = {"botocore", "pydantic-core", "starlette", "tokenizers", "urllib3"}


@pytest.mark.parametrize("package", OURS)
def test_every_imported_package_is_a_declared_dependency(package: str) -> None:
    graph = grimp.build_graph(*OURS, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None)
    modules = {package, *graph.find_descendants(package)}
    external = {
        imported
        for module in modules
        for imported in graph.find_modules_directly_imported_by(module)
        if graph.is_module_squashed(imported) and imported not in sys.stdlib_module_names
    }
    known = packages_distributions()
    imported = names(known[module][0] for module in external)
    assert imported <= (WORKER if package == "handler" else BASE) | BROUGHT


@pytest.mark.parametrize("name", ["ci.yml", "nightly.yml"])
def test_the_workflows_have_githubs_shape(name: str) -> None:
    program = Path(sys.executable).with_name("check-jsonschema")
    workflow = ROOT / ".github" / "workflows" / name
    command = [str(program), "--builtin-schema", "vendor.github-workflows", str(workflow)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
