"""`make images-check`: buildah builds both images, which run as their users and render the demo.

Takes 20 minutes, 20 GB of disk and root; pytest does not collect this file by itself. Registries of images are not
needed: a Debian that debootstrap makes stands for both base images, so Python is 3.11 and there is no CUDA runtime.
`IMAGES_CHECK_OPTIONS` adds options to `buildah build`, for example a volume with pip's configuration.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from storage.settings import BucketSettings
from tests.infra.offered import ROOT, STAGES
from tests.support.mp4 import probe
from tests.support.s3_servers import juicefs
from tests.support.service import RENDER_SECONDS, START_SECONDS, eventually, free_port

pytestmark = pytest.mark.timeout(5400)

PACKAGES = ("ca-certificates", "g++", "python3-dev", "python3-pip", "python3-venv")
TOKEN = "a-token-of-the-images"
USER = "10001"


class Buildah:
    """buildah with a storage of its own."""

    def __init__(self, directory: Path) -> None:
        self._options = ("--root", str(directory / "root"), "--runroot", str(directory / "run"))

    def command(self, *words: str | Path) -> list[str]:
        return ["buildah", *self._options, *map(str, words)]

    def __call__(self, *words: str | Path) -> str:
        done = subprocess.run(self.command(*words), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, f"buildah {words[0]} failed; its errors are above"
        return done.stdout.strip()


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Buildah:
    """With the base images of the Dockerfile in its storage, each a Debian."""
    for program in ("buildah", "debootstrap"):
        assert shutil.which(program), f"install Debian's package {program} first"
    directory = tmp_path_factory.mktemp("images")
    base = directory / "debian"
    include = f"--include={','.join(PACKAGES)}"
    subprocess.run(["debootstrap", "--variant=minbase", include, "bookworm", base], check=True)
    run = Buildah(directory)
    container = run("from", "scratch")
    run("add", "--quiet", container, base, "/")
    for name in {stage.base for stage in STAGES.values()} - set(STAGES):
        run("commit", "--quiet", container, name)
    run("rm", container)
    return run


@pytest.fixture(scope="module")
def images(buildah: Buildah) -> dict[str, str]:
    """A container of each image, by target."""
    extra = shlex.split(os.environ.get("IMAGES_CHECK_OPTIONS", ""))
    containers = {}
    for target in ("shim", "worker"):
        options = ("--pull-never", "--isolation=chroot", "--network=host", "--target", target, "--tag", target)
        buildah("build", *options, *extra, ".")
        containers[target] = buildah("from", "--pull-never", target)
    return containers


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The processes of a container, which get SIGTERM at the end."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for child in reversed(family):
            child.terminate()
        _, alive = psutil.wait_procs(family, 60)
        for child in alive:
            child.kill()
        process.kill()
        process.wait()
        assert not alive, log.read_text()


def in_container(buildah: Buildah, container: str, command: list[str], **environment: str) -> list[str]:
    options = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
    return buildah.command("run", "--isolation=chroot", "--network=host", *options, container, "--", *command)


def bucket_environment(bucket: BucketSettings) -> dict[str, str]:
    return {
        "BUCKET_ENDPOINT_URL": str(bucket.endpoint_url),
        "BUCKET_ACCESS_KEY_ID": bucket.access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": bucket.secret_access_key.get_secret_value(),
        "BUCKET_NAME": bucket.name,
    }


@pytest.mark.parametrize("target", ["shim", "worker"])
def test_an_image_runs_as_its_user(buildah: Buildah, images: dict[str, str], target: str) -> None:
    who = subprocess.run(
        in_container(buildah, images[target], ["id", "-u"]), capture_output=True, text=True, check=True
    )
    assert who.stdout.strip() == USER
    assert buildah("inspect", "--type", "image", "--format", "{{.OCIv1.Config.User}}", target) == f"{USER}:{USER}"


def test_the_images_render_the_demo(buildah: Buildah, images: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    common = {"HUNYUAN_PLATFORM_TOKEN": TOKEN}
    with juicefs(tmp_path / "bucket") as bucket:
        given = {**common, **bucket_environment(bucket)}
        server = in_container(
            buildah, images["shim"], STAGES["shim"].last("CMD").words, HUNYUAN_PORT=str(port), **given
        )
        worker = in_container(
            buildah,
            images["worker"],
            ["hunyuan", "worker"],
            HUNYUAN_PLATFORM_URL=address,
            HUNYUAN_MODEL_PATH="demo",
            **given,
        )
        with (
            running(server, tmp_path / "server.log") as first,
            running(worker, tmp_path / "worker.log") as second,
            httpx.Client(base_url=address, timeout=60) as http,
        ):

            def status(path: str) -> int:
                for process, name in ((first, "server"), (second, "worker")):
                    assert process.poll() is None, (tmp_path / f"{name}.log").read_text()
                try:
                    return http.get(path).status_code
                except httpx.TransportError:
                    return 0

            eventually("a worker with its model", lambda: status("/ready") == 200, 3 * START_SECONDS)
            request = {"prompt": "A paper boat on a rainy street", "duration": 5, "resolution": "720p"}
            task_id = http.post("/generate", json=request).json()["task_id"]
            eventually("the video", lambda: status(f"/videos/{task_id}.mp4") == 200, 3 * RENDER_SECONDS)
            video = tmp_path / "video.mp4"
            video.write_bytes(http.get(f"/videos/{task_id}.mp4").content)
    shown = probe(video)
    assert (shown.codec, shown.width, shown.height, shown.num_frames) == ("h264", 1280, 720, 121)
