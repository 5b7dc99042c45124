"""The commands that talk to a server about one task, and `list` and `health`."""

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from pydantic import BaseModel

from hunyuan.cli.exits import INTERRUPTED, AsJson, CommandError, ExitCode, print_answer
from hunyuan.cli.options import Output, Overwrite, Quiet, with_request_fields
from hunyuan.cli.output import Destination, checked
from hunyuan.cli.progress import Progress
from hunyuan.cli.session import Server, connect
from hunyuan.client import Client
from hunyuan.errors import MethodNotAllowedError, NotFoundError, RequestTooLargeError
from hunyuan.images import NotAnImageError, local_image
from hunyuan.models import AcceptedTask, CompletedStatus, FailedStatus, TaskStatus

Prompt = Annotated[
    str | None,
    typer.Argument(help="What the video shows, 10-500 characters. `-`, or none and a pipe: read from stdin."),
]
TaskId = Annotated[str, typer.Argument(help="The task's id.")]

#: The server's longest page.
_PAGE: Final = 100


@with_request_fields
def generate(
    prompt: Prompt = None,
    output: Output = None,
    overwrite: Overwrite = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Submit the task, print its id and end.")] = False,
    quiet: Quiet = False,
    server: Server = None,
    as_json: AsJson = False,
    **fields: Any,
) -> None:
    """Generate a video, show its progress, and save it."""
    with connect(server, as_json) as client:
        if no_wait and output is not None:
            raise CommandError("--no-wait saves no video; give --output to `hunyuan wait`", ExitCode.USAGE)
        destination = checked(output, overwrite=overwrite, server=server, as_json=as_json)
        request = {"prompt": _text_of(prompt), **fields}
        task = submit(client, {name: value for name, value in request.items() if value is not None})
        if no_wait:
            _print_accepted(task, destination, as_json=as_json, quiet=quiet)
            return
        if not quiet:
            typer.echo(f"task {task.task_id}", err=True)
        with _interruptible(task.task_id, destination):
            follow_and_save(client, task.task_id, destination, as_json=as_json, quiet=quiet)


def wait(
    task_id: TaskId,
    output: Output = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Wait for a task, show its progress, and save its video."""
    with connect(server, as_json) as client:
        destination = checked(output, overwrite=overwrite, server=server, as_json=as_json, task_id=task_id)
        client.status(task_id)  # an outage is only waited for if it begins later
        with _interruptible(task_id, destination):
            follow_and_save(client, task_id, destination, as_json=as_json, quiet=quiet)


def status(task_id: TaskId, server: Server = None, as_json: AsJson = False) -> None:
    """Show a task's status."""
    with connect(server, as_json) as client:
        answer = client.status(task_id)
    _print(answer, as_json)
    if answer.status == "failed":
        raise typer.Exit(ExitCode.FAILED)


def cancel(task_id: TaskId, server: Server = None, as_json: AsJson = False) -> None:
    """Cancel a task that is queued or running."""
    with connect(server, as_json) as client:
        _print(client.cancel(task_id), as_json)


def download(
    task_id: TaskId,
    output: Output = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Save a completed task's video."""
    with connect(server, as_json) as client:
        destination = checked(output, overwrite=overwrite, server=server, as_json=as_json, task_id=task_id)
        destination.save(client, task_id, as_json=as_json, quiet=quiet)


def list_tasks(
    status: Annotated[
        str | None, typer.Option(help="Only tasks with this status: processing, completed or failed.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many tasks, the newest first.")] = 20,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the ids only.")] = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """List the newest tasks."""
    with connect(server, as_json) as client:
        tasks = _newest(client, status, limit)
    if as_json:
        print_answer({"tasks": [task.model_dump(mode="json", exclude_unset=True) for task in tasks]}, as_json)
        return
    for task in tasks:
        typer.echo(task.task_id if quiet else _fitted(f"{task.task_id}  {_summary(task)}"))
    if not tasks and not quiet:
        typer.echo("There are no tasks.", err=True)


def health(server: Server = None, as_json: AsJson = False) -> None:
    """Show the server's health; fail if no model is loaded."""
    with connect(server, as_json) as client:
        answer = client.health()
    _print(answer, as_json)
    if not answer.model_loaded:
        raise typer.Exit(ExitCode.BUSY)


def submit(client: Client, request: Mapping[str, object]) -> AcceptedTask:
    """Submits a request, whose image may be a file."""
    try:
        return client.generate(request)
    except (NotAnImageError, OSError) as exc:
        raise CommandError(f"--image: {exc}", ExitCode.USAGE) from exc
    except RequestTooLargeError as exc:
        if local_image(request.get("image")) is None:
            raise
        text = (
            f"the image {request['image']} is too large for this server: {exc}; pass a smaller file or an http(s) URL"
        )
        raise CommandError(text, ExitCode.USAGE, error_code=exc.error_code) from exc


def follow_and_save(client: Client, task_id: str, destination: Destination, *, as_json: bool, quiet: bool) -> None:
    """Shows the task's progress until it ends, and saves the video."""
    with Progress(quiet=quiet) as progress:
        client.wait(task_id, progress.show)
    destination.save(client, task_id, as_json=as_json, quiet=quiet)


@contextmanager
def _interruptible(task_id: str, destination: Destination) -> Iterator[None]:
    """Ctrl-C ends the command and not the task, and says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        go_on, stop = destination.command("wait", task_id), destination.command("cancel", task_id)
        text = f"""
Interrupted. Task {task_id} continues on the server.
To wait for its video:
  {go_on}
To cancel it:
  {stop}"""
        fields = {"task_id": task_id, "wait": go_on, "cancel": stop}
        raise CommandError(text, INTERRUPTED, error_code="INTERRUPTED", **fields) from None


def _text_of(prompt: str | None) -> str:
    """The prompt, from stdin if it is `-`, or none and stdin is no terminal."""
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise CommandError("there is no prompt; pass it as an argument, or pipe it in", ExitCode.USAGE)
    text = sys.stdin.read().strip()
    if not text:
        raise CommandError("there is no prompt on stdin", ExitCode.USAGE)
    return text


def _print_accepted(task: AcceptedTask, destination: Destination, *, as_json: bool, quiet: bool) -> None:
    if quiet and not as_json:
        typer.echo(task.task_id)
        return
    print_answer(task.model_dump(mode="json"), as_json)
    if not quiet:
        typer.echo(f"To wait for the video: {destination.command('wait', task.task_id)}", err=True)


def _newest(client: Client, status: str | None, limit: int) -> list[TaskStatus]:
    tasks: list[TaskStatus] = []
    cursor: str | None = None
    try:
        while len(tasks) < limit:
            page = client.list(status=status, limit=min(limit - len(tasks), _PAGE), cursor=cursor)
            tasks += page.tasks
            cursor = page.next_cursor
            if cursor is None:
                break
    except (NotFoundError, MethodNotAllowedError) as exc:
        text = "this server does not list tasks: it is older than this command, or its queue is RunPod's"
        raise CommandError(text, ExitCode.FAILED, error_code=exc.error_code) from exc
    return tasks


def _summary(task: TaskStatus) -> str:
    match task:
        case CompletedStatus():
            prompt = " ".join((task.prompt or "").split())
            return f"completed   {task.duration} s {task.resolution}  {prompt}".rstrip()
        case FailedStatus():
            return f"failed      {task.error_code}"
        case _:
            stage = (task.stage or "").replace("_", " ")
            place = f", place {task.queue_position}" if task.queue_position is not None else f" {task.progress} %"
            return f"processing  {stage}{place}"


def _fitted(line: str) -> str:
    """The line, cut to the width of a terminal."""
    columns = shutil.get_terminal_size().columns
    return f"{line[: columns - 1]}…" if sys.stdout.isatty() and len(line) > columns else line


def _print(answer: BaseModel, as_json: bool) -> None:
    print_answer(answer.model_dump(mode="json", exclude_unset=True), as_json)
