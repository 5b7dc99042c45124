"""How every command ends: exit codes, errors on stderr, answers on stdout."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Any, Final, NoReturn

import typer
from pydantic import ValidationError

from contract.settings import explain

AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


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


def end(text: str, code: int) -> NoReturn:
    """Ends the command with a line on stderr."""
    typer.echo(text, err=True)
    raise typer.Exit(code)


def fail(text: str, code: ExitCode) -> NoReturn:
    """Ends the command with an error."""
    end(f"error: {text}", code)


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
