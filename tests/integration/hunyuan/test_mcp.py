"""`hunyuan mcp`, as the client of the protocol's own SDK uses it over stdio, against a running service."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.types import CallToolResult

from tests.support.mp4 import probe
from tests.support.scripted_service import scripted_service
from tests.support.service import free_port

ROOT = Path(__file__).parents[3]
KEY = "alices-key-0123456789"
REQUEST = {"prompt": "A paper boat on a rainy street", "duration": 5, "resolution": "720p"}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    environment = {"HUNYUAN_API_KEYS": f"alice:{KEY}"}
    with scripted_service(tmp_path_factory.mktemp("service"), "--step-seconds", "0.5", **environment) as (service, _):
        yield service.address


@asynccontextmanager
async def assistant(address: str, key: str = KEY) -> AsyncIterator[Client]:
    """What an assistant does with the command of docs/client.md."""
    environment = {"HUNYUAN_SERVER": address, "HUNYUAN_API_KEY": key}
    command = StdioServerParameters(command=sys.executable, args=["-m", "hunyuan", "mcp"], env=environment, cwd=ROOT)
    async with Client(command) as client:
        yield client


async def answer(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    fields: dict[str, Any] | None = result.structured_content
    assert fields is not None
    return fields


async def error(client: Client, tool: str, **arguments: Any) -> tuple[str | None, str]:
    """The code and the text of a tool's error."""
    result: CallToolResult = await client.call_tool(tool, arguments)
    assert result.is_error, result.content
    assert result.structured_content is not None
    [content] = result.content
    assert content.type == "text"
    return result.structured_content["error_code"], content.text


async def test_the_tools_tell_the_limits_of_a_request(address: str) -> None:
    async with assistant(address) as client:
        tools = {tool.name: tool.input_schema for tool in (await client.list_tools()).tools}
    assert set(tools) == {"generate_video", "get_status", "get_video", "cancel_task"}
    duration = tools["generate_video"]["properties"]["duration"]
    assert (duration["minimum"], duration["maximum"], duration["default"]) == (5, 10, 10)
    assert tools["generate_video"]["required"] == ["prompt"]
    assert tools["get_video"]["required"] == ["task_id", "output"]


async def test_a_video_is_generated_followed_and_saved(address: str, tmp_path: Path) -> None:
    reports: list[tuple[float, float | None, str | None]] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        reports.append((progress, total, message))

    async with assistant(address) as client:
        task = await answer(client, "generate_video", **REQUEST)
        assert task["status"] == "processing"
        task_id = task["task_id"]
        assert (await answer(client, "get_status", task_id=task_id))["status"] == "processing"
        waited = await client.call_tool("get_status", {"task_id": task_id, "wait": 120}, progress_callback=on_progress)
        assert waited.structured_content is not None
        assert waited.structured_content["status"] == "completed"
        assert waited.structured_content["video_url"] == f"{address}/videos/{task_id}.mp4"
        saved = await answer(client, "get_video", task_id=task_id, output=str(tmp_path))
        again = await error(client, "get_video", task_id=task_id, output=saved["path"])
        assert again == (None, f"{saved['path']} exists; set overwrite to replace it")
        await answer(client, "get_video", task_id=task_id, output=saved["path"], overwrite=True)
    assert Path(saved["path"]) == tmp_path / f"{task_id}.mp4"
    assert probe(tmp_path / f"{task_id}.mp4").num_frames == 121
    percents = [progress for progress, _, _ in reports]
    assert percents == sorted(set(percents))
    assert "denoising" in {message for _, _, message in reports}
    assert {total for _, total, _ in reports} == {100}


async def test_a_wait_ends_before_the_task_and_a_task_can_be_cancelled(address: str) -> None:
    async with assistant(address) as client:
        task_id = (await answer(client, "generate_video", **REQUEST))["task_id"]
        assert (await answer(client, "get_status", task_id=task_id, wait=1))["status"] == "processing"
        assert (await answer(client, "cancel_task", task_id=task_id))["error_code"] == "CANCELLED"
        assert (await answer(client, "get_status", task_id=task_id, wait=60))["status"] == "failed"


async def test_an_error_of_the_service_keeps_its_code_and_its_text(address: str, tmp_path: Path) -> None:
    async with assistant(address) as client:
        code, text = await error(client, "generate_video", **{**REQUEST, "duration": 99})
        assert (code, text) == (
            "INVALID_DURATION",
            "duration must be an integer from 5 to 10 (seconds); got 99 (INVALID_DURATION)",
        )
        assert (await error(client, "generate_video"))[0] == "INVALID_PROMPT"
        assert (await error(client, "get_status", task_id="nobody", wait=5))[0] == "TASK_NOT_FOUND"
        assert (await error(client, "cancel_task", task_id="nobody"))[0] == "TASK_NOT_FOUND"
        assert (await error(client, "get_video", task_id="nobody", output=str(tmp_path)))[0] == "TASK_NOT_FOUND"


async def test_wrong_arguments_are_named(address: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "boat.mp4"
    text_file = tmp_path / "boat.txt"
    text_file.write_text("boat")
    async with assistant(address) as client:
        assert await error(client, "get_status") == ("INVALID_REQUEST", "task_id: Field required")
        code, text = await error(client, "get_status", task_id="t", wait=601)
        assert (code, text) == ("INVALID_REQUEST", "wait: Input should be less than or equal to 600")
        _, text = await error(client, "get_video", task_id="t", output=str(missing))
        assert text == f"the directory {missing.parent} does not exist"
        _, text = await error(client, "generate_video", **REQUEST, image=str(text_file))
        assert text == f"{text_file} is not a JPEG, PNG or WebP file"
        _, text = await error(client, "make_coffee")
        assert text.startswith("there is no tool make_coffee; there are generate_video, ")


@pytest.mark.full
async def test_a_wrong_key_and_a_server_that_is_away_say_what_to_do(address: str) -> None:
    async with assistant(address, key="not-a-key-of-this-server") as client:
        code, text = await error(client, "generate_video", **REQUEST)
    assert code == "UNAUTHORIZED"
    assert text.endswith("; set HUNYUAN_API_KEY")
    async with assistant(f"http://127.0.0.1:{free_port()}") as client:
        code, text = await error(client, "get_status", task_id="t", wait=5)
    assert code is None
    assert "no answer from http://127.0.0.1:" in text
    assert "hunyuan serve" in text


def test_without_the_extra_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['mcp'] = None; from hunyuan.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "mcp"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: this command needs an extra: pip install 'hunyuan-video-service[mcp]'\n"
