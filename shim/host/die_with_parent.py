"""`python -m shim.host.die_with_parent PARENT_PID COMMAND...`: become COMMAND, and die when the parent dies.

A killed parent can't stop its children; the kernel can (Linux: prctl(2), PR_SET_PDEATHSIG, kept across execve). On
other systems the command runs without this protection.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Replace this process by the command, which the kernel kills when the parent dies."""
    parent_pid, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent_pid):  # the parent died before prctl took effect
        sys.exit(0)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
