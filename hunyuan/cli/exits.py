"""How every command ends: exit codes, errors, answers on stdout."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from pydantic import ValidationError

from contract.settings import explain

AsJson = Annotated[bool, typer.Option("--json", help="Print the answer, or the error, as JSON.")]


class ExitCode(IntEnum):
    """The command's exit code. The README documents it."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    BUSY = 5


#: The exit code after SIGINT, as a shell reports it.
INTERRUPTED: Final = 130


class CommandError(Exception):
    """Ends a command. `--json` prints `fields`: the text as `error`, the code of the API, and what else is given."""

    def __init__(self, text: str, code: int, *, error_code: str | None = None, **fields: object) -> None:
        super().__init__(text)
        self.code = code
        self.fields = {"error": text.strip(), "error_code": error_code, **fields}


def end(text: str, code: int) -> NoReturn:
    """Ends the command with a line on stderr."""
    typer.echo(text, err=True)
    raise typer.Exit(code)


def fail(text: str, code: ExitCode) -> NoReturn:
    """Ends the command with an error."""
    end(f"error: {text}", code)


@contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Ends the command with a CommandError of the block: as JSON on stdout, or as text on stderr."""
    try:
        yield
    except CommandError as exc:
        if as_json:
            typer.echo(json.dumps(exc.fields))
            raise typer.Exit(exc.code) from None
        end(str(exc) if exc.code == INTERRUPTED else f"error: {exc}", exc.code)


@contextmanager
def settings_errors() -> Iterator[None]:
    """Ends the command if a setting is missing or wrong."""
    try:
        yield
    except ValidationError as exc:
        fail(explain(exc), ExitCode.USAGE)


def print_answer(answer: Mapping[str, Any], as_json: bool) -> None:
    """One JSON object, or one line for each field."""
    if as_json:
        typer.echo(json.dumps(answer))
        return
    for name, value in answer.items():
        typer.echo(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")


def program() -> str:
    """How the user can type this command: `make demo` runs one that is not on the PATH."""
    return "hunyuan" if shutil.which("hunyuan") else str(Path(sys.executable).with_name("hunyuan"))
