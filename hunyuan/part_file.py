"""A file that appears under its name only when it is complete."""

import secrets
from pathlib import Path
from typing import Self


class PartFile:
    """Collects a download beside its output, and replaces the output when it is complete.

    Raises OSError if the directory is not writable, and FileExistsError unless `overwrite`.
    """

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        self._output = output
        self._overwrite = overwrite
        self._check()
        self._path = output.with_name(f".{output.name}.{secrets.token_hex(4)}.part")
        self._file = self._path.open("xb")
        self.etag: str | None = None
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def restart(self, etag: str | None) -> None:
        """Forgets what was received. `etag` names what will be received now."""
        self._file.seek(0)
        self._file.truncate()
        self.size, self.etag = 0, etag

    def write(self, chunk: bytes) -> None:
        """Adds a chunk."""
        self._file.write(chunk)
        self.size += len(chunk)

    def publish(self) -> None:
        """Gives the complete file its name."""
        self._file.flush()
        self._check()
        self._path.replace(self._output)

    def _check(self) -> None:
        if not self._output.parent.is_dir():
            raise FileNotFoundError(f"the directory {self._output.parent} does not exist")
        if self._output.is_dir():
            raise IsADirectoryError(f"{self._output} is a directory")
        if not self._overwrite and self._output.exists():
            raise FileExistsError(f"{self._output} exists")


def output_path(task_id: str, output: str | Path | None) -> Path:
    """Where a task's video is saved: in `output`, under its own name if that is a directory or None."""
    path = Path(output if output is not None else "")
    return path / f"{task_id}.mp4" if path.is_dir() else path


def remove_parts(output: Path) -> None:
    """Deletes what killed downloads to `output` have left."""
    for path in output.parent.glob(f".{output.name}.*.part"):
        path.unlink(missing_ok=True)
