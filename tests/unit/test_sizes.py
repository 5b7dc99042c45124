"""How large a file, a function and the server's package may be. ruff checks complexity (C901)."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("contract", "handler", "hunyuan", "shim", "storage")
CODE = (*PACKAGES, "benchmarks", "examples", "tools")


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_file_is_longer_than_400_lines() -> None:
    files = [
        path for name in CODE for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".js", ".css", ".html")
    ]
    assert {str(path.relative_to(ROOT)): lines(path) for path in files if lines(path) > 400} == {}


def test_functions_are_short() -> None:
    functions = [
        node
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    assert statistics.median(lengths) < 10
    assert statistics.quantiles(lengths, n=10)[-1] < 25


def test_the_server_has_at_most_15_entries() -> None:
    entries = {path.name for path in (ROOT / "shim").iterdir()} - {"__init__.py", "__pycache__", "py.typed"}
    assert len(entries) <= 14, entries


def test_no_package_is_half_of_the_tree() -> None:
    sizes = {name: sum(map(lines, (ROOT / name).rglob("*.py"))) for name in PACKAGES}
    assert max(sizes.values()) < sum(sizes.values()) / 2, sizes
