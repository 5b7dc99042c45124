"""Small files that the first start creates and every later start reads: secrets, the instance id, the bucket's port."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shim.host.errors import StartError

_REMEDY: Final = "Restore it from a backup, or delete it: the next start creates a new one"


def secret_file(path: Path, make: Callable[[], str], *, form: str) -> str:
    """The content of `path`, which matches the regular expression `form`.

    The first call creates the file with what `make` returns. A power cut leaves either no file or a complete one.

    Raises:
        StartError: the file can't be read or written, or its content does not match.
    """
    text = read_checked(path, form=form)
    if text is None:
        text = make()
        write_durably(path, text)
    return text


def read_checked(path: Path, *, form: str) -> str | None:
    """The content of `path`, which matches the regular expression `form`; None if there is no such file.

    Raises:
        StartError: the file can't be read, or its content does not match.
    """
    try:
        text = path.read_bytes().decode("ascii", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StartError(f"{path} can't be read: {exc.strerror}. {_REMEDY}") from exc
    if re.fullmatch(form, text, re.ASCII) is None:
        raise StartError(f"{path} is damaged: it has {len(text)} characters that are not of the form {form}. {_REMEDY}")
    return text


def write_durably(path: Path, text: str) -> None:
    """Writes the file, readable by its owner only, so that it survives a power cut: whole, or not at all.

    Raises:
        StartError: the file can't be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        new.unlink(missing_ok=True)  # a killed start left it
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
        _sync_directory(path.parent)
    except OSError as exc:
        raise StartError(f"HUNYUAN_DATA_DIR: can't write {path}: {exc.strerror}") from exc


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
