"""`hunyuan batch`: a video for each prompt of a file."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Self

import typer

from hunyuan.cli.batch_file import read
from hunyuan.cli.batch_run import BatchRun
from hunyuan.cli.batch_state import BatchState, Item
from hunyuan.cli.exits import INTERRUPTED, AsJson, CommandError, ExitCode, program, reported
from hunyuan.cli.options import Overwrite, Quiet, with_request_fields
from hunyuan.cli.progress import bar
from hunyuan.cli.session import Server, connect

_LAYOUT: Final = "{desc} |{bar}| [{elapsed}]"


@with_request_fields
def batch(
    file: Annotated[Path, typer.Argument(help="Text with a prompt in each line, or CSV or JSON Lines with fields.")],
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-d", help="Directory of the videos. Default: FILE without its suffix."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Tasks that wait or run on the server at a time.")] = 4,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    server: Server = None,
    as_json: AsJson = False,
    **fields: Any,
) -> None:
    """Generate a video for each prompt of a file.

    After an interruption the same command goes on where it was, and renders nothing twice. It retries failed prompts.
    """
    with reported(as_json):
        rows = read(file, {name: value for name, value in fields.items() if value is not None})
        directory = output_dir or (file.with_suffix("") if file.suffix else file.with_name(f"{file.name}-videos"))
    with connect(server, as_json) as client, BatchState(directory, rows) as state:
        _check_outputs(state.items, overwrite=overwrite)
        client.health()  # an outage is only waited for if it begins later
        with BatchProgress(state.items, quiet=quiet) as progress:
            try:
                BatchRun(client, state, parallel, progress).run()
            except KeyboardInterrupt:
                raise _interrupted(state.items) from None
    _print_summary(state.items, directory, as_json=as_json, quiet=quiet)
    if any(not item.saved for item in state.items):
        raise typer.Exit(ExitCode.FAILED)


class BatchProgress:
    """One bar on a terminal; anywhere else a line for each video."""

    def __init__(self, items: Sequence[Item], *, quiet: bool) -> None:
        self._items = items
        self._quiet = quiet
        self._percents: dict[str, int] = {}
        self._problem = ""
        self._bar = None if quiet or not sys.stderr.isatty() else bar(len(items), _LAYOUT)
        before = sum(item.saved for item in items)
        if before:
            self._say(f"{before} of {len(items)} videos are saved already")
        self.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def running(self, item: Item, percent: int) -> None:
        """A task of the batch has come so far."""
        self._percents[item.digest] = percent
        self.refresh()

    def ended(self, item: Item) -> None:
        """The item is saved, or it failed."""
        self._percents.pop(item.digest, None)
        done = sum(each.ended for each in self._items)
        if item.error is not None:
            self._say(_failure(item))
        elif self._bar is None:
            self._say(f"{done}/{len(self._items)} {item.output}")
        self.refresh()

    def waiting(self, problem: str) -> None:
        """Nothing goes on for now; empty when it does again. It is said once."""
        if problem and problem != self._problem:
            self._say(f"waiting: {problem}")
        self._problem = problem

    def refresh(self) -> None:
        """Draws the bar again."""
        if self._bar is None:
            return
        ended = sum(item.ended for item in self._items)
        failed = sum(item.error is not None for item in self._items)
        self._bar.n = ended + sum(self._percents.values()) / 100
        text = f"{ended - failed}/{len(self._items)} saved"
        self._bar.set_description_str(f"{text}, {failed} failed" if failed else text, refresh=True)

    def _say(self, text: str) -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.clear()
        typer.echo(text, err=True)


def _check_outputs(items: Sequence[Item], *, overwrite: bool) -> None:
    """No file of someone else is overwritten. A file whose task is known is this batch's own."""
    taken = [str(item.output) for item in items if not item.saved and item.task_id is None and item.output.exists()]
    if taken and not overwrite:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        text = f"nothing was submitted: {taken[0]}{more} exists already; pass --overwrite or another --output-dir"
        raise CommandError(text, ExitCode.USAGE)


def _interrupted(items: Sequence[Item]) -> CommandError:
    saved = sum(item.saved for item in items)
    running = [item.task_id for item in items if item.task_id is not None and not item.ended]
    again = shlex.join([program(), *sys.argv[1:]])
    lines = [f"\nInterrupted. {saved} of {len(items)} videos are saved.", "To go on:", f"  {again}"]
    if running:
        lines += [
            "These tasks continue on the server; `hunyuan cancel ID` cancels one:",
            *(f"  {each}" for each in running),
        ]
    return CommandError("\n".join(lines), INTERRUPTED, error_code="INTERRUPTED", task_ids=running, again=again)


def _print_summary(items: Sequence[Item], directory: Path, *, as_json: bool, quiet: bool) -> None:
    failed = [item for item in items if item.error is not None]
    saved = len(items) - len(failed)
    if as_json:
        failures = [
            {"line": item.row.line, "task_id": item.task_id, "error": item.error[0], "error_code": item.error[1]}
            for item in failed
            if item.error is not None
        ]
        outputs = [str(item.output) for item in items if item.saved]
        typer.echo(json.dumps({"total": len(items), "saved": saved, "outputs": outputs, "failed": failures}))
    elif quiet:
        typer.echo("\n".join(str(item.output) for item in items if item.saved))
    else:
        typer.echo(f"{saved} of {len(items)} videos are in {directory}")
        for item in failed:
            typer.echo(f"  {_failure(item)}")
        if failed:
            typer.echo("The same command submits the failed prompts again.")


def _failure(item: Item) -> str:
    error, code = item.error or ("", None)
    return f"line {item.row.line} failed: {error}" + (f" ({code})" if code else "")
