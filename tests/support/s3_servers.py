"""Real S3 servers on loopback, each running until its block ends."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pydantic import HttpUrl, SecretStr

from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.fault_proxy import FaultProxy

SCRIPTS = Path(sysconfig.get_path("scripts"))
START_SECONDS = 30.0


@contextmanager
def juicefs(directory: Path, settings: BucketSettings | None = None) -> Iterator[BucketSettings]:
    """The gateway that `hunyuan serve` embeds: MinIO's S3 front on a folder. Checks signatures and expiry."""
    metadata = f"sqlite3://{directory}/meta.db"
    objects = f"{directory}/objects/"
    program = str(SCRIPTS / "juicefs")
    subprocess.run(
        [program, "format", "--storage", "file", "--bucket", objects, "--trash-days", "0", metadata, "videos"],
        check=True,
        capture_output=True,
    )
    settings = settings or _settings()
    keys = {
        "MINIO_ROOT_USER": settings.access_key_id,
        "MINIO_ROOT_PASSWORD": settings.secret_access_key.get_secret_value(),
    }
    flags = (
        "--multi-buckets",
        "--keep-etag",
        "--object-meta",
        "--no-banner",
        "--cache-size",
        "0",
        "--backup-meta",
        "0",
    )
    command = [program, "gateway", *flags, "--log", f"{directory}/gateway.log", metadata, _address(settings)]
    with _running(command, keys, directory, settings):
        yield settings


@contextmanager
def rclone(directory: Path) -> Iterator[BucketSettings]:
    """`rclone serve s3` on a folder: another implementation, which checks signatures too."""
    settings = _settings()
    keys = f"{settings.access_key_id},{settings.secret_access_key.get_secret_value()}"
    root = directory / "root"
    root.mkdir()
    command = [str(SCRIPTS / "rclone"), "serve", "s3", "--addr", _address(settings), "--auth-key", keys, str(root)]
    with _running(command, {"RCLONE_CONFIG": str(directory / "rclone.conf")}, directory, settings):
        yield settings


@contextmanager
def moto(directory: Path) -> Iterator[BucketSettings]:
    """moto's server: close to AWS in behaviour, but it accepts any signature, so it proves nothing about security."""
    settings = _settings()
    endpoint = settings.endpoint_url
    command = [str(SCRIPTS / "moto_server"), "--host", str(endpoint.host), "--port", str(endpoint.port)]
    with _running(command, {}, directory, settings):
        yield settings


#: Each takes an empty directory and yields the settings of a bucket that exists.
S3_SERVERS: dict[str, Callable[[Path], AbstractContextManager[BucketSettings]]] = {
    "juicefs": juicefs,
    "rclone": rclone,
    "moto": moto,
}


def behind(settings: BucketSettings) -> FaultProxy:
    """A proxy in front of that server. Clients sign for the proxy's address, which the proxy passes on unchanged."""
    return FaultProxy((str(settings.endpoint_url.host), settings.endpoint_url.port or 80), http=True)


def _settings() -> BucketSettings:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return BucketSettings(
        endpoint_url=HttpUrl(f"http://127.0.0.1:{port}"),
        access_key_id=secrets.token_hex(8),
        secret_access_key=SecretStr(secrets.token_hex(16)),
        name="test-videos",
    )


def _address(settings: BucketSettings) -> str:
    return f"{settings.endpoint_url.host}:{settings.endpoint_url.port}"


@contextmanager
def _running(
    command: Sequence[str], environment: dict[str, str], directory: Path, settings: BucketSettings
) -> Iterator[None]:
    """Run the server until the block ends. The bucket exists when the block begins."""
    log_file = directory / "server.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(settings):
            assert process.poll() is None, log_file.read_text()
            assert time.monotonic() < deadline, log_file.read_text()
            time.sleep(0.02)
        bucket = Bucket(settings)
        bucket.create()
        yield
    finally:
        process.terminate()
        process.wait(20)


def _listens(settings: BucketSettings) -> bool:
    try:
        with socket.create_connection((str(settings.endpoint_url.host), settings.endpoint_url.port or 80), timeout=1):
            return True
    except OSError:
        return False
