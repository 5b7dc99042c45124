"""Real disks of a given size, to be filled."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk(directory: Path, megabytes: int) -> Iterator[Path]:
    """`directory` as a disk of its own (tmpfs). Mounting takes root: the test is skipped where it is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(directory)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """A file that takes all that is free."""
    path = directory / "filler"
    with path.open("wb", buffering=0) as file:
        block = bytes(1 << 20)
        try:
            while file.write(block):
                pass
        except OSError:
            return path
    return path
