"""A temporary server with the demo model, its own port and its own data directory."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hunyuan.client import Client
from hunyuan.settings import demo_environment

_START: Final = 120.0
_STOP: Final = 30.0


class DemoError(Exception):
    """The server did not start; the message ends with the server's log."""


@contextmanager
def running() -> Iterator[str]:
    """The address of a server that accepts tasks. When the block ends it is stopped and its data is deleted.

    Raises:
        DemoError: the server exited, or was not ready within two minutes.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="hunyuan-demo-") as directory:
        log = Path(directory, "serve.log")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "hunyuan", "serve"],
                env=demo_environment(port, directory),
                stdout=file,
                stderr=file,
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
                raise DemoError(f"the server exited with code {process.returncode}; its log:\n{log.read_text()}")
            if time.monotonic() > deadline:
                raise DemoError(f"the server was not ready within {_START:.0f} s; its log:\n{log.read_text()}")
            time.sleep(0.2)
