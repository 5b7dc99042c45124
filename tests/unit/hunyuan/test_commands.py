"""The options of the `hunyuan` commands, and the requests that they make."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner, Result

from contract.job import JobRequest
from hunyuan.cli.main import app
from tests.support.scripted_api import Answer, Request, ScriptedApi, events, refusal, scripted_api

PROMPT = "A paper boat on a rainy street"
VIDEO = b"0123456789" * 100
COMPLETED = {
    **{"task_id": "t1", "status": "completed", "video_url": "http://x/t1.mp4", "duration": 5, "resolution": "720p"},
    "file_size": len(VIDEO),
}
RUNNING = {"task_id": "t1", "status": "processing", "progress": 40, "elapsed_time": 3, "stage": "denoising"}
FAILED = {"task_id": "t2", "status": "failed", "error": "Out of memory", "error_code": "OOM_ERROR"}


def answer(request: Request) -> Answer:
    """Task t1 has rendered 40 % and is then completed."""
    if request.method == "POST":
        return Answer(202, {"task_id": "t1", "status": "processing", "estimated_time": 1})
    if request.path.endswith("/events"):
        return events(RUNNING, COMPLETED)
    return Answer(200, VIDEO if request.path.startswith("/videos/") else RUNNING)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedApi]:
    """The server of the commands, which run in an empty directory."""
    monkeypatch.chdir(tmp_path)
    with scripted_api(answer) as made:
        monkeypatch.setenv("HUNYUAN_SERVER", made.address)
        yield made


def run(*arguments: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def request_of(api: ScriptedApi, *options: str) -> dict[str, Any]:
    done = run("generate", PROMPT, *options)
    assert done.exit_code == 0, done.output
    body: dict[str, Any] = api.requests[0].body
    return body


def test_generate_has_an_option_for_every_optional_request_field() -> None:
    command = typer.main.get_group(app).commands["generate"]
    options = {parameter.name for parameter in command.params}
    assert options == {*JobRequest.model_fields, "output", "overwrite", "no_wait", "quiet", "server", "as_json"}


def test_generate_renders_five_seconds_at_720p_unless_told_otherwise(api: ScriptedApi) -> None:
    assert request_of(api) == {
        "prompt": PROMPT,
        "duration": 5,
        "resolution": "720p",
        "model": "HunyuanVideo-1.5",
        "aspect_ratio": "16:9",
    }


def test_generate_sends_its_options_as_the_request_has_them(api: ScriptedApi) -> None:
    options = {
        "duration": 6,
        "resolution": "1080p",
        "model": "HunyuanVideo-1.5-fast",
        "aspect_ratio": "1:1",
        "seed": 7,
        "negative_prompt": "rain",
        "num_inference_steps": 20,
        "guidance_scale": 5.5,
        "image": "https://films.example/boat.png",
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    sent = request_of(api, *words, "--enhance-prompt")
    assert sent == {"prompt": PROMPT, **options, "enhance_prompt": True}


def test_generate_takes_adapters_with_and_without_a_strength(api: ScriptedApi) -> None:
    sent = request_of(api, "--lora", "film", "--lora", "Anime (new):-0.5")
    assert sent["loras"] == [{"name": "film", "scale": 1.0}, {"name": "Anime (new)", "scale": -0.5}]
    for wrong in ("film:", "film:strong", "../film", "film:9"):
        done = run("generate", PROMPT, "--lora", wrong)
        assert (done.exit_code, "NAME or NAME:SCALE" in done.output) == (2, True)


def test_generate_saves_the_video_and_shows_a_line_for_each_stage_without_a_terminal(api: ScriptedApi) -> None:
    done = run("generate", PROMPT, "--output", "boat.mp4")
    assert (done.exit_code, Path("boat.mp4").read_bytes()) == (0, VIDEO)
    assert done.stderr.splitlines() == ["task t1", "denoising 40 %", "completed"]
    assert done.stdout.splitlines() == ["task_id: t1", "output: boat.mp4", "file_size: 1000"]


def test_quiet_prints_only_what_scripts_need(api: ScriptedApi) -> None:
    done = run("generate", PROMPT, "--quiet")
    assert (done.stdout, done.stderr) == ("t1.mp4\n", "")
    done = run("generate", PROMPT, "--quiet", "--no-wait")
    assert (done.stdout, done.stderr) == ("t1\n", "")


def test_no_wait_says_how_to_get_the_video(api: ScriptedApi) -> None:
    done = run("generate", PROMPT, "--no-wait", "--server", api.address)
    assert "task_id: t1" in done.stdout
    assert f"hunyuan wait t1 --server {api.address}\n" in done.stderr
    assert api.paths() == []
    assert run("generate", PROMPT, "--no-wait", "--output", "boat.mp4").exit_code == 2


def test_wait_saves_the_video_of_an_earlier_task(api: ScriptedApi) -> None:
    done = run("wait", "t1", "--output", "boat.mp4", "--json")
    assert json.loads(done.stdout) == {"task_id": "t1", "output": "boat.mp4", "file_size": 1000}
    assert Path("boat.mp4").read_bytes() == VIDEO
    assert api.paths() == ["/status/t1", "/tasks/t1/events", "/videos/t1.mp4"]


def test_an_output_that_cannot_be_used_is_found_before_a_task_is_submitted(api: ScriptedApi) -> None:
    Path("boat.mp4").write_bytes(b"before")
    for output, text in (("boat.mp4", "pass --overwrite"), ("absent/boat.mp4", "absent does not exist")):
        done = run("generate", PROMPT, "--output", output)
        assert (done.exit_code, text in done.stderr) == (2, True)
    assert run("generate", PROMPT, "--output", "-", "--json").exit_code == 2
    assert (api.requests, Path("boat.mp4").read_bytes()) == ([], b"before")
    assert run("generate", PROMPT, "--output", "boat.mp4", "--overwrite").exit_code == 0
    assert Path("boat.mp4").read_bytes() == VIDEO


def test_no_command_overwrites_a_file_silently(api: ScriptedApi) -> None:
    Path("t1.mp4").write_bytes(b"before")
    for command in ("wait", "download"):
        assert run(command, "t1").exit_code == 2
        assert run(command, "t1", "--output", "t1.mp4").exit_code == 2
    assert (api.requests, Path("t1.mp4").read_bytes()) == ([], b"before")


def test_a_directory_as_output_gets_a_file_of_the_tasks_name(api: ScriptedApi) -> None:
    Path("videos").mkdir()
    assert run("generate", PROMPT, "--output", "videos").exit_code == 0
    assert [path.name for path in Path("videos").iterdir()] == ["t1.mp4"]


def test_the_video_can_be_piped(api: ScriptedApi) -> None:
    done = run("generate", PROMPT, "--output", "-")
    assert (done.exit_code, done.stdout_bytes) == (0, VIDEO)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "-"]])
def test_the_prompt_can_be_piped(api: ScriptedApi, arguments: list[str]) -> None:
    assert run(*arguments, stdin=f"{PROMPT}\n".encode()).exit_code == 0
    assert api.requests[0].body["prompt"] == PROMPT
    done = run(*arguments)
    assert (done.exit_code, "no prompt on stdin" in done.stderr) == (2, True)


def test_an_image_on_this_machine_is_sent_with_the_request(api: ScriptedApi) -> None:
    Path("boat.jpg").write_bytes(b"\xff\xd8\xffrest")
    assert request_of(api, "--image", "boat.jpg")["image"] == "data:image/jpeg;base64,/9j/cmVzdA=="
    api.answer = lambda _: refusal(413, "REQUEST_TOO_LARGE", "the body is larger than 64 KiB")
    done = run("generate", PROMPT, "--image", "boat.jpg")
    assert (done.exit_code, "the image boat.jpg is too large for this server" in done.stderr) == (2, True)
    done = run("generate", PROMPT, "--image", "https://example.com/boat.jpg")
    assert (done.exit_code, "larger than 64 KiB" in done.stderr, "the image" in done.stderr) == (2, True, False)
    done = run("generate", PROMPT, "--image", "absent.jpg")
    assert (done.exit_code, "absent.jpg" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("given", "code", "error_code"),
    [
        (refusal(400, "INVALID_PROMPT"), 2, "INVALID_PROMPT"),
        (refusal(401, "UNAUTHORIZED"), 2, "UNAUTHORIZED"),
        (refusal(404, "TASK_NOT_FOUND"), 4, "TASK_NOT_FOUND"),
        (refusal(503, "QUEUE_FULL"), 5, "QUEUE_FULL"),
        (refusal(500, "INTERNAL_ERROR"), 1, "INTERNAL_ERROR"),
        (Answer(200, b"<html>"), 1, None),
    ],
)
def test_errors_are_json_where_answers_are(api: ScriptedApi, given: Answer, code: int, error_code: str | None) -> None:
    api.answer = lambda _: given
    done = run("generate", PROMPT, "--json")
    printed = json.loads(done.stdout)
    assert (done.exit_code, printed["error_code"], done.stderr) == (code, error_code, "")
    assert printed["error"]


def test_a_wrong_setting_is_json_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUNYUAN_SERVER", "not a url")
    done = run("health", "--json")
    assert (done.exit_code, json.loads(done.stdout)["error"].partition(":")[0]) == (2, "HUNYUAN_SERVER")


def test_a_failed_task_is_json_with_its_id(api: ScriptedApi) -> None:
    api.answer = lambda request: events(FAILED) if request.path.endswith("/events") else Answer(200, FAILED)
    done = run("wait", "t2", "--json")
    wanted = {"error": "Out of memory", "error_code": "OOM_ERROR", "task_id": "t2"}
    assert (done.exit_code, json.loads(done.stdout)) == (1, wanted)


def test_list_shows_as_many_tasks_as_it_is_asked_for(api: ScriptedApi) -> None:
    waiting = {**RUNNING, "task_id": "t3", "stage": "queued", "progress": 0, "queue_position": 2}
    completed = {**COMPLETED, "prompt": PROMPT}
    pages = {"": [RUNNING, completed], "c1": [FAILED, waiting]}

    def page(request: Request) -> Answer:
        cursor = request.path.partition("cursor=")[2]
        return Answer(200, {"tasks": pages[cursor], "next_cursor": "c2" if cursor else "c1"})

    api.answer = page
    assert run("list", "--limit", "4").stdout.splitlines() == [
        "t1  processing  denoising 40 %",
        f"t1  completed   5 s 720p  {PROMPT}",
        "t2  failed      OOM_ERROR",
        "t3  processing  queued, place 2",
    ]
    assert api.paths() == ["/tasks?limit=4", "/tasks?limit=2&cursor=c1"]
    assert run("list", "--limit", "2", "--quiet").stdout == "t1\nt1\n"
    assert json.loads(run("list", "--limit", "2", "--json").stdout) == {"tasks": [RUNNING, completed]}


def test_list_names_a_server_that_has_no_list(api: ScriptedApi) -> None:
    api.answer = lambda _: refusal(404, "NOT_FOUND")
    done = run("list")
    assert (done.exit_code, "this server does not list tasks" in done.stderr) == (1, True)


def test_the_version_and_the_completion_of_shells() -> None:
    assert run("--version").stdout == f"hunyuan {version('hunyuan-video-service')}\n"
    assert "--install-completion" in run("--help").stdout
