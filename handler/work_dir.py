"""Directories in which videos are made. Each goes with its job, and a killed worker's with the next worker's start."""

from __future__ import annotations

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
#: Bytes that must be free before a render begins: some 10 s of 1080p, poster included, with room to spare.
_NEEDED: Final = 100_000_000

log = logging.getLogger(__name__)


class WorkDirError(Exception):
    """The work directory can't take a video; the message says why."""


@contextmanager
def job_directory(parent: Path | None) -> Iterator[Path]:
    """A new directory under `parent` (None: the system's for temporary files) for as long as the block runs.

    Raises:
        WorkDirError: it can't be made, or too little is free.
    """
    try:
        made = Path(tempfile.mkdtemp(prefix="hunyuan-", dir=parent))
        lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only what is locked has a name that `remove_leftovers` goes by.
        directory = made.rename(made.with_name(made.name.replace("hunyuan-", _PREFIX, 1)))
        free = shutil.disk_usage(directory).free
    except OSError as exc:
        raise WorkDirError(exc.strerror or str(exc)) from exc
    try:
        if free < _NEEDED:
            raise WorkDirError(
                f"the disk is full: {free // 1_000_000} MB are free, {_NEEDED // 1_000_000} MB are needed"
            )
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def remove_leftovers(parent: Path | None) -> None:
    """Remove the directories under `parent` whose workers are dead: the kernel has let go of their locks."""
    for directory in Path(parent or tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone since, or another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
            log.info("removed %s, which a killed worker left", directory)
        except BlockingIOError:
            pass  # its worker lives
        finally:
            os.close(lock)
