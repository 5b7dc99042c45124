"""A server that lives as long as one demonstration: own port, own data, the demo model."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from contract.job import DEMO_MODEL
from hunyuan.client import Client
from shim.settings import child_environment

_START: Final = 120.0
_STOP: Final = 30.0


class DemoError(Exception):
    """The server did not come up; the message ends with its own output."""


@contextmanager
def running() -> Iterator[str]:
    """The address of a server with the demo model, ready for tasks; stopped, and its data removed, at the end.

    Raises:
        DemoError: it is not ready within two minutes.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="hunyuan-demo-") as directory:
        environment = child_environment(
            HUNYUAN_HOST="127.0.0.1",
            HUNYUAN_PORT=str(port),
            HUNYUAN_DATA_DIR=directory,
            HUNYUAN_MODEL_PATH=DEMO_MODEL,
            HUNYUAN_WORKERS="1",
            HUNYUAN_PUBLIC_URL="",
            HUNYUAN_API_KEYS="",
            HUNYUAN_RATE_LIMIT="",
            BUCKET_ENDPOINT_URL="",
            BUCKET_ACCESS_KEY_ID="",
            BUCKET_SECRET_ACCESS_KEY="",  # nosec B106 # none
            RUNPOD_ENDPOINT_ID="",
        )
        log = Path(directory, "serve.log")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "hunyuan", "serve"], env=environment, stdout=file, stderr=file
            )
        try:
            _wait_until_ready(process, address, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + _START
    with Client(address) as client:
        while not client.ready():
            if process.poll() is not None:
                raise DemoError(f"the server ended with code {process.returncode}:\n{log.read_text()}")
            if time.monotonic() > deadline:
                raise DemoError(f"the server was not ready in time:\n{log.read_text()}")
            time.sleep(0.2)
