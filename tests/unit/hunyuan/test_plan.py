"""`hunyuan plan` prints what every kind of video needs, also on a machine without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hunyuan.cli.main import app

#: Runs the command where torch can't be imported.
SCRIPT = "import sys; sys.modules['torch'] = None; from hunyuan.cli.main import main; main()"


def plan(*arguments: str, fails: bool = False) -> str:
    run = CliRunner().invoke(app, ["plan", *arguments])
    assert run.exit_code == (2 if fails else 0), run.output
    return run.stderr if fails else run.stdout


def test_it_prints_every_kind_of_video_in_narrow_lines_without_pytorch() -> None:
    command = [sys.executable, "-c", SCRIPT, "plan", "--gpu", "RTX4090"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(line.startswith("quality   1080p 10 s") for line in lines)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("gpu", ["RTX4090", "L40S", "L40", "A100", "H100", "H200", "B200"])
def test_every_gpu_has_a_plan_for_the_documented_videos(gpu: str) -> None:
    found = {
        (row["profile"], row["resolution"], row["duration"]): row for row in json.loads(plan("--gpu", gpu, "--json"))
    }
    assert found["fast", "1080p", 10]["fits"]
    assert found["fast", "720p", 5]["seconds"] < found["quality", "720p", 5]["seconds"]


def test_less_memory_streams_and_too_little_does_not_fit() -> None:
    rows = json.loads(plan("--vram", "9", "--image", "--sage", "--share", "0.5", "--json"))
    assert {row["fits"] for row in rows} == {True, False}
    assert all("GB of GPU memory" in row["problem"] for row in rows if not row["fits"])


def test_an_unknown_gpu_is_named_with_the_known_ones() -> None:
    assert "--gpu must be one of RTX4090" in plan("--gpu", "T4", fails=True)
