"""A client for one command, whose errors end the command."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from pydantic import ValidationError

from contract.settings import explain
from hunyuan.cli.exits import INTERRUPTED, CommandError, ExitCode, reported
from hunyuan.client import Client
from hunyuan.errors import ClientError, RefusedError, TaskFailedError, UnreachableError
from hunyuan.settings import ClientSettings

Server = Annotated[str | None, typer.Option(help="Address of the server. Default: HUNYUAN_SERVER.")]


@contextmanager
def connect(server: str | None, as_json: bool = False) -> Iterator[Client]:
    """A client of `server`, by default HUNYUAN_SERVER. Errors in the block end the command with their exit code."""
    with reported(as_json), translated(), Client(*account(server)) as client:
        yield client


def account(server: str | None) -> tuple[str, str | None]:
    """The address of `server`, by default HUNYUAN_SERVER, and the key HUNYUAN_API_KEY.

    Raises:
        CommandError: a setting is wrong.
    """
    try:
        settings = ClientSettings()
    except ValidationError as exc:
        raise CommandError(explain(exc), ExitCode.USAGE) from exc
    key = settings.api_key.get_secret_value() if settings.api_key is not None else None
    return server or str(settings.server), key


@contextmanager
def translated() -> Iterator[None]:
    """Raises a CommandError for each error of a client: what happened, its code, and what to do."""
    try:
        yield
    except TaskFailedError as exc:
        text = f"the task failed: {exc}"
        fields = {"error": exc.error, "task_id": exc.status.task_id}
        raise CommandError(text, ExitCode.FAILED, error_code=exc.error_code, **fields) from exc
    except UnreachableError as exc:
        text = f"{exc}\nIs the server running? Start one with `hunyuan serve`."
        raise CommandError(text, ExitCode.UNREACHABLE) from exc
    except RefusedError as exc:
        raise _refusal(exc) from exc
    except FileExistsError as exc:
        raise CommandError(f"{exc}; pass --overwrite to replace it", ExitCode.USAGE) from exc
    except (ClientError, OSError) as exc:
        raise CommandError(str(exc), ExitCode.FAILED) from exc
    except KeyboardInterrupt:
        raise CommandError("\nInterrupted.", INTERRUPTED, error_code="INTERRUPTED") from None


def _refusal(exc: RefusedError) -> CommandError:
    """The error of a refused request, with its exit code."""
    code, hint = ExitCode.FAILED, ""
    match exc.status:
        case 404:
            code = ExitCode.NOT_FOUND
        case 429 | 503:
            code = ExitCode.BUSY
            seconds = "a few" if exc.retry_after is None else f"{exc.retry_after:g}"
            hint = f"try again in {seconds} s"
        case 401:
            code, hint = ExitCode.USAGE, "set HUNYUAN_API_KEY"
        case 400 | 413:
            code = ExitCode.USAGE
    text, fields = (f"{exc}; {hint}", {"hint": hint}) if hint else (str(exc), {})
    return CommandError(text, code, error_code=exc.error_code, error=exc.error, **fields)
