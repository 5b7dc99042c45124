"""A task's progress on stderr: a bar on a terminal, lines anywhere else."""

import shutil
import sys
import time
from typing import Any, Final, Self

import typer
from tqdm import tqdm

from hunyuan.models import CompletedStatus, ProcessingStatus, TaskStatus

_WIDTH: Final = 80
_LAYOUT: Final = "{desc:<16}|{bar}| {n:3.0f} % [{elapsed}{postfix}]"
#: Seconds between two lines of the same stage.
_LINE_INTERVAL: Final = 10.0


class Progress:
    """Shows each status that `show` is called with. Without a terminal, a line for each stage and every ten seconds."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar = None if quiet or not sys.stderr.isatty() else bar(100, _LAYOUT)
        self._last, self._next_line = "", 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, status: TaskStatus) -> None:
        """Shows the task's status."""
        stage = _stage(status)
        percent = 100 if isinstance(status, CompletedStatus) else getattr(status, "progress", 0)
        if self._bar is not None:
            self._bar.set_description_str(stage, refresh=False)
            left = getattr(status, "remaining_time", None)
            self._bar.set_postfix_str(f"{left} s left" if left is not None else "", refresh=False)
            self._bar.n = max(percent, self._bar.n)
            self._bar.refresh()
        elif not self._quiet and (stage != self._last or time.monotonic() >= self._next_line):
            typer.echo(stage if percent in (0, 100) else f"{stage} {percent} %", err=True)
            self._last, self._next_line = stage, time.monotonic() + _LINE_INTERVAL


def bar(total: int, layout: str) -> "tqdm[Any]":
    """A bar on stderr, as wide as the terminal and at most 80 characters."""
    columns = min(shutil.get_terminal_size().columns, _WIDTH)
    return tqdm(total=total, bar_format=layout, file=sys.stderr, ncols=columns)


def _stage(status: TaskStatus) -> str:
    if not isinstance(status, ProcessingStatus):
        return status.status
    if status.queue_position is not None:
        return f"queued, place {status.queue_position}"
    return (status.stage or status.status).replace("_", " ")
