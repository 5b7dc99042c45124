"""Servers and workers on different machines: one PostgreSQL, one bucket, three loopback addresses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from storage.settings import BucketSettings
from tests.support.mp4 import probe
from tests.support.postgres import Postgres
from tests.support.s3_servers import new_bucket
from tests.support.service import Service, eventually

TOKEN = "a-token-of-the-tests"


def bucket_environment(bucket: BucketSettings) -> Mapping[str, str]:
    return {
        "BUCKET_ENDPOINT_URL": str(bucket.endpoint_url),
        "BUCKET_ACCESS_KEY_ID": bucket.access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": bucket.secret_access_key.get_secret_value(),
        "BUCKET_NAME": bucket.name,
    }


@contextmanager
def worker(platform: str, bucket: BucketSettings, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`hunyuan worker` with the demo model."""
    environment = {**os.environ, **bucket_environment(bucket), "HUNYUAN_MODEL_PATH": "demo"}
    command = [sys.executable, "-m", "hunyuan", "worker", "--platform", platform, "--token", TOKEN]
    with (directory / "worker.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def bucket(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, bucket: BucketSettings
) -> Iterator[tuple[Service, Service]]:
    """Two servers without workers."""
    url = postgres.create_database()
    made = [
        Service(
            tmp_path_factory.mktemp(f"server{number}"),
            HUNYUAN_HOST=host,
            HUNYUAN_DATABASE_URL=url,
            HUNYUAN_PLATFORM_TOKEN=TOKEN,
            HUNYUAN_WORKERS="0",
            **bucket_environment(bucket),
        )
        for number, host in enumerate(("127.0.0.1", "127.0.0.2"))
    ]
    for service in made:
        service.start(until_ready=False)
    yield made[0], made[1]
    for service in made:
        service.http.close()
        assert service.stop() == 0


@pytest.mark.full
def test_a_task_given_to_one_server_is_rendered_by_a_worker_of_the_other(
    servers: tuple[Service, Service], bucket: BucketSettings, tmp_path: Path
) -> None:
    here, there = servers
    assert here.http.get("/ready").json()["error_code"] == "MODEL_NOT_LOADED"
    with worker(there.address, bucket, tmp_path) as process:
        eventually("the worker's first report", lambda: here.http.get("/ready").status_code == 200, 120)
        task_id = here.generate(num_inference_steps=1)
        answer = there.finished(task_id)
        assert answer["status"] == "completed"
        video = tmp_path / "video.mp4"
        video.write_bytes(here.http.get(f"/videos/{task_id}.mp4").content)
        assert (probe(video).width, probe(video).height) == (1280, 720)

        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - asked < 10, "the server answers the long polls of a stopping worker at once"
    answer = here.http.get("/ready").json()
    assert answer["error_code"] == "MODEL_NOT_LOADED", "the worker reported that it stopped"


def test_a_worker_with_a_wrong_key_gets_unauthorized(servers: tuple[Service, Service]) -> None:
    response = httpx.get(f"{servers[0].address}/v2/local/job-take/w1", headers={"Authorization": "wrong"})
    assert (response.status_code, response.json()["error_code"]) == (401, "UNAUTHORIZED")


def test_a_worker_without_a_bucket_or_a_platform_names_the_setting(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BUCKET_", "HUNYUAN_"))}
    for arguments, variable in (
        ([], "HUNYUAN_PLATFORM_URL"),
        (["--platform", "http://127.0.0.1:9", "--token", "short"], "HUNYUAN_PLATFORM_TOKEN"),
        (["--platform", "http://127.0.0.1:9", "--token", TOKEN], "BUCKET_ENDPOINT_URL"),
    ):
        command = [sys.executable, "-m", "hunyuan", "worker", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert variable in done.stderr
        assert "Traceback" not in done.stderr


def test_a_database_that_can_not_be_used_stops_the_start_and_its_password_is_not_shown(tmp_path: Path) -> None:
    service = Service(tmp_path, HUNYUAN_DATABASE_URL="mysql://someone:very-secret@127.0.0.1/queue")
    with pytest.raises(AssertionError, match="HUNYUAN_DATABASE_URL: takes postgresql://"):
        service.start()
    assert "very-secret" not in service.log.read_text()
