"""The Dockerfile's commands, run in virtual environments, build a server and a worker that serve the demo.

Both install their dependencies from a package index, which takes minutes.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from storage.settings import BucketSettings
from tests.infra.dockerfile import Builder, Image, parse
from tests.support.mp4 import probe
from tests.support.s3_servers import juicefs
from tests.support.service import RENDER_SECONDS, START_SECONDS, eventually, free_port

pytestmark = [pytest.mark.timeout(900), pytest.mark.full]

ROOT = Path(__file__).parents[2]
STAGES = parse((ROOT / "Dockerfile").read_text())
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(STAGES, ROOT, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def shim_image(builder: Builder) -> Image:
    return builder.build("shim")


@pytest.fixture(scope="module")
def worker_image(builder: Builder) -> Image:
    return builder.build("worker")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketSettings]:
    with juicefs(tmp_path_factory.mktemp("bucket")) as settings:
        yield settings


class Container:
    """A process of an image, with the image's environment and a directory of its own."""

    def __init__(self, image: Image, command: list[str], directory: Path, **environment: str) -> None:
        program = shutil.which(command[0], path=image.environment["PATH"])
        assert program is not None
        assert program.startswith(str(image.root)), f"{program} does not come from the image"
        self.log = directory / "log"
        self.environment = {**image.environment, "HOME": str(directory), "TMPDIR": str(directory), **environment}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [program, *command[1:]], env=self.environment, cwd=directory, stdout=log, stderr=log
            )

    def check(self) -> None:
        assert self.process.poll() is None, self.log.read_text()

    def stop(self) -> int:
        """Sends SIGTERM, as a container engine does, and returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


def bucket_environment(bucket: BucketSettings) -> dict[str, str]:
    return {
        "BUCKET_ENDPOINT_URL": str(bucket.endpoint_url),
        "BUCKET_ACCESS_KEY_ID": bucket.access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": bucket.secret_access_key.get_secret_value(),
        "BUCKET_NAME": bucket.name,
    }


def healthy(image: Image, container: Container) -> bool:
    container.check()
    probe = [shutil.which(image.healthcheck[0], path=image.environment["PATH"]) or "", *image.healthcheck[1:]]
    return subprocess.run(probe, env=container.environment, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def shim(
    shim_image: Image, bucket: BucketSettings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Container]]:
    """The server's address and its process."""
    directory, port = tmp_path_factory.mktemp("shim"), free_port()
    container = Container(
        shim_image,
        shim_image.command,
        directory,
        HUNYUAN_HOST="127.0.0.1",
        HUNYUAN_PORT=str(port),
        HUNYUAN_DATA_DIR=str(directory / "data"),
        HUNYUAN_PLATFORM_TOKEN=TOKEN,
        **bucket_environment(bucket),
    )
    try:
        eventually("a passed health check", lambda: healthy(shim_image, container), START_SECONDS)
        yield f"http://127.0.0.1:{port}", container
    finally:
        assert container.stop() == 0, container.log.read_text()


def test_the_server_answers_every_path_that_kubernetes_probes_or_prometheus_scrapes(
    shim: tuple[str, Container],
) -> None:
    manifests = "\n".join(path.read_text() for path in (ROOT / "infra" / "kubernetes").rglob("*.yaml"))
    paths = set(re.findall(r"path: (/[a-z]+)(?=[,}\s])", manifests))
    assert paths >= {"/health", "/ready", "/metrics"}
    for path in paths:
        assert httpx.get(f"{shim[0]}{path}").status_code in (200, 503), path


def test_only_commands_of_the_distribution_are_skipped(shim_image: Image, worker_image: Image) -> None:
    assert shim_image.skipped == ["useradd"]
    assert worker_image.skipped == ["apt-get", "useradd"]


def test_the_server_has_no_torch_and_the_worker_has(shim_image: Image, worker_image: Image) -> None:
    for image, code in ((shim_image, 1), (worker_image, 0)):
        assert image.run("python -c 'import torch'").returncode == code
        where = image.run("python -c 'import shim; print(shim.__file__)'").stdout
        assert where.startswith(str(image.root)), "the image must import its own copy of the package"


def test_both_images_contain_the_versions_of_the_constraints_file(shim_image: Image, worker_image: Image) -> None:
    pinned = {line.lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    names = {line.partition("==")[0] for line in pinned}
    for image in (shim_image, worker_image):
        frozen = image.run("pip freeze").stdout.lower().replace("_", "-").split("\n")
        installed = {line.partition("+")[0] for line in frozen if line.partition("==")[0] in names}
        assert installed <= pinned
        assert len(installed) > 30


def test_weights_are_baked_in_only_with_the_licence_accepted(worker_image: Image) -> None:
    command = next(run.argument for run in STAGES["worker"].all("RUN") if "download-weights" in run.argument)
    refused = worker_image.run(command, PROFILE="fast")
    assert refused.returncode != 0
    assert "LICENSE" in refused.stdout
    assert "--accept-licence" in refused.stderr


def test_the_images_serve_the_demo(
    worker_image: Image, shim: tuple[str, Container], bucket: BucketSettings, tmp_path: Path
) -> None:
    """The server starts as in its image, the worker as in compose.yaml."""
    address, _ = shim
    compose = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())
    worker = Container(
        worker_image,
        compose["services"]["worker"]["command"],
        tmp_path,
        HUNYUAN_PLATFORM_URL=address,
        HUNYUAN_PLATFORM_TOKEN=TOKEN,
        HUNYUAN_MODEL_PATH="demo",
        **bucket_environment(bucket),
    )
    try:
        with httpx.Client(base_url=address, timeout=60) as http:

            def ready() -> bool:
                worker.check()
                return http.get("/ready").status_code == 200

            eventually("a worker with its model", ready, START_SECONDS)
            request = {"prompt": "A paper boat on a rainy street", "duration": 5, "resolution": "720p"}
            task_id = http.post("/generate", json=request).json()["task_id"]

            def completed() -> bool:
                worker.check()
                answer = http.get(f"/status/{task_id}").json()
                assert answer["status"] != "failed", answer
                return bool(answer["status"] == "completed")

            eventually("the video", completed, RENDER_SECONDS)
            video = tmp_path / "video.mp4"
            video.write_bytes(http.get(f"/videos/{task_id}.mp4").content)
        shown = probe(video)
        assert (shown.codec, shown.width, shown.height, shown.num_frames) == ("h264", 1280, 720, 121)
    finally:
        assert worker.stop() == 0, worker.log.read_text()
