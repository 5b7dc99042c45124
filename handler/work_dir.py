"""Work directories of jobs. Each is deleted with its job; the next worker deletes those of a killed worker."""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PREFIX: Final = "hunyuan-job-"
#: Bytes that must be free before a render: enough for 10 s of 1080p and the poster.
_REQUIRED_BYTES: Final = 100_000_000

log = logging.getLogger(__name__)


class WorkDirError(Exception):
    """The work directory can't hold a video. The client reads the message."""


@contextmanager
def job_directory(parent: Path | None) -> Iterator[Path]:
    """A new directory under `parent` (None: the system's temporary directory), deleted at the end of the block.

    Raises:
        WorkDirError: the directory can't be created, or the disk has too little free space.
    """
    try:
        made = Path(tempfile.mkdtemp(prefix="hunyuan-", dir=parent))
        lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Renamed after locking: `remove_leftovers` must not see an unlocked directory.
        directory = made.rename(made.with_name(made.name.replace("hunyuan-", _PREFIX, 1)))
        free = shutil.disk_usage(directory).free
    except OSError as exc:
        raise WorkDirError(exc.strerror or str(exc)) from exc
    try:
        if free < _REQUIRED_BYTES:
            raise WorkDirError(
                f"the disk is full: {free // 1_000_000} MB are free, {_REQUIRED_BYTES // 1_000_000} MB are required"
            )
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def remove_leftovers(parent: Path | None) -> None:
    """Delete the directories under `parent` whose workers are dead, which the kernel shows by releasing their locks."""
    for directory in Path(parent or tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # deleted meanwhile, or owned by another user
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
            log.info("deleted %s, the work directory of a killed worker", directory)
        except BlockingIOError:
            pass  # its worker is alive
        finally:
            os.close(lock)
