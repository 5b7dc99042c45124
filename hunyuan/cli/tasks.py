"""The commands that talk to a server: generate, status, cancel, download, health."""

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import typer
from pydantic import BaseModel
from tqdm import tqdm

from contract.job import JobInput, Resolution
from hunyuan.cli.exits import INTERRUPTED, AsJson, ExitCode, fail, print_answer, settings_errors
from hunyuan.client import Client, ClientError, RefusedError, TaskFailedError, TaskStatus, UnreachableError
from hunyuan.settings import ClientSettings

#: The command line renders short videos unless told otherwise; the API's own defaults are longer and larger.
DEFAULT_DURATION: Final = 5
DEFAULT_RESOLUTION: Final = Resolution.P720

Server = Annotated[str | None, typer.Option(help="Address of the server. Default: HUNYUAN_SERVER.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to save to. Default: TASK_ID.mp4.")]
Prompt = Annotated[str, typer.Argument(help="What the video shows, 10-500 characters.")]


def generate(
    prompt: Prompt, output: Output = None, server: Server = None, as_json: AsJson = False, **fields: Any
) -> None:
    """Generate a video, show its progress, and save it."""
    request = {name: value for name, value in {"prompt": prompt, **fields}.items() if value is not None}
    with connect(server) as client:
        generate_and_save(client, request, output, as_json)


def _with_request_fields(command: inspect.Signature) -> inspect.Signature:
    """`command` with an option for each optional field of a request in place of its `**fields`."""
    defaults = {"duration": DEFAULT_DURATION, "resolution": DEFAULT_RESOLUTION}
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(name, field.default or None),  # a flag that is off is not sent
            annotation=Annotated[_plain_type(field.annotation) | None, typer.Option(help=field.description)],
        )
        for name, field in JobInput.model_fields.items()
        if not field.is_required()
    ]
    fixed = [each for each in command.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    return command.replace(parameters=[*fixed, *options])


def _plain_type(annotation: Any) -> Any:
    """`str` for `Annotated[str, ...] | None`."""
    arguments = get_args(annotation)
    return _plain_type(arguments[0]) if arguments else annotation


generate.__signature__ = _with_request_fields(inspect.signature(generate, eval_str=True))  # type: ignore[attr-defined]


def status(task_id: str, server: Server = None, as_json: AsJson = False) -> None:
    """Show a task's status."""
    with connect(server) as client:
        answer = client.status(task_id)
    _print(answer, as_json)
    if answer.status == "failed":
        raise typer.Exit(ExitCode.FAILED)


def cancel(task_id: str, server: Server = None, as_json: AsJson = False) -> None:
    """Cancel a task that is queued or running."""
    with connect(server) as client:
        _print(client.cancel(task_id), as_json)


def download(task_id: str, output: Output = None, server: Server = None, as_json: AsJson = False) -> None:
    """Save a completed task's video."""
    with connect(server) as client:
        _download(client, task_id, output, as_json)


def health(server: Server = None, as_json: AsJson = False) -> None:
    """Show the server's health; fail if no model is loaded."""
    with connect(server) as client:
        answer = client.health()
    _print(answer, as_json)
    if not answer.model_loaded:
        raise typer.Exit(ExitCode.BUSY)


@contextmanager
def connect(server: str | None) -> Iterator[Client]:
    """A client of `server`, by default HUNYUAN_SERVER. Its errors end the command with their exit code."""
    with settings_errors():
        settings = ClientSettings()
    key = settings.api_key.get_secret_value() if settings.api_key is not None else None
    try:
        with Client(server or str(settings.server), key) as client:
            yield client
    except TaskFailedError as exc:
        fail(f"the task failed: {exc}", ExitCode.FAILED)
    except UnreachableError as exc:
        fail(f"{exc}\nIs the server running? Start one with `hunyuan serve`.", ExitCode.UNREACHABLE)
    except RefusedError as exc:
        fail(*_refusal(exc))
    except (ClientError, OSError) as exc:
        fail(str(exc), ExitCode.FAILED)
    except KeyboardInterrupt:
        os.write(2, b"\n")  # the task itself continues on the server
        raise typer.Exit(INTERRUPTED) from None


def generate_and_save(client: Client, request: Mapping[str, object], output: Path | None, as_json: bool) -> None:
    """Submits the request, shows a progress bar until the task ends, and downloads the video."""
    task_id = client.generate(request)
    typer.echo(f"task {task_id}", err=True)
    with tqdm(total=100, unit="%", bar_format="{desc:<16}|{bar}| {n:3.0f} % [{elapsed}]", file=sys.stderr) as bar:

        def show(status: TaskStatus) -> None:
            bar.set_description_str((status.stage or status.status).replace("_", " "), refresh=False)
            progress = 100 if status.status == "completed" else status.progress or 0
            bar.update(max(progress - bar.n, 0))
            bar.refresh()

        client.wait(task_id, show)
    _download(client, task_id, output, as_json)


def _download(client: Client, task_id: str, output: Path | None, as_json: bool) -> None:
    path = output or Path(f"{task_id}.mp4")
    size = client.download(task_id, path)
    print_answer({"task_id": task_id, "output": str(path), "file_size": size}, as_json)


def _print(answer: BaseModel, as_json: bool) -> None:
    print_answer(answer.model_dump(mode="json", exclude_unset=True), as_json)


def _refusal(exc: RefusedError) -> tuple[str, ExitCode]:
    text = f"{exc} ({exc.error_code})"
    match exc.status:
        case 404:
            return text, ExitCode.NOT_FOUND
        case 429 | 503:
            return f"{text}; try again in {exc.retry_after or 'a few'} s", ExitCode.BUSY
        case 401:
            return f"{text}; set HUNYUAN_API_KEY", ExitCode.USAGE
        case 400 | 413:
            return text, ExitCode.USAGE
        case _:
            return text, ExitCode.FAILED
