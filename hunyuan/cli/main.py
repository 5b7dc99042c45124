"""The `hunyuan` command: its subcommands, each in a module of this package."""

import logging
from importlib.metadata import version
from typing import Annotated

import typer

from hunyuan.cli import batch, deploy, mcp, plan, server, tasks, weights


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hunyuan {version('hunyuan-video-service')}")
        raise typer.Exit


app = typer.Typer(
    name="hunyuan",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Text in, MP4 out: serve HunyuanVideo-1.5, and use a server of it."""


for panel, commands in {
    "Videos": (
        *(tasks.generate, batch.batch, tasks.wait, tasks.list_tasks, tasks.status, tasks.cancel, tasks.download),
        mcp.mcp,
    ),
    "Servers": (server.serve, server.worker, server.demo, tasks.health, server.prune, server.downgrade_queue),
    "Models": (weights.download_weights, weights.convert_weights, plan.plan),
}.items():
    for command in commands:
        app.command("list" if command is tasks.list_tasks else None, rich_help_panel=panel)(command)
app.add_typer(deploy.app, name="deploy", rich_help_panel="Servers")


def main() -> None:
    """Run the command."""
    logging.getLogger().addHandler(logging.NullHandler())  # commands print; `hunyuan serve` sets up log lines
    app()


if __name__ == "__main__":
    main()
