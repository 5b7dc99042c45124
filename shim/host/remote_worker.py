"""`hunyuan worker`: a worker on this machine for a server on another."""

import os
import secrets
import socket
import sys
from typing import Any, NoReturn

from contract.worker_environment import ENDPOINT_ID, worker_environment
from shim.host.errors import StartError, settings_errors
from shim.settings import RemoteWorkerSettings, child_environment
from storage.settings import bucket_settings


def main(**overrides: Any) -> NoReturn:
    """Replaces this process by a worker. `overrides` replace the environment variables of the same names.

    Raises:
        StartError: a setting is missing or wrong.
    """
    with settings_errors():
        settings = RemoteWorkerSettings(**overrides)
        bucket = bucket_settings()
    if bucket is None:
        raise StartError("BUCKET_ENDPOINT_URL is not set: set BUCKET_* to the bucket that the server uses")
    environment = worker_environment(
        f"{str(settings.platform_url).rstrip('/')}/v2",
        ENDPOINT_ID,
        worker_id=f"{socket.gethostname()}-{secrets.token_hex(4)}",
        token=settings.platform_token.get_secret_value(),
    )
    os.execve(sys.executable, [sys.executable, "-u", "-m", "handler"], child_environment(**environment))
