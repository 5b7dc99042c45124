"""What the worker's machine gives it: host memory, the limit of its container, and directories of other users."""

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

#: The memory limit of this process's control group, in either version.
CGROUP_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
#: Where RunPod mounts a network volume and the cached models of an endpoint.
VOLUME: Final = Path("/runpod-volume")

_GB: Final = 1e9
_PR_SET_PDEATHSIG: Final = 1


def machine_memory() -> int:
    """Bytes of memory of the machine, which a container may not use all of."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_host_memory() -> int:
    """Bytes of host memory that this process may use: the machine's, or the limit of its cgroup if that is lower."""
    return min([machine_memory(), *_limits()])


def _limits() -> list[int]:
    """Limits of the control group, if it has any.

    Source of the files: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max), and cgroup-v1/memory.html.
    """
    written = [int(text) for text in map(_read, CGROUP_LIMITS) if text.isdecimal()]  # "max" stands for no limit
    return [limit for limit in written if limit < machine_memory()]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def die_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when its parent, of that process id, dies (Linux: prctl(2)).

    Exits at once if it is dead already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


@cache
def dying_with_parent() -> tuple[str, ...]:
    """The beginning of a command that is no code of ours and shall die with this process, by util-linux' setpriv(1).

    Empty where that is not installed: a program that reads our pipe ends with it all the same, unless it hangs.
    """
    setpriv = shutil.which("setpriv")
    return () if setpriv is None else (setpriv, "--pdeathsig", "KILL")


def is_writable(path: Path) -> bool:
    """Whether this process may create files in the directory, or the directory itself if it does not exist."""
    # os.path.exists, because Path.exists raises an error below a directory that this user may not enter.
    existing = next(each for each in (path, *path.absolute().parents) if os.path.exists(each))  # noqa: PTH110
    return os.access(existing, os.W_OK | os.X_OK)


def first_lines(volume: Path = VOLUME) -> Iterator[str]:
    """What an operator asks first about a worker that does not start: a log line each."""
    limits = _limits()
    limit = f"{min(limits) / _GB:.1f} GB" if limits else "none"
    yield f"host memory {machine_memory() / _GB:.1f} GB; limit of the container (cgroup) {limit}"
    try:
        owner = volume.stat()
    except OSError:
        yield f"user {os.geteuid()}; there is no volume at {volume}"
        return
    writes = "may" if is_writable(volume) else "may not"
    yield f"user {os.geteuid()} {writes} write to {volume}, which belongs to user {owner.st_uid}, group {owner.st_gid}"
