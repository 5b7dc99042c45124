"""The data directory, which one server at a time uses."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from shim.host.errors import StartError
from shim.settings import ShimSettings


class DirectoryInUseError(StartError):
    """A server is using the data directory."""


@contextmanager
def locked_data_directory(settings: ShimSettings) -> Iterator[None]:
    """Creates and locks the data directory: one server at a time uses its queue and its bucket.

    Raises:
        DirectoryInUseError: another server has locked it.
        StartError: it can't be used.
    """
    try:
        settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (settings.directory / "lock").open("w")
    except OSError as exc:
        raise StartError(f"HUNYUAN_DATA_DIR: can't use {settings.directory}: {exc.strerror}") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise DirectoryInUseError(f"HUNYUAN_DATA_DIR: another server is using {settings.directory}") from exc
        yield
