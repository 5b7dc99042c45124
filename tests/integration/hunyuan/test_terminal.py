"""The commands on a terminal of 80 columns, as a person sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.scripted_api import Answer, Request, ScriptedApi, events, scripted_api
from tests.support.terminal import OnTerminal

ROOT = Path(__file__).parents[3]
PROMPT = "A paper boat on a rainy street"
VIDEO = b"0123456789" * 100
COMPLETED = {
    **{"task_id": "t1", "status": "completed", "video_url": "http://x/t1.mp4", "duration": 5, "resolution": "720p"},
    "file_size": len(VIDEO),
}
HEALTH = {"status": "healthy", "model_loaded": True, "gpu_available": False, "vram_free": "0.0 GB", "version": "1"}
RUNNING = {
    "task_id": "t1",
    "status": "processing",
    "progress": 40,
    "elapsed_time": 3,
    "stage": "denoising",
    "remaining_time": 7,
}


def answer(request: Request) -> Answer:
    """Task t1 has rendered 40 % and is then completed."""
    if request.method == "POST":
        return Answer(202, {"task_id": "t1", "status": "processing", "estimated_time": 1})
    if request.path.endswith("/events"):
        return events(RUNNING, COMPLETED)
    return Answer(200, VIDEO)


@pytest.fixture
def api() -> Iterator[ScriptedApi]:
    with scripted_api(answer) as made:
        yield made


@pytest.fixture
def terminal(api: ScriptedApi, tmp_path: Path) -> Callable[..., OnTerminal]:
    environment = {"HUNYUAN_SERVER": api.address, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    return lambda *arguments: OnTerminal(*arguments, directory=tmp_path, environment=environment)


def test_a_terminal_shows_one_bar_that_fits(terminal: Callable[..., OnTerminal]) -> None:
    shown = terminal("generate", PROMPT, "--output", "boat.mp4")
    assert shown.end() == 0
    bar = shown.screen()[1]
    assert bar.startswith("completed       |█")
    assert "100 % [00:0" in bar
    assert len(bar) <= 80
    assert ", 7 s left]\r" in shown.text


def test_ctrl_c_says_how_to_go_on_and_how_to_cancel(api: ScriptedApi, terminal: Callable[..., OnTerminal]) -> None:
    """The stream ends, and the polls after it never do."""
    api.answer = lambda request: answer(request) if request.method == "POST" else Answer(200, RUNNING)
    shown = terminal("generate", PROMPT, "--output", "my boat.mp4", "--server", api.address)
    shown.until("denoising")
    shown.interrupt()
    assert shown.end() == 130
    text = "\n".join(shown.screen())
    assert "Task t1 continues on the server." in text
    assert f"hunyuan wait t1 --output 'my boat.mp4' --server {api.address}\n" in text
    assert f"hunyuan cancel t1 --server {api.address}\n" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(("reply", "code", "content"), [("y", 0, VIDEO), ("n", 2, b"before")])
def test_a_terminal_is_asked_before_a_file_is_overwritten(
    terminal: Callable[..., OnTerminal], tmp_path: Path, reply: str, code: int, content: bytes
) -> None:
    output = tmp_path / "boat.mp4"
    output.write_bytes(b"before")
    shown = terminal("generate", PROMPT, "--output", "boat.mp4")
    shown.until("boat.mp4 exists. Overwrite it? [y/N]: ")
    shown.type_in(f"{reply}\n")
    assert (shown.end(), output.read_bytes()) == (code, content)


def test_a_terminal_gets_no_video_and_is_not_asked_for_a_prompt(terminal: Callable[..., OnTerminal]) -> None:
    for arguments, text in (
        (["generate", PROMPT, "--output", "-"], "redirect it"),
        (["generate"], "there is no prompt"),
    ):
        shown = terminal(*arguments)
        assert shown.end() == 2
        assert text in " ".join(shown.screen())


def test_ctrl_c_in_a_batch_says_what_is_saved_and_how_to_go_on(
    api: ScriptedApi, terminal: Callable[..., OnTerminal], tmp_path: Path
) -> None:
    """The first task is completed, the second one runs for ever."""
    ids = iter(("t1", "t2"))

    def first_alone(request: Request) -> Answer:
        if request.method == "POST":
            return Answer(202, {"task_id": next(ids), "status": "processing", "estimated_time": 1})
        if request.path == "/health":
            return Answer(200, HEALTH)
        if request.path.startswith("/status/"):
            return Answer(200, COMPLETED if request.path == "/status/t1" else {**RUNNING, "task_id": "t2"})
        return answer(request)

    api.answer = first_alone
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{PROMPT}\n")
    shown = terminal("batch", "prompts.txt")
    shown.until("1/2 saved")
    shown.interrupt()
    assert shown.end() == 130
    text = "\n".join(shown.screen())
    assert "Interrupted. 1 of 2 videos are saved." in text
    assert "hunyuan batch prompts.txt\n" in text
    assert "`hunyuan cancel ID` cancels one:\n  t2\n" in text
    assert "Traceback" not in text
