"""The file system under the embedded bucket."""

import ctypes
import os
import sys
from pathlib import Path


def sync_file_system(directory: Path) -> None:
    """Return when every file of the file system that holds `directory` is on the disk: syncfs(2).

    Raises:
        OSError: the directory does not exist, or the disk failed.
    """
    if sys.platform != "linux":
        os.sync()
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)
