"""Disks of a given size, which tests fill."""

from __future__ import annotations

import shutil
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


class CrashingDisk:
    """An ext4 disk on `mount_point`, whose power can be cut: what the kernel has not written to it by then is lost."""

    def __init__(self, image: Path, mount_point: Path) -> None:
        self._image = image
        self.mount_point = mount_point

    def format(self, megabytes: int) -> None:
        with self._image.open("wb") as file:
            file.truncate(megabytes << 20)
        subprocess.run(["mkfs.ext4", "-q", str(self._image)], check=True)
        self.mount_point.mkdir()

    def mount(self) -> None:
        """The kernel commits its journal after minutes only: a test must not pass because it was slow."""
        command = ["mount", "-o", "loop,commit=300", str(self._image), str(self.mount_point)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"can't mount a disk: {done.stderr.strip()}")

    def umount(self) -> None:
        subprocess.run(["umount", str(self.mount_point)], check=True)

    def contents(self) -> bytes:
        """What is on the disk now: not what is in the kernel's memory."""
        return self._image.read_bytes()

    def restore(self, contents: bytes) -> None:
        """Sets the unmounted disk back to those contents."""
        self._image.write_bytes(contents)


@contextmanager
def crashing_disk(directory: Path, megabytes: int) -> Iterator[CrashingDisk]:
    """A mounted disk. It takes root and mkfs.ext4: without them the test is skipped."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    made = CrashingDisk(directory / "disk.img", directory / "disk")
    made.format(megabytes)
    made.mount()
    try:
        yield made
    finally:
        made.umount()
