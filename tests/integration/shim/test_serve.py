"""`hunyuan serve` and the other commands as processes: starting, refusing to start, streaming, exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest
from typer.testing import CliRunner, Result

from hunyuan.cli.main import app
from storage import layout
from storage.bucket import Bucket
from storage.errors import StorageError
from tests.support.full import full
from tests.support.postgres import Postgres
from tests.support.queues import result
from tests.support.service import Service, eventually, free_port, running_without_workers

MEGABYTE = 1_000_000


def hunyuan(*arguments: str, directory: Path | None = None, **environment: Any) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("BUCKET_", "RUNPOD_", "HUNYUAN_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "hunyuan", *arguments],
        env={**clean, **environment},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refused(**environment: str) -> Result:
    """`hunyuan serve` in this process, which has the imports already. It must not start."""
    ours = [name for name in os.environ if name.startswith(("BUCKET_", "RUNPOD_", "HUNYUAN_"))]
    settings = {"HUNYUAN_HOST": "127.0.0.1", "HUNYUAN_PORT": str(free_port())}
    run = CliRunner().invoke(app, ["serve"], env={**dict.fromkeys(ours), **settings, **environment})
    assert run.exit_code == 2, run.output
    assert isinstance(run.exception, SystemExit), "no traceback"
    return run


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The server with its bucket and no worker."""
    with running_without_workers(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="module")
def large(service: Service, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A task with a video of 200 MB in the bucket, and that video's sha256."""
    path = tmp_path_factory.mktemp("large") / "video.mp4"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(200):
            block = os.urandom(MEGABYTE)
            digest.update(block)
            file.write(block)
    bucket = Bucket(service.embedded_bucket())
    bucket.put_file(path, layout.video_key("large"), content_type="video/mp4")
    manifest = result("large").model_copy(update={"file_size": 200 * MEGABYTE, "sha256": digest.hexdigest()})
    body = manifest.model_dump_json().encode()
    bucket.put_bytes(body, layout.manifest_key("large"), content_type="application/json")
    path.unlink()
    return "large", digest.hexdigest()


def download(service: Service, task_id: str, pause: float = 0.0) -> str:
    digest = hashlib.sha256()
    with httpx.stream("GET", f"{service.address}/videos/{task_id}.mp4", timeout=60) as response:
        assert response.status_code == 200
        for chunk in response.iter_bytes(MEGABYTE):
            digest.update(chunk)
            time.sleep(pause)
    return digest.hexdigest()


@pytest.mark.full
@pytest.mark.parametrize("pause", [0.0, 0.01])
def test_200_mb_stream_through_with_less_than_30_mb_growth(
    service: Service, large: tuple[str, str], pause: float
) -> None:
    """Once at full speed; once with a slow client, whose unread bytes must not accumulate in the server."""
    task_id, sha256 = large
    download(service, task_id)  # the first download allocates memory that is never freed
    server = psutil.Process(service.process_id)
    before = peak = server.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, server.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert download(service, task_id, pause) == sha256
    finally:
        done.set()
        watcher.join()
    assert (peak - before) / MEGABYTE < 30


def test_an_interrupted_download_can_be_continued_with_curl(
    service: Service, large: tuple[str, str], tmp_path: Path
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    task_id, sha256 = large
    path = tmp_path / "video.mp4"
    with httpx.stream("GET", f"{service.address}/videos/{task_id}.mp4") as response, path.open("wb") as file:
        for chunk in response.iter_bytes(MEGABYTE):
            file.write(chunk)
            if file.tell() > 50 * MEGABYTE:
                break
    url = f"{service.address}/videos/{task_id}.mp4"
    subprocess.run(["curl", "--silent", "--fail", "-C", "-", "-o", str(path), url], check=True)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def test_a_client_that_disconnects_during_a_download_leaves_no_connection(
    service: Service, large: tuple[str, str]
) -> None:
    for _ in range(20):
        with httpx.stream("GET", f"{service.address}/videos/{large[0]}.mp4") as response:
            next(response.iter_bytes(1000))
    server = psutil.Process(service.process_id)
    eventually(
        "the close of the connections to the bucket",
        lambda: len([c for c in server.net_connections() if c.status == "ESTABLISHED"]) < 12,
        20,
    )
    assert service.http.get("/health").status_code == 200


# Starting


NAMED_INSTEAD = {"BUCKET_ACCESS_KEY_ID": "BUCKET_SECRET_ACCESS_KEY", "RUNPOD_ENDPOINT_ID": "RUNPOD_API_KEY"}


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HUNYUAN_PORT", "eighty"),
        ("HUNYUAN_PORT", "70000"),
        ("HUNYUAN_WORKERS", "-1"),
        ("HUNYUAN_WORKERS", "many"),
        ("HUNYUAN_MAX_QUEUE_SIZE", "0"),
        ("HUNYUAN_PUBLIC_URL", "not a url"),
        ("RUNPOD_ENDPOINT_ID", "alone"),
        ("HUNYUAN_WEBHOOK_SECRET", "a-secret-without-its-prefix-0123456789"),
        ("HUNYUAN_WEBHOOK_SECRET", "whsec_c2hvcnQ="),
        ("HUNYUAN_WEBHOOK_SECRET", "whsec_not in base64 not in base64 !!!!"),
        ("HUNYUAN_WEBHOOK_URL", "https://receiver.example/without-a-secret"),
        ("HUNYUAN_WEBHOOK_URL", "ftp://receiver.example/"),
        ("HUNYUAN_WEBHOOK_TIMEOUT", "0"),
        ("HUNYUAN_WEBHOOK_RETRIES", "5,soon"),
    ],
)
def test_a_bad_setting_of_the_server_stops_the_start_and_is_named(tmp_path: Path, variable: str, value: str) -> None:
    """Settings are read before anything is started."""
    run = refused(**{"HUNYUAN_DATA_DIR": str(tmp_path / "data"), variable: value})
    assert NAMED_INSTEAD.get(variable, variable) in run.stderr
    assert value not in run.stderr or "SECRET" not in variable
    assert list(tmp_path.iterdir()) == [], "nothing was started"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HUNYUAN_HOST", "no.such.host.invalid"),
        ("HUNYUAN_DATA_DIR", "/proc/nowhere"),
        ("BUCKET_ENDPOINT_URL", "not a url"),
        ("BUCKET_ACCESS_KEY_ID", "alone"),
    ],
)
def test_a_bad_setting_stops_the_start_and_is_named(tmp_path: Path, variable: str, value: str) -> None:
    run = refused(**{"HUNYUAN_DATA_DIR": str(tmp_path), variable: value})
    assert NAMED_INSTEAD.get(variable, variable) in run.stderr


def test_a_process_that_refuses_to_start_shows_no_traceback(tmp_path: Path) -> None:
    run = hunyuan("serve", HUNYUAN_DATA_DIR=str(tmp_path), HUNYUAN_WORKERS="many")
    assert run.returncode == 2, run.stderr
    assert "HUNYUAN_WORKERS" in run.stderr
    assert "Traceback" not in run.stderr


def test_bad_settings_of_the_worker_stop_the_server_and_are_named(tmp_path: Path) -> None:
    variables = ("HUNYUAN_OFFLOAD_CPU", "HUNYUAN_ENABLE_FLASH_ATTN", "HUNYUAN_ENABLE_SAGE_ATTN")
    environment: dict[str, Any] = {
        "HUNYUAN_HOST": "127.0.0.1",
        "HUNYUAN_PORT": str(free_port()),
        "HUNYUAN_DATA_DIR": str(tmp_path),
        **dict.fromkeys(variables, "perhaps"),
    }
    run = hunyuan("serve", **environment)
    assert run.returncode == 2, run.stderr
    for variable in variables:
        assert f"{variable}: " in run.stderr
    assert "Traceback" not in run.stderr


def test_a_taken_port_and_a_used_directory_are_named(service: Service, tmp_path: Path) -> None:
    assert "HUNYUAN_PORT" in refused(HUNYUAN_PORT=str(service.port), HUNYUAN_DATA_DIR=str(tmp_path)).stderr
    assert "HUNYUAN_DATA_DIR" in refused(HUNYUAN_DATA_DIR=str(service.directory / "data")).stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        full("BUCKET_ACCESS_KEY_ID", "wrong"),
        ("BUCKET_SECRET_ACCESS_KEY", "also-wrong-and-secret"),
        full("BUCKET_NAME", "no-such-bucket"),
    ],
)
def test_a_bucket_that_denies_access_stops_the_start_and_names_the_setting(
    service: Service, tmp_path: Path, variable: str, value: str
) -> None:
    kept = service.directory / "data" / "bucket"
    environment = {
        "HUNYUAN_DATA_DIR": str(tmp_path),
        "BUCKET_ENDPOINT_URL": f"http://127.0.0.1:{(kept / 'port').read_text()}",
        "BUCKET_ACCESS_KEY_ID": (kept / "access-key").read_text(),
        "BUCKET_SECRET_ACCESS_KEY": (kept / "secret-key").read_text(),
    }
    run = refused(**{**environment, variable: value})
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: bucket")
    assert variable in last
    assert "also-wrong-and-secret" not in run.stderr


def test_a_bucket_that_does_not_answer_does_not_stop_the_start_and_is_named(tmp_path: Path) -> None:
    service = Service(
        tmp_path,
        HUNYUAN_WORKERS="0",
        BUCKET_ENDPOINT_URL="http://127.0.0.1:9",
        BUCKET_ACCESS_KEY_ID="key",
        BUCKET_SECRET_ACCESS_KEY="secret",
    )
    try:
        service.start(until_ready=False)
        assert "the bucket does not answer; starting without it" in service.log.read_text()
        assert "BUCKET_ENDPOINT_URL" in service.log.read_text()
        assert service.http.get("/ready").status_code == 503
    finally:
        service.http.close()
        assert service.stop() == 0


@pytest.mark.full
def test_a_database_that_does_not_answer_during_the_start_is_retried(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.create_database()
    impatient = f"{url}?options=-c%20lock_timeout%3D500ms"
    service = Service(tmp_path, HUNYUAN_WORKERS="0", HUNYUAN_DATABASE_URL=impatient)
    try:
        service.start(until_ready=False)  # the tables are made
        service.stop()
        with psycopg.connect(url) as connection:
            connection.execute("LOCK TABLE jobs")
            service.launch()
            retry = "a query of the queue's database (HUNYUAN_DATABASE_URL) failed, retrying in"
            eventually("two retries", lambda: service.log.read_text().count(retry) > 1, 60)
        eventually("the start", lambda: service.http.get("/health").status_code == 200, 60)
    finally:
        service.http.close()
        assert service.stop() == 0, service.log.read_text()


@pytest.mark.full
def test_a_model_that_can_not_be_loaded_and_variables_that_do_not_exist_are_reported(tmp_path: Path) -> None:
    """Server and worker warn of a variable and name the nearest one."""
    service = Service(
        tmp_path, HUNYUAN_MODEL_PATH=str(tmp_path / "absent"), HUNYUAN_WORKERS_="2", HUNYUAN_COLOUR="secret-value"
    )
    try:
        service.start(until_ready=False)

        def reason() -> dict[str, Any] | None:
            response = service.http.post("/generate", json={"prompt": "A paper boat on a rainy street"})
            assert response.status_code == 503
            body: dict[str, Any] = response.json()
            assert body["error_code"] == "MODEL_NOT_LOADED"
            return body if "HUNYUAN_MODEL_PATH" in body["error"] else None

        eventually("the reason of the failed load", reason, 60)
        health = service.http.get("/health").json()
        assert (health["status"], health["model_loaded"]) == ("healthy", False)
        assert service.http.get("/ready").status_code == 503
        log = service.log.read_text()
        for program in ("shim.host.serve", "__main__"):
            assert (
                f"WARNING {program}: HUNYUAN_WORKERS_ is set, and no setting has that name, so it changes nothing: did "
                "you mean HUNYUAN_WORKERS?"
            ) in log
        assert "HUNYUAN_COLOUR is set" in log
        assert "secret-value" not in log
        assert "HUNYUAN_PORT is set" not in log
    finally:
        service.http.close()
        assert service.stop() == 0


@pytest.mark.full
def test_the_server_answers_while_its_bucket_starts_and_uses_it_after_that(tmp_path: Path) -> None:
    """A lock on the gateway's metadata holds its start back."""
    service = Service(tmp_path, HUNYUAN_WORKERS="0")
    try:
        service.start(until_ready=False)
        service.stop()
        with closing(sqlite3.connect(tmp_path / "data" / "bucket" / "meta.db", isolation_level=None)) as metadata:
            metadata.execute("PRAGMA locking_mode = EXCLUSIVE")
            metadata.execute("BEGIN EXCLUSIVE")
            service.launch()
            eventually("an answer", lambda: reachable(service), 60)
            assert not bucket_answers(service)
            assert service.http.get("/status/unknown").json()["error_code"] == "STORAGE_UNAVAILABLE"
        eventually("the bucket", lambda: bucket_answers(service), 60)
        assert service.http.get("/status/unknown").json()["error_code"] == "TASK_NOT_FOUND"
    finally:
        service.http.close()
        assert service.stop() == 0, service.log.read_text()


def reachable(service: Service) -> bool:
    try:
        return service.http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def bucket_answers(service: Service) -> bool:
    try:
        Bucket(service.embedded_bucket(), attempts=1).check()
    except StorageError:
        return False
    return True


# The other commands


def test_commands_report_errors_by_their_exit_code(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here: dict[str, Any] = {"HUNYUAN_SERVER": service.address}
    health = hunyuan("health", "--json", **here)
    assert health.returncode == 5, "no worker, no model"
    assert json.loads(health.stdout)["model_loaded"] is False
    refused = hunyuan("generate", "A paper boat on a rainy street", directory=tmp_path, **here)
    assert (refused.returncode, "MODEL_NOT_LOADED" in refused.stderr) == (5, True)

    monkeypatch.chdir(tmp_path)
    for command in ("status", "download", "cancel"):
        missing = CliRunner().invoke(app, [command, "no-such-task"], env=here)
        assert (missing.exit_code, "TASK_NOT_FOUND" in missing.stderr) == (4, True)
    unreachable = CliRunner().invoke(app, ["health"], env={"HUNYUAN_SERVER": f"http://127.0.0.1:{free_port()}"})
    assert (unreachable.exit_code, "hunyuan serve" in unreachable.stderr) == (3, True)
    wrong: list[str]
    for wrong in (["generate"], ["no-such-command"], ["generate", "a prompt of words", "--resolution", "4k"]):
        assert CliRunner().invoke(app, wrong, env=here).exit_code == 2
    bad_server = CliRunner().invoke(app, ["health"], env={"HUNYUAN_SERVER": "not a url"})
    assert (bad_server.exit_code, "HUNYUAN_SERVER" in bad_server.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == [], "no partial file is left"


def test_a_finished_task_can_be_shown_and_saved(service: Service, large: tuple[str, str], tmp_path: Path) -> None:
    task_id, sha256 = large
    here: dict[str, Any] = {"HUNYUAN_SERVER": service.address}
    status = hunyuan("status", task_id, "--json", **here)
    assert (status.returncode, json.loads(status.stdout)["status"]) == (0, "completed")
    saved = hunyuan("download", task_id, "--json", directory=tmp_path, **here)
    assert saved.returncode == 0, saved.stderr
    assert json.loads(saved.stdout) == {"task_id": task_id, "output": f"{task_id}.mp4", "file_size": 200 * MEGABYTE}
    assert hashlib.sha256((tmp_path / f"{task_id}.mp4").read_bytes()).hexdigest() == sha256
    unwritable = hunyuan("download", task_id, "--output", "/proc/x.mp4", **here)
    assert unwritable.returncode == 1
    assert "Traceback" not in unwritable.stderr


def test_help_names_every_command() -> None:
    text = hunyuan("--help").stdout
    for command in ("serve", "worker", "generate", "status", "cancel", "download", "health", "demo"):
        assert command in text


@pytest.mark.parametrize("keys", [{}, full({"HUNYUAN_API_KEYS": "a-key-of-16-characters"})], ids=["open", "keys"])
def test_the_start_warns_of_a_server_that_is_open_to_all(tmp_path: Path, keys: dict[str, str]) -> None:
    service = Service(tmp_path, HUNYUAN_HOST="0.0.0.0", HUNYUAN_WORKERS="0", **keys)
    try:
        service.start(until_ready=False)
        warned = "WARNING shim.host.serve: listening on all addresses of this machine without an API key"
        assert (warned in service.log.read_text()) == (not keys)
    finally:
        service.http.close()
        service.stop()
