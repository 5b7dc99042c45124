"""Real S3 servers on loopback, each running until its block ends."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

from pydantic import HttpUrl, SecretStr

from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.fault_proxy import FaultProxy

SCRIPTS = Path(sysconfig.get_path("scripts"))
START_SECONDS = 60.0


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


@contextmanager
def seaweedfs(directory: Path, settings: BucketSettings | None = None) -> Iterator[BucketSettings]:
    """SeaweedFS as docs/deploy-on-prem.md starts it. The settings have a key for their bucket alone."""
    settings = settings or _settings()
    administrator = settings.model_copy(
        update={"access_key_id": secrets.token_hex(8), "secret_access_key": SecretStr(secrets.token_hex(16))}
    )
    (directory / "s3.json").write_text(json.dumps(seaweedfs_identities(administrator, settings)))
    (directory / "data").mkdir()
    command = [str(SCRIPTS / "weed"), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={directory}/data"]
    command += [f"-s3.ip.bind={settings.endpoint_url.host}", f"-s3.port={settings.endpoint_url.port}"]
    command += [f"-s3.config={directory}/s3.json", *SEAWEEDFS_OPTIONS, "-master.electionTimeout=1s"]
    others = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    command += [f"-{option}={_free_port()}" for option in (*others, "s3.port.grpc")]
    with _running(command, {}, directory, administrator, stop=signal.SIGKILL):  # after SIGTERM it waits for 15 s
        yield settings


#: The options that docs/deploy-on-prem.md passes besides addresses and paths.
SEAWEEDFS_OPTIONS = (
    *("-volume.max=0", "-master.volumeSizeLimitMB=1024", "-master.telemetry=false"),
    *("-filer", "-s3", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
)


def seaweedfs_identities(administrator: BucketSettings, scoped: BucketSettings) -> dict[str, object]:
    """The configuration that names both keys. The second one reads and writes objects of its bucket alone."""

    def identity(name: str, keys: BucketSettings, actions: list[str]) -> dict[str, object]:
        secret = keys.secret_access_key.get_secret_value()
        credentials = [{"accessKey": keys.access_key_id, "secretKey": secret}]
        return {"name": name, "credentials": credentials, "actions": actions}

    own = [f"{action}:{scoped.name}" for action in ("Read", "Write", "List")]
    return {
        "identities": [identity("administrator", administrator, ["Admin"]), identity("hunyuan", scoped, own)],
    }


#: Each takes an empty directory and yields the settings of a bucket that exists.
S3_SERVERS: dict[str, Callable[[Path], AbstractContextManager[BucketSettings]]] = {
    "juicefs": juicefs,
    "rclone": rclone,
    "moto": moto,
    "seaweedfs": seaweedfs,
}


def new_bucket(server: BucketSettings) -> BucketSettings:
    """The settings of an empty bucket on a server that others use, too."""
    settings = server.model_copy(update={"name": f"test-{secrets.token_hex(8)}"})
    Bucket(settings).create()
    return settings


@cache
def client_of(settings: BucketSettings) -> Bucket:
    """One client for each bucket: many threads and tests may use it, and making one takes longer than a request."""
    return Bucket(settings)


def behind(settings: BucketSettings) -> FaultProxy:
    """A proxy in front of that server. Clients sign for the proxy's address, which the proxy passes on unchanged."""
    return FaultProxy((str(settings.endpoint_url.host), settings.endpoint_url.port or 80), http=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _settings() -> BucketSettings:
    return BucketSettings(
        endpoint_url=HttpUrl(f"http://127.0.0.1:{_free_port()}"),
        access_key_id=secrets.token_hex(8),
        secret_access_key=SecretStr(secrets.token_hex(16)),
        name="test-videos",
    )


def _address(settings: BucketSettings) -> str:
    return f"{settings.endpoint_url.host}:{settings.endpoint_url.port}"


@contextmanager
def _running(
    command: Sequence[str],
    environment: dict[str, str],
    directory: Path,
    settings: BucketSettings,
    stop: signal.Signals = signal.SIGTERM,
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
        process.send_signal(stop)
        process.wait(20)


def _listens(settings: BucketSettings) -> bool:
    try:
        with socket.create_connection((str(settings.endpoint_url.host), settings.endpoint_url.port or 80), timeout=1):
            return True
    except OSError:
        return False
