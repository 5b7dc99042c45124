"""The commands of docs/operations.md, run as they are printed, against real servers, stores and databases.

`pip install` does nothing. No server starts workers: the tests attach the worker with the scripted model.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest
from pydantic import HttpUrl, SecretStr

from storage.settings import BucketSettings
from tests.support.page_commands import ROOT, Terminal, block
from tests.support.postgres import Postgres
from tests.support.s3_servers import juicefs, rclone
from tests.support.service import eventually, free_port
from tests.support.worker_process import WorkerProcess, bucket_environment

PAGE = ROOT / "docs" / "operations.md"
SERVE = "exec hunyuan serve"
MOVE = "From the embedded bucket to your own"

pytestmark = pytest.mark.timeout(300)


def commands(heading: str, number: int = 0) -> str:
    return block(PAGE, heading, number)


EMBEDDED, NAMED = (commands("The bucket as a remote of rclone", number) for number in (0, 1))


class Machine(Terminal):
    """A machine with at most one server. `bucket` None: the embedded bucket."""

    def __init__(self, directory: Path, bucket: BucketSettings | None = None, **environment: str) -> None:
        self.address = f"http://127.0.0.1:{free_port()}"
        self.bucket = bucket
        self._data = directory / "data"
        self._http = httpx.Client(base_url=self.address, timeout=30)
        settings = {
            "HUNYUAN_HOST": "127.0.0.1",
            "HUNYUAN_PORT": self.address.rpartition(":")[2],
            "HUNYUAN_DATA_DIR": str(self._data),
            "HUNYUAN_WORKERS": "0",
            "HUNYUAN_MODEL_PATH": "demo",
        }
        super().__init__(directory, {**settings, **(bucket_environment(bucket) if bucket else {}), **environment})

    @property
    def queue(self) -> Path:
        return self._data / "queue.sqlite3"

    @contextmanager
    def serving(self, *blocks: str) -> Iterator[None]:
        with self.running(*(blocks or (SERVE,))):
            eventually("the server's first answer", lambda: self._get("/health") is not None, 60)
            yield

    @contextmanager
    def worker(self) -> Iterator[WorkerProcess]:
        """A ready worker."""
        token = (self._data / "platform-token").read_text().strip()
        bucket = self.bucket or self._embedded_bucket()
        worker = WorkerProcess(self.directory, bucket, platform=self.address, token=token)
        worker.start()
        try:
            eventually("a ready worker", lambda: self._health()["workers"]["ready"], 60)
            yield worker
        finally:
            worker.thaw()
            worker.kill()

    def generate(self) -> str:
        answer = self._http.post("/generate", json={"prompt": "A paper boat on a rainy street", "duration": 5})
        assert answer.status_code == 202, answer.text
        task_id: str = answer.json()["task_id"]
        return task_id

    def video(self, task_id: str) -> str:
        """Waits until the task is completed, and returns the sha256 of its video."""
        eventually("the task's end", lambda: self.status(task_id) != "processing", 90)
        assert self.status(task_id) == "completed"
        answer = eventually("the video", lambda: self._video(task_id), 30)
        assert answer.headers["Content-Type"] == "video/mp4"
        sha256 = hashlib.sha256(answer.content).hexdigest()
        assert answer.headers["ETag"] == f'"{sha256}"'
        return sha256

    def _video(self, task_id: str) -> httpx.Response | None:
        """None while the server's bucket starts."""
        answer = self._http.get(f"/videos/{task_id}.mp4")
        return None if answer.status_code == 503 else answer.raise_for_status()

    def status(self, task_id: str) -> str:
        status: str = self._http.get(f"/status/{task_id}").raise_for_status().json()["status"]
        return status

    def knows(self, task_id: str) -> bool:
        """Whether a server runs that has this task in its queue."""
        answer = self._get(f"/status/{task_id}")
        return answer is not None and answer.status_code == 200

    def one_completed_and_one_waiting(self) -> tuple[str, str, str]:
        """The completed task, the sha256 of its video, and a task that its worker does not render."""
        with self.worker() as worker:
            completed = self.generate()
            sha256 = self.video(completed)
            worker.freeze()
            waiting = self.generate()
            assert self.status(waiting) == "processing"
        return completed, sha256, waiting

    def check(self, completed: str, sha256: str, waiting: str) -> None:
        """The completed task has its video, and the waiting one is rendered."""
        assert self.video(completed) == sha256
        with self.worker():
            assert self.video(waiting) != sha256

    def _get(self, path: str) -> httpx.Response | None:
        try:
            return self._http.get(path)
        except httpx.TransportError:
            return None

    def _health(self) -> dict[str, dict[str, int]]:
        health: dict[str, dict[str, int]] = self._http.get("/health").json()
        return health

    def _embedded_bucket(self) -> BucketSettings:
        files = self._data / "bucket"
        return BucketSettings(
            endpoint_url=HttpUrl(f"http://127.0.0.1:{(files / 'port').read_text().strip()}"),
            access_key_id=(files / "access-key").read_text().strip(),
            secret_access_key=SecretStr((files / "secret-key").read_text().strip()),
        )


def new_bucket(settings: BucketSettings) -> dict[str, str]:
    """The variables of the page that name the bucket to move to."""
    return {name.replace("BUCKET_", "NEW_"): value for name, value in bucket_environment(settings).items()}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def stores(tmp_path: Path, stack: ExitStack) -> tuple[BucketSettings, BucketSettings]:
    """Two S3 servers of different makers, each with an empty bucket."""
    (tmp_path / "juicefs").mkdir()
    (tmp_path / "rclone").mkdir()
    return stack.enter_context(juicefs(tmp_path / "juicefs")), stack.enter_context(rclone(tmp_path / "rclone"))


@pytest.mark.full
def test_one_machine_is_restored_on_another_from_a_backup_made_while_the_server_ran(tmp_path: Path) -> None:
    old, new = Machine(tmp_path / "old"), Machine(tmp_path / "new")
    with old.serving():
        tasks = old.one_completed_and_one_waiting()
        old.type_in(commands("Backup"), EMBEDDED, commands("Backup", 2))
    backup = old.directory / "backup"
    assert backup.stat().st_mode & 0o077 == 0
    assert (backup / "queue.sqlite3").stat().st_mode & 0o077 == 0
    backup.rename(new.directory / "backup")
    heading = "One machine with the embedded bucket"
    with new.serving(commands(heading), EMBEDDED, commands(heading, 1), commands(heading, 2)):
        eventually("the restored queue", lambda: new.knows(tasks[2]), 60)
        new.check(*tasks)


@pytest.mark.full
def test_a_queue_in_postgresql_and_a_lost_bucket_are_restored(
    tmp_path: Path, postgres: Postgres, stores: tuple[BucketSettings, BucketSettings]
) -> None:
    programs = f"{postgres.programs}:"
    old = Machine(tmp_path / "old", stores[0], HUNYUAN_DATABASE_URL=postgres.create_database())
    new = Machine(tmp_path / "new", stores[1], HUNYUAN_DATABASE_URL=postgres.create_database())
    for machine in (old, new):
        machine.environment["PATH"] = programs + machine.environment["PATH"]
    with old.serving():
        tasks = old.one_completed_and_one_waiting()
        old.type_in(commands("Backup", 1), NAMED, commands("Backup", 2))
    (old.directory / "backup").rename(new.directory / "backup")
    heading = "PostgreSQL and a bucket of your own"
    new.type_in(NAMED, commands(heading))
    with new.serving(commands(heading, 1)):
        new.check(*tasks)


@pytest.mark.full
def test_videos_move_from_the_embedded_bucket_to_a_named_one(
    tmp_path: Path, stores: tuple[BucketSettings, BucketSettings]
) -> None:
    machine = Machine(tmp_path / "host", None, **new_bucket(stores[0]))
    both = EMBEDDED + commands(MOVE)
    with machine.serving():
        tasks = machine.one_completed_and_one_waiting()
        machine.type_in(both, commands(MOVE, 1))
    machine.bucket = stores[0]
    machine.type_in(both, commands(MOVE, 2))
    with machine.serving(commands(MOVE, 3)):
        machine.type_in(commands(MOVE, 4))
        machine.check(*tasks)


@pytest.mark.full
def test_videos_move_between_two_stores(tmp_path: Path, stores: tuple[BucketSettings, BucketSettings]) -> None:
    machine = Machine(tmp_path / "host", stores[0], **new_bucket(stores[1]))
    both = NAMED + commands(MOVE)
    with machine.serving():
        tasks = machine.one_completed_and_one_waiting()
        machine.type_in(both, commands(MOVE, 1))
    machine.type_in(both, commands("Between two stores"))
    machine.bucket = stores[1]
    with machine.serving(commands(MOVE, 3)):
        machine.check(*tasks)


@pytest.fixture
def migrated(tmp_path: Path, stores: tuple[BucketSettings, BucketSettings], database_url: str) -> Machine:
    """A machine whose queue is in SQLite, or in PostgreSQL."""
    if database_url.startswith("sqlite"):
        return Machine(tmp_path / "host", stores[0])
    return Machine(tmp_path / "host", stores[0], HUNYUAN_DATABASE_URL=database_url)


@pytest.mark.full
def test_a_downgrade_and_an_upgrade_keep_every_task(migrated: Machine) -> None:
    """The older release is this one, which upgrades the older tables again."""
    with migrated.serving():
        tasks = migrated.one_completed_and_one_waiting()
    migrated.type_in(commands("Downgrade"))
    assert revision(migrated) == "0001"
    with migrated.serving(commands("Upgrade")):
        assert revision(migrated) > "0001"
        migrated.check(*tasks)


@pytest.mark.full
def test_a_database_of_a_newer_release_stops_the_start_and_the_error_says_what_to_do(migrated: Machine) -> None:
    with migrated.serving():
        newest = revision(migrated)
    execute(migrated, "UPDATE alembic_version SET version_num = '9999'")
    done = migrated.attempt(SERVE)
    assert done.returncode == 2
    assert f"run `hunyuan downgrade-queue {newest}` with that release" in done.stdout


@pytest.mark.full
def test_a_running_server_and_an_unknown_revision_stop_a_downgrade(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "host")
    with machine.serving():
        done = machine.attempt(commands("Downgrade"))
        assert done.returncode == 2
        assert "another server is using" in done.stdout
    done = machine.attempt("hunyuan downgrade-queue 9999")
    assert done.returncode == 2
    assert "there is no revision 9999; this release knows 0001" in done.stdout


def revision(machine: Machine) -> str:
    return execute(machine, "SELECT version_num FROM alembic_version")


def execute(machine: Machine, statement: str) -> str:
    """Runs a statement in the queue's database; returns the first column of its first row."""
    url = machine.environment.get("HUNYUAN_DATABASE_URL")
    with psycopg.connect(url) if url else sqlite3.connect(machine.queue) as connection:
        cursor = connection.execute(statement)
        row = cursor.fetchone() if cursor.description else None
        return str(row[0]) if row else ""
