"""Where a command saves a video. The place is checked before a task is submitted."""

import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import typer

from hunyuan.cli.exits import CommandError, ExitCode, print_answer, program
from hunyuan.client import Client
from hunyuan.part_file import PartFile, output_path


@dataclass(frozen=True)
class Destination:
    """A file, a directory, or None for TASK_ID.mp4. `server` is the command's option."""

    output: Path | None
    overwrite: bool
    server: str | None = None

    @property
    def is_stdout(self) -> bool:
        return self.output == Path("-")

    def save(self, client: Client, task_id: str, *, as_json: bool, quiet: bool) -> None:
        """Downloads the video and prints where it is."""
        if self.is_stdout:
            _copy_to_stdout(client, task_id)
            return
        video = client.download(task_id, self.output, overwrite=self.overwrite)
        if quiet and not as_json:
            typer.echo(video.path)
            return
        print_answer({"task_id": task_id, "output": str(video.path), "file_size": video.file_size}, as_json)

    def command(self, verb: str, task_id: str) -> str:
        """The command line that goes on with a task."""
        words = [program(), verb, task_id]
        if verb == "wait":
            words += ["--output", str(self.output)] if self.output is not None else []
            words += ["--overwrite"] if self.overwrite else []
        return shlex.join([*words, *(["--server", self.server] if self.server is not None else [])])


def checked(
    output: Path | None, *, overwrite: bool, server: str | None, as_json: bool = False, task_id: str | None = None
) -> Destination:
    """The destination, if a video can be saved there. Asks on a terminal before a file is overwritten.

    Raises:
        CommandError: it can't be used.
        OSError: the directory is not writable.
    """
    if output == Path("-"):
        if as_json or sys.stdout.isatty():
            taken = "--json prints there" if as_json else "is a terminal; redirect it"
            raise CommandError(f"--output - writes the video to stdout, which {taken}", ExitCode.USAGE)
        return Destination(output, overwrite, server)
    path = output_path(task_id or "TASK_ID", output)
    if not path.parent.is_dir():
        raise CommandError(f"the directory {path.parent} does not exist", ExitCode.USAGE)
    if path.exists() and not overwrite:
        overwrite = _may_overwrite(path)
    with PartFile(path, overwrite=overwrite):
        """The directory is writable."""
    return Destination(output, overwrite, server)


def _may_overwrite(path: Path) -> bool:
    on_terminal = sys.stdin.isatty() and sys.stderr.isatty()
    if on_terminal and typer.confirm(f"{path} exists. Overwrite it?", err=True):
        return True
    hint = "it is not overwritten" if on_terminal else "pass --overwrite to replace it"
    raise CommandError(f"{path} exists; {hint}", ExitCode.USAGE)


def _copy_to_stdout(client: Client, task_id: str) -> None:
    with tempfile.TemporaryDirectory(prefix="hunyuan-") as directory:
        video = client.download(task_id, Path(directory, "video.mp4"))
        with video.path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
