"""Files of prompts, what a batch remembers, and what it does with a server that is busy, away or forgetful."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hunyuan.cli.batch_file import Row, read
from hunyuan.cli.batch_state import BatchState
from hunyuan.cli.exits import CommandError
from hunyuan.cli.main import app
from tests.support.scripted_api import LOST, Answer, Request, refusal, scripted_api

BOAT = "A paper boat on a rainy street"
FISH = "A red fish swims over the sea"
VIDEO = b"0123456789"
HEALTH = {"status": "healthy", "model_loaded": True, "gpu_available": False, "vram_free": "0.0 GB", "version": "1"}


# Files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.txt", f"{BOAT}\n\n  {FISH}  \r\n"),
        ("prompts.csv", f"prompt\n{BOAT}\n\n{FISH}\n"),
        ("prompts.csv", f"\ufeffprompt,seed\r\n{BOAT},\r\n\r\n{FISH},\r\n"),
        ("prompts.jsonl", f'"{BOAT}"\n\n{{"prompt": "{FISH}"}}\n'),
    ],
)
def test_each_kind_of_file_has_the_same_prompts(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, newline="")
    rows = read(path, {"duration": 5})
    assert [row.request for row in rows] == [{"duration": 5, "prompt": BOAT}, {"duration": 5, "prompt": FISH}]


def test_a_row_may_have_fields_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    columns = "prompt,duration,guidance_scale,negative_prompt,enhance_prompt"
    path.write_text(f'{columns}\n"{BOAT}, at night",7,2.5,"rain, snow",TRUE\n')
    fields = {"prompt": f"{BOAT}, at night", "duration": 7, "guidance_scale": 2.5, "negative_prompt": "rain, snow"}
    fields["enhance_prompt"] = True
    assert read(path, {"duration": 5}) == [Row(2, fields)]


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.txt", "short\n", "line 1: prompt must be text of 10-500 characters"),
        ("a.txt", "\n", "has no prompts"),
        ("a.csv", f"text\n{BOAT}\n", "line 1: the first line must name the columns"),
        ("a.csv", f"prompt,duration\n{BOAT},long\n", "line 2: duration must be a number; got 'long'"),
        (
            "a.csv",
            f"prompt,enhance_prompt\n{BOAT},maybe\n",
            "line 2: enhance_prompt must be true or false; got 'maybe'",
        ),
        ("a.csv", f"prompt,duration\n{BOAT},50\n", "line 2: duration must be an integer from 5 to 10"),
        ("a.csv", f"prompt,colour\n{BOAT},red\n", 'line 2: unknown field "colour"'),
        ("a.csv", f"prompt\n{BOAT}, at night\n", "line 2: more cells than columns"),
        ("a.jsonl", f'{{"prompt": "{BOAT}"}}\n{{"prompt"\n', "line 2: not JSON"),
        ("a.jsonl", "7\n", "line 1: expected a JSON object"),
        ("a.jsonl", f'{{"prompt": "{BOAT}", "image": "absent.png"}}\n', "absent.png"),
    ],
)
def test_a_wrong_file_is_refused_whole_with_the_line(tmp_path: Path, name: str, text: str, wanted: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(CommandError) as caught:
        read(path, {})
    assert wanted in str(caught.value)
    assert caught.value.code == 2


# What a batch remembers


def test_a_key_is_the_same_after_a_kill_and_another_after_a_failure(tmp_path: Path) -> None:
    rows = [Row(1, {"prompt": BOAT}), Row(2, {"prompt": BOAT}), Row(3, {"prompt": FISH})]
    with BatchState(tmp_path, rows) as state:
        before = [state.idempotency_key(item) for item in state.items]
        assert len(set(before)) == 3, "two equal prompts are two videos"
        state.submitted(state.items[2], "t3")
        state.failed(state.items[2], "out of memory", "OOM_ERROR")
        with state.path.open("a") as file:
            file.write('{"item": "cut o')
    with BatchState(tmp_path, rows) as state:
        after = [state.idempotency_key(item) for item in state.items]
        assert (after[:2], after[2] != before[2]) == (before[:2], True)
        state.submitted(state.items[0], "t1")
    with BatchState(tmp_path, rows) as state:
        assert [item.task_id for item in state.items] == ["t1", None, None], "the line after the cut one is read"


def test_prompts_may_be_added_in_front_of_a_batch_that_has_begun(tmp_path: Path) -> None:
    with BatchState(tmp_path, [Row(1, {"prompt": BOAT})]) as state:
        (item,) = state.items
        state.submitted(item, "t1")
        item.output.write_bytes(VIDEO)
        state.saved(item)
    with BatchState(tmp_path, [Row(1, {"prompt": FISH}), Row(2, {"prompt": BOAT})]) as state:
        assert [(item.saved, item.output.name) for item in state.items] == [
            (False, "001-a-red-fish-swims-over-the-sea.mp4"),
            (True, "001-a-paper-boat-on-a-rainy-street.mp4"),
        ]


def test_two_batches_cannot_use_one_directory(tmp_path: Path) -> None:
    with (
        BatchState(tmp_path, [Row(1, {"prompt": BOAT})]),
        pytest.raises(CommandError, match="another `hunyuan batch`"),
        BatchState(tmp_path, [Row(1, {"prompt": BOAT})]),
    ):
        pass


# Servers


class Server:
    """Completes every task at its first poll. `refusals` answer the first requests to submit."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.tasks: dict[str, str] = {}
        self.refusals: list[Answer] = []
        self.failing: dict[str, str] = {}
        self.unknown: set[str] = set()

    def __call__(self, request: Request) -> Answer:
        if request.path == "/health":
            return Answer(200, HEALTH)
        if request.method == "POST":
            return self.submit(request)
        task_id = request.path.rpartition("/")[2].removesuffix(".mp4")
        if request.path.startswith("/videos/"):
            return Answer(200, VIDEO + task_id.encode())
        if task_id in self.unknown or task_id not in self.tasks.values():
            self.unknown.discard(task_id)
            return refusal(404, "TASK_NOT_FOUND")
        if code := self.failing.get(task_id):
            return Answer(200, {"task_id": task_id, "status": "failed", "error": "no luck", "error_code": code})
        fields = {"video_url": "http://x", "duration": 5, "resolution": "720p", "file_size": 12}
        return Answer(200, {"task_id": task_id, "status": "completed", **fields})

    def submit(self, request: Request) -> Answer:
        key = request.headers["Idempotency-Key"]
        self.keys.append(key)
        if self.refusals:
            return self.refusals.pop(0)
        task_id = self.tasks.setdefault(key, f"t{len(self.tasks) + 1}")
        return Answer(202, {"task_id": task_id, "status": "processing", "estimated_time": 1})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(f"{BOAT}\n{FISH}\n")
    made = Server()
    with scripted_api(made) as api:
        monkeypatch.setenv("HUNYUAN_SERVER", api.address)
        yield made


def batch(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["batch", "prompts.txt", *arguments])


def summary(done: Result) -> Any:
    return json.loads(done.stdout)


def test_a_batch_prints_a_line_for_each_video_without_a_terminal(server: Server) -> None:
    done = batch()
    assert (done.exit_code, done.stdout) == (0, "2 of 2 videos are in prompts\n")
    assert done.stderr.splitlines() == [
        "1/2 prompts/001-a-paper-boat-on-a-rainy-street.mp4",
        "2/2 prompts/002-a-red-fish-swims-over-the-sea.mp4",
    ]
    assert Path("prompts/002-a-red-fish-swims-over-the-sea.mp4").read_bytes() == VIDEO + b"t2"
    again = batch("--quiet")
    assert again.stdout.splitlines() == [line.partition(" ")[2] for line in done.stderr.splitlines()]
    assert len(server.keys) == 2, "nothing was submitted again"


def test_failures_are_in_the_summary_and_the_same_command_retries_them(server: Server) -> None:
    server.failing = {"t2": "OOM_ERROR"}
    done = batch("--json")
    failure = {"line": 2, "task_id": "t2", "error": "no luck", "error_code": "OOM_ERROR"}
    assert (done.exit_code, summary(done)["saved"], summary(done)["failed"]) == (1, 1, [failure])
    done = batch("--json")
    assert (done.exit_code, summary(done)["saved"], summary(done)["failed"]) == (0, 2, [])
    assert len(server.tasks) == 3


def test_a_busy_server_is_waited_for(server: Server) -> None:
    busy = ((503, "QUEUE_FULL"), (429, "RATE_LIMITED"), (503, "MODEL_NOT_LOADED"))
    server.refusals = [*(refusal(status, code, Retry_After="0") for status, code in busy), LOST]
    done = batch()
    assert done.exit_code == 0
    assert "waiting: no (QUEUE_FULL)" in done.stderr
    assert (len(server.tasks), len(set(server.keys))) == (2, 2)


def test_a_key_that_is_wrong_ends_the_batch_at_once(server: Server) -> None:
    server.refusals = [refusal(401, "UNAUTHORIZED")]
    done = batch("--json")
    assert (done.exit_code, summary(done)["error_code"]) == (2, "UNAUTHORIZED")
    assert batch().exit_code == 0
    assert server.keys[0] == server.keys[1], "what was not answered is asked for under the same key"


def test_a_task_that_the_server_has_forgotten_is_submitted_again(server: Server) -> None:
    server.unknown = {"t1"}
    assert batch().exit_code == 0
    assert len(server.keys) == 3


def test_a_video_that_was_saved_before_the_kill_is_not_downloaded_again(server: Server) -> None:
    rows = read(Path("prompts.txt"), {"duration": 5, "resolution": "720p", "model": "HunyuanVideo-1.5"})
    rows = [Row(row.line, {**row.request, "aspect_ratio": "16:9"}) for row in rows]
    with BatchState(Path("prompts"), rows) as state:
        state.submitted(state.items[0], "t7")
        state.items[0].output.write_bytes(b"whole")
        state.items[0].output.with_name(f".{state.items[0].output.name}.0.part").write_bytes(b"part")
    assert batch().exit_code == 0
    assert Path("prompts/001-a-paper-boat-on-a-rainy-street.mp4").read_bytes() == b"whole"
    assert len(server.keys) == 1
    assert list(Path("prompts").glob(".*.part")) == []


def test_files_that_are_not_the_batchs_own_are_not_overwritten(server: Server) -> None:
    Path("prompts").mkdir()
    output = Path("prompts/001-a-paper-boat-on-a-rainy-street.mp4")
    output.write_bytes(b"before")
    done = batch()
    assert (done.exit_code, "pass --overwrite" in done.stderr, server.keys) == (2, True, [])
    assert output.read_bytes() == b"before"
    assert batch("--overwrite").exit_code == 0
    assert output.read_bytes() == VIDEO + b"t1"


def test_a_server_that_is_away_from_the_start_is_not_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUNYUAN_SERVER", "http://127.0.0.1:9")
    done = batch()
    assert (done.exit_code, "Is the server running?" in done.stderr) == (3, True)
