"""The files that `hunyuan serve` keeps, as a power cut may leave them, and the ports that its bucket opens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from hunyuan.cli.main import app
from shim.api.platform import Platform
from shim.queue.sql import SqlQueue
from storage.bucket import Bucket
from tests.support.queues import sql_bench
from tests.support.service import Service, eventually

FILES = ("instance", "platform-token", "bucket/access-key", "bucket/secret-key", "bucket/port")


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


#: What may stand at a file's path after a power cut, or after a wrong restore.
DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "only a line break": lambda path: path.write_bytes(b"\n"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "truncated": lambda path: path.write_text("" if path.name == "port" else path.read_text()[:-1]),
    "too long": lambda path: path.write_text(path.read_text() * 2),
    "garbage": lambda path: path.write_bytes(b"\xff\x00 \xc3(" * 5),
    "a directory": lambda path: replace(path, Path.mkdir),
    "unreadable": lambda path: replace(path, lambda at: at.symlink_to(at)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a server that was started once."""
    service = Service(tmp_path_factory.mktemp("first"), HUNYUAN_WORKERS="0")
    service.start(until_ready=False)
    service.http.close()
    assert service.stop() == 0, service.log.read_text()
    return service.directory / "data"


def start(directory: Path) -> Result:
    """Starts a server over these files, which must not start. In this process, which has the imports already."""
    ours = [name for name in os.environ if name.startswith(("BUCKET_", "RUNPOD_", "HUNYUAN_"))]
    settings = {"HUNYUAN_HOST": "127.0.0.1", "HUNYUAN_PORT": "0", "HUNYUAN_DATA_DIR": str(directory)}
    return CliRunner().invoke(app, ["serve"], env={**dict.fromkeys(ours), **settings, "HUNYUAN_WORKERS": "0"})


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_stops_the_start_with_its_path_and_what_to_do(files: Path, damage: str) -> None:
    """One start for each file. The restored files serve the next test."""
    for name in FILES:
        path = files / name
        good = path.read_text()
        DAMAGE[damage](path)
        try:
            run = start(files)
        finally:
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_text(good)
        assert run.exit_code == 2, (name, run.output)
        assert isinstance(run.exception, SystemExit), "no traceback"
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith(f"error: {path} ")
        assert "delete it: the next start creates a new one" in last
        if name != "bucket/port" and len(good) > 1:
            assert good not in run.stderr


@pytest.mark.full
def test_a_server_starts_with_new_files_after_the_old_ones_are_deleted_and_keeps_its_videos(tmp_path: Path) -> None:
    service = Service(tmp_path, HUNYUAN_WORKERS="0")
    try:
        service.start(until_ready=False)
        Bucket(service.embedded_bucket()).put_bytes(b"kept", "videos/a.mp4", content_type="video/mp4")
        service.stop()
        old = {name: (tmp_path / "data" / name).read_text() for name in FILES}
        for name in FILES:
            (tmp_path / "data" / name).unlink()
        service.start(until_ready=False)
        for name in ("platform-token", "bucket/access-key", "bucket/secret-key"):
            assert (tmp_path / "data" / name).read_text() != old[name]
        assert Bucket(service.embedded_bucket()).get_bytes("videos/a.mp4") == b"kept"
        for name in FILES:
            assert (tmp_path / "data" / name).stat().st_mode & 0o777 == 0o600
        assert list((tmp_path / "data").rglob("*.new")) == []
    finally:
        service.http.close()
        assert service.stop() == 0, service.log.read_text()


@pytest.mark.anyio
@pytest.mark.parametrize("token", ["", " ", "\n"])
async def test_the_platform_accepts_no_empty_token(tmp_path: Path, token: str) -> None:
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench:
        assert isinstance(bench.queue, SqlQueue)
        with pytest.raises(ValueError, match="token is empty"):
            Platform(bench.queue, bench.dispatcher, bench.outbox, endpoint_id="local", token=token)


def test_the_gateway_listens_on_one_port_only(tmp_path: Path) -> None:
    service = Service(tmp_path, HUNYUAN_WORKERS="0")
    try:
        service.start(until_ready=False)

        def gateway() -> psutil.Process | None:
            return next((process for process in service.descendants() if process.name() == "juicefs"), None)

        process = eventually("the gateway", gateway)
        # Its other listeners would open before the one for S3, which has answered the server.
        listening = [c.laddr for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
        port = int((tmp_path / "data" / "bucket" / "port").read_text())
        assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", port)]
    finally:
        service.http.close()
        assert service.stop() == 0, service.log.read_text()
