"""Directories of another user, for tests that may run as root."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

#: Linux: prctl(PR_CAPBSET_DROP) and the capabilities that let root ignore the permissions of files.
#: Source: https://man7.org/linux/man-pages/man7/capabilities.7.html.
_PR_CAPBSET_DROP = 24
_IGNORES_PERMISSIONS = (1, 2, 3)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER


def respect_permissions() -> None:
    """For `preexec_fn`: the program then obeys the permissions of files, even as root."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in _IGNORES_PERMISSIONS:
            if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "prctl")


def make_read_only(directory: Path) -> None:
    """Lets everyone read below the directory and nobody write, and gives it to another user where we may."""
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
            if os.geteuid() == 0:
                os.chown(path, 12345, 12345)


def make_writable(directory: Path) -> None:
    """Reverts `make_read_only`, so that the directory can be deleted."""
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            if os.geteuid() == 0:
                os.chown(path, 0, 0)
            path.chmod(path.stat().st_mode | 0o200)
