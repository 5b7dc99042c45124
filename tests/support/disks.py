"""Disks of a given size, which tests fill."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk(directory: Path, megabytes: int) -> Iterator[Path]:
    """Mounts a tmpfs of that size on `directory`. Mounting takes root: without it the test is skipped."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(directory)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"can't mount a tmpfs: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Fills the disk with one file and returns its path."""
    path = directory / "filler"
    with path.open("wb", buffering=0) as file:
        block = bytes(1 << 20)
        try:
            while file.write(block):
                pass
        except OSError:
            return path
    return path
