"""`make constraints-cuda` writes constraints-cuda.txt: what the worker's image installs beyond constraints.txt.

Needs Python 3.12, the image's, because packages differ by Python version. Downloads torch's wheel and installs nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
PYTHON: Final = (3, 12)
_HEAD: Final = """\
# The CUDA packages of PyPI's torch on Python 3.12, which the worker's image adds to constraints.txt: a machine that has
# the CPU build installs none of them. `make constraints-cuda` writes this file.
"""


def normal(name: str) -> str:
    """The name as package indices compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def added(report: dict[str, Any], constraints: str) -> list[str]:
    """The pins of pip's report whose packages constraints.txt does not name."""
    named = {normal(line.partition("==")[0]) for line in constraints.split()} | {"hunyuan-video-service"}
    packages = (item["metadata"] for item in report["install"])
    pins = (f"{item['name']}=={item['version']}" for item in packages if normal(item["name"]) not in named)
    return sorted(pins, key=str.lower)


def main() -> None:
    """Resolves the worker's dependencies and writes the file."""
    if sys.version_info[:2] != PYTHON:
        sys.exit("error: the image has Python 3.12; run make constraints-cuda PYTHON=python3.12")
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        options = (
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--report",
            str(report),
            "--constraint",
            "constraints.txt",
        )
        subprocess.run([sys.executable, "-m", "pip", "install", *options, ".[worker]"], cwd=ROOT, check=True)
        pins = added(json.loads(report.read_text()), (ROOT / "constraints.txt").read_text())
    (ROOT / "constraints-cuda.txt").write_text(_HEAD + "\n".join(pins) + "\n")


if __name__ == "__main__":
    main()
