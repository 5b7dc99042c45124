"""A forbidden import fails the lint, whichever file it is put into."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
PACKAGES = ("contract", "handler", "hunyuan", "shim", "storage")
#: Each import is put into its file alone. A file that does not exist is created.
FORBIDDEN = {
    "contract/new.py": "import httpx",
    "contract/job.py": "from storage import layout",
    "contract/errors.py": "import sqlalchemy",
    "storage/new.py": "import handler.settings",
    "storage/videos.py": "from shim import tasks",
    "storage/settings.py": "import hunyuan.settings",
    "handler/new.py": "import boto3",
    "handler/__main__.py": "import torch",
    "handler/encode.py": "from diffusers import HunyuanVideo15Pipeline",
    "handler/worker.py": "import runpod",
    "handler/video_model/new.py": "from runpod import serverless",
    "handler/weights/new.py": "from shim.host import serve",
    "handler/report.py": "from hunyuan import client",
    "hunyuan/new.py": "import transformers",
    "hunyuan/client.py": "from shim.settings import ServerSettings",
    "hunyuan/deploy/new.py": "from handler.settings import WorkerSettings",
    "hunyuan/cli/tasks.py": "from mcp.types import Tool",
    "hunyuan/cli/new.py": "def start() -> None:\n    from shim.host import serve",
    "hunyuan/settings.py": "from storage.settings import BucketSettings",
    "shim/tasks.py": "import fastapi",
    "shim/queue/new.py": "from starlette.requests import Request",
    "shim/queue/base.py": "from shim import tasks",
    "shim/host/new.py": "from handler.worker import Worker",
    "shim/host/gateway.py": "from fastapi import FastAPI",
    "shim/http/new.py": "from shim.api import videos",
    "shim/api/new.py": "import shim.app",
    "shim/app.py": "from shim.host import serve",
    "shim/api/videos.py": "import botocore.client",
    "shim/metrics.py": "from sqlalchemy import select",
    "shim/errors.py": "from hunyuan.client import Client",
    "shim/new.py": "",  # a module that no layer names
}
#: Runs in the copy, so that the copy's packages are found. Prints the names of the files whose import passes.
CHECK = """
import contextlib, io, json, pathlib, sys
from importlinter import configuration
from importlinter.application import use_cases

configuration.configure()
passed = []
for name, line in json.load(sys.stdin).items():
    path = pathlib.Path(name)
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\\n{line}\\n")
    with contextlib.redirect_stdout(io.StringIO()):
        if use_cases.lint_imports("pyproject.toml", no_logo=True):
            passed.append(name)
    path.unlink() if before is None else path.write_text(before)
print(json.dumps(passed))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", directory)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def run(*command: str | Path, given: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=given, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_packages_as_they_are_pass(copy: Path) -> None:
    done = run(SCRIPTS / "lint-imports", "--no-cache", cwd=copy)
    assert done.returncode == 0, done.stdout


def test_each_forbidden_import_alone_fails_the_lint(copy: Path) -> None:
    done = run(sys.executable, "-c", CHECK, given=json.dumps(FORBIDDEN), cwd=copy)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    "code", ["import os\n\nKEY = os.environ.get('KEY')\n", "from os import getenv\n\nKEY = getenv('KEY')\n"]
)
def test_only_settings_modules_read_the_environment(code: str) -> None:
    for name in ("shim/tasks.py", "handler/new.py", "hunyuan/client.py", "storage/settings.py"):
        done = run(SCRIPTS / "ruff", "check", "--select=TID251", "--stdin-filename", name, "-", given=code)
        assert ("TID251" in done.stdout) == (name != "storage/settings.py"), name
