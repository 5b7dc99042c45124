"""docs/client.md: every block of code runs against a real server, and a user's type checker accepts it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hunyuan import Client, Video
from tests.support.mp4 import probe
from tests.support.page_commands import Terminal
from tests.support.scripted_service import scripted_service

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "client.md"
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(python|bash)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
PYTHON = [text for language, text in BLOCKS if language == "python"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with scripted_service(tmp_path_factory.mktemp("service"), "--step-seconds", "0.05") as (service, _):
        yield service.address


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def terminal(address: str, directory: Path) -> Terminal:
    return Terminal(directory, {"HUNYUAN_SERVER": address})


def run_cell(text: str) -> Any:
    """Runs the block as a cell of a notebook does: its value is that of its last expression. Closes its client."""
    *statements, last = ast.parse(text).body
    names: dict[str, Any] = {}
    try:
        return _run(statements, last, names)
    finally:
        if isinstance(client := names.get("client"), Client):
            client.close()


def _run(statements: list[ast.stmt], last: ast.stmt, names: dict[str, Any]) -> Any:
    exec(compile(ast.Module(statements, []), "cell", "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    exec(compile(ast.Module([last], []), "cell", "exec"), names)
    return None


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs(
    terminal: Terminal, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """No block prints an error: those that show how errors are caught print what they caught."""
    language, text = BLOCKS[number]
    text = text.replace("http://localhost:8000", address)
    if language == "bash":
        terminal.type_in(text)
        return
    monkeypatch.chdir(terminal.directory)
    monkeypatch.setenv("HUNYUAN_SERVER", address)
    value = run_cell(text)
    printed = capsys.readouterr().out
    if "InvalidPromptError" in text:
        assert printed.startswith("another prompt, please: prompt must be text of 10-500 characters")
    if "order-4711" in text:
        first, second = printed.split()
        assert first == second, "one task"
    if "tree.mp4" in text:
        assert isinstance(value, Video)
        assert "<video" in str(value._repr_html_())


def test_the_blocks_saved_the_videos_that_they_name(directory: Path) -> None:
    """Runs after all of them."""
    named = {"boat.mp4", "0.mp4", "1.mp4", "tree.mp4", "street.mp4", "fish.mp4", "star.mp4", "later.mp4"}
    assert {path.name for path in directory.glob("*.mp4")} == named
    batch = {path.name: probe(path).num_frames for path in (directory / "videos").glob("*.mp4")}
    assert batch == {"001-a-red-fish-over-the-sea.mp4": 121, "002-a-yellow-star-in-the-night-sky.mp4": 145}


@pytest.mark.full
def test_a_users_type_checker_accepts_the_examples_and_finds_a_mistake(tmp_path: Path) -> None:
    for number, text in enumerate(PYTHON):
        (tmp_path / f"example_{number}.py").write_text(text)
    (tmp_path / "mistakes.py").write_text(
        "from hunyuan import AsyncClient, Client\n"
        "reveal_type(Client().generate('A paper boat'))\n"
        "reveal_type(Client().status('t1'))\n"
        "reveal_type(Client().wait('t1').video_url)\n"
        "reveal_type(AsyncClient().stream_events('t1'))\n"
        "Client().generate('A paper boat', resolution='4k')\n"
        "Client().generate('A paper boat', colour='red')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}/cache", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"^mistakes\.py:(\d: (?:error|note: Revealed).*)$", done.stdout, re.M)
    assert [re.sub(r"hunyuan\.models\.|typing\.", "", line) for line in found] == [
        '2: note: Revealed type is "AcceptedTask"',
        '3: note: Revealed type is "ProcessingStatus | CompletedStatus | FailedStatus"',
        '4: note: Revealed type is "str"',
        '5: note: Revealed type is "AsyncGenerator[ProcessingStatus | CompletedStatus | FailedStatus, None]"',
        '6: error: Argument "resolution" to "generate" of "Client" has incompatible type "Literal[\'4k\']"; '
        "expected \"Literal['720p', '1080p']\"  [arg-type]",
        '7: error: Unexpected keyword argument "colour" for "generate" of "Client"  [call-arg]',
    ], done.stdout + done.stderr
    assert f"Found 2 errors in 1 file (checked {len(PYTHON) + 1} source files)" in done.stdout
