"""The embedded bucket: an S3 gateway over a folder of this machine."""

import asyncio
import secrets
import shutil
import socket
import sysconfig
from pathlib import Path
from typing import Final

from pydantic import HttpUrl, SecretStr

from shim.host.errors import StartError
from shim.host.secret_file import read_checked, secret_file, write_durably
from shim.host.supervisor import Launch
from storage.settings import BucketSettings

_START_SECONDS: Final = 30.0
#: 1 to 65535.
_PORT: Final = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
_ACCESS_KEY: Final = "[0-9a-f]{16}"
_SECRET_KEY: Final = "[0-9a-f]{48}"  # noqa: S105 - its form


class EmbeddedBucket:
    """The S3 gateway that serves a folder: `juicefs gateway`, MinIO's S3 front over local files.

    Source: https://juicefs.com/docs/community/guide/gateway. It listens on loopback only. Its keys and its port are
    chosen once and stored beside the data, so presigned URLs survive a restart.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._log = directory / "gateway.log"
        self._metadata_url = f"sqlite3://{directory}/meta.db"
        self._program = _find_program("juicefs")
        directory.mkdir(parents=True, exist_ok=True)
        self._access_key = secret_file(directory / "access-key", lambda: secrets.token_hex(8), form=_ACCESS_KEY)
        self._secret_key = secret_file(directory / "secret-key", lambda: secrets.token_hex(24), form=_SECRET_KEY)
        self._port = _choose_port(directory / "port")

    @property
    def settings(self) -> BucketSettings:
        """How the server reaches the bucket."""
        return _settings(self._port, self._access_key, self._secret_key, self._directory)

    def environment(self) -> dict[str, str]:
        """How a worker reaches the bucket: the variables of BucketSettings."""
        return {
            "BUCKET_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "BUCKET_ACCESS_KEY_ID": self._access_key,
            "BUCKET_SECRET_ACCESS_KEY": self._secret_key,
            "BUCKET_NAME": self.settings.name,
            "BUCKET_SYNC_DIRECTORY": str(self._directory),
        }

    async def format(self) -> None:
        """Creates the volume; does nothing when it exists.

        Raises:
            StartError: the folder can't be used.
        """
        process = await asyncio.create_subprocess_exec(
            *(self._program, "format", "--storage", "file", "--bucket", f"{self._directory}/objects/"),
            *("--trash-days", "0", "--no-update", self._metadata_url, "videos"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
        if process.returncode:
            raise StartError(
                f"HUNYUAN_DATA_DIR: `juicefs format` can't use {self._directory} for the embedded bucket:\n"
                f"{errors.decode()[-2000:]}"
            )

    async def launch(self) -> Launch:
        """The command that serves the bucket."""
        flags = ("--multi-buckets", "--keep-etag", "--object-meta", "--no-banner", "--backup-meta", "0")
        # Without these, and --no-agent, the gateway opens two more ports without a key: for profiles and for metrics.
        # No option closes the second one. It stays closed if its port is no port; the gateway's log then has an error.
        closed = ("--no-usage-report", "--metrics=127.0.0.1:closed")
        cache = ("--cache-dir", f"{self._directory}/cache", "--cache-size", "0", "--log", str(self._log))
        address = f"127.0.0.1:{self._port}"
        return Launch(
            command=(self._program, "--no-agent", "gateway", *flags, *closed, *cache, self._metadata_url, address),
            environment={"MINIO_ROOT_USER": self._access_key, "MINIO_ROOT_PASSWORD": self._secret_key},
            output=self._log,
        )

    async def wait_until_listening(self) -> None:
        """Returns when the gateway accepts connections.

        Raises:
            StartError: it does not within half a minute.
        """
        try:
            async with asyncio.timeout(_START_SECONDS):
                while True:
                    try:
                        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                    except OSError:
                        await asyncio.sleep(0.05)
                    else:
                        writer.close()
                        return await writer.wait_closed()
        except TimeoutError as exc:
            raise StartError(
                f"the embedded S3 gateway accepted no connection within {_START_SECONDS:.0f} s; its log is {self._log}"
            ) from exc


def running_gateway(directory: Path) -> BucketSettings:
    """How to reach the embedded bucket of the server that is using `directory` now.

    Raises:
        StartError: that server has no embedded bucket, or one of its files is damaged.
    """
    port = read_checked(directory / "port", form=_PORT)
    access_key = read_checked(directory / "access-key", form=_ACCESS_KEY)
    secret_key = read_checked(directory / "secret-key", form=_SECRET_KEY)
    if port is None or access_key is None or secret_key is None:
        raise StartError(f"BUCKET_ENDPOINT_URL is not set, and {directory} is no embedded bucket: set BUCKET_*")
    return _settings(int(port), access_key, secret_key, directory)


def _settings(port: int, access_key: str, secret_key: str, directory: Path) -> BucketSettings:
    return BucketSettings(
        endpoint_url=HttpUrl(f"http://127.0.0.1:{port}"),
        access_key_id=access_key,
        secret_access_key=SecretStr(secret_key),
        sync_directory=directory,
    )


def _find_program(name: str) -> str:
    """The path of a program that one of our packages or the machine has installed."""
    ours = Path(sysconfig.get_path("scripts")) / name
    found = str(ours) if ours.exists() else shutil.which(name)
    if found is None:
        raise StartError(
            f"{name} is not installed: install hunyuan-video-service[local], or set BUCKET_ENDPOINT_URL to a bucket"
        )
    return found


def _choose_port(path: Path) -> int:
    """The port in `path` if it is free, else another free one on loopback; written to `path`.

    Raises:
        StartError: the file is damaged.
    """
    stored = int(read_checked(path, form=_PORT) or 0)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", stored))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    if port != stored:
        write_durably(path, str(port))
    return port
