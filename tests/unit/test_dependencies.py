"""pyproject.toml declares what the packages import; CI's workflows are valid."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from functools import lru_cache
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
ALLOWED = {"handler": BASE | names(PROJECT["optional-dependencies"]["worker"]), "hunyuan": BASE | {"mcp"}}
#: Declared dependencies install these: boto3, pydantic, FastAPI and transformers require them.
BROUGHT = {"botocore", "pydantic-core", "starlette", "tokenizers", "urllib3"}


@lru_cache
def distributions() -> Mapping[str, list[str]]:
    """Of each package that is installed."""
    return packages_distributions()


@lru_cache
def import_graph() -> grimp.ImportGraph:
    return grimp.build_graph(*OURS, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None)


@pytest.mark.parametrize("package", OURS)
def test_every_imported_package_is_a_declared_dependency(package: str) -> None:
    graph = import_graph()
    modules = {package, *graph.find_descendants(package)}
    external = {
        imported
        for module in modules
        for imported in graph.find_modules_directly_imported_by(module)
        if graph.is_module_squashed(imported) and imported not in sys.stdlib_module_names
    }
    imported = names(distributions()[module][0] for module in external)
    assert imported <= ALLOWED.get(package, BASE) | BROUGHT


def test_the_workflows_have_githubs_shape() -> None:
    program = Path(sys.executable).with_name("check-jsonschema")
    workflows = (ROOT / ".github" / "workflows").glob("*.yml")
    command = [str(program), "--builtin-schema", "vendor.github-workflows", *map(str, workflows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
