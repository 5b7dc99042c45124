"""The `hunyuan` command: its subcommands, each in a module of this package."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any, NoReturn

import typer

from hunyuan.cli import deploy, server, tasks

app = typer.Typer(
    name="hunyuan",
    help="Text in, MP4 out: serve HunyuanVideo-1.5, and use a server of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (
    *(server.serve, server.worker),
    *(tasks.generate, tasks.status, tasks.cancel, tasks.download, tasks.health),
    server.demo,
):
    app.command()(command)

_PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def download_weights(context: typer.Context) -> None:
    """Get the checkpoints that a profile needs: fast, balanced or quality."""
    _weights("download", context.args)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def convert_weights(context: typer.Context) -> None:
    """Convert a checkpoint of the original layout to diffusers' layout."""
    _weights("convert", context.args)


def _weights(command: str, arguments: list[str]) -> NoReturn:
    done = subprocess.run([sys.executable, "-m", "handler.weights.download", command, *arguments], check=False)
    raise typer.Exit(done.returncode)


app.add_typer(deploy.app, name="deploy")


def main() -> None:
    """Run the command."""
    logging.getLogger().addHandler(logging.NullHandler())  # commands print; `hunyuan serve` sets up log lines
    app()


if __name__ == "__main__":
    main()
