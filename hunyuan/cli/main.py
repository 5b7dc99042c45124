"""The `hunyuan` command: its subcommands, each in a module of this package."""

import logging

import typer

from hunyuan.cli import deploy, plan, server, tasks, weights

app = typer.Typer(
    name="hunyuan",
    help="Text in, MP4 out: serve HunyuanVideo-1.5, and use a server of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (
    *(server.serve, server.worker, server.downgrade_queue),
    *(tasks.generate, tasks.status, tasks.cancel, tasks.download, tasks.health),
    *(server.prune, server.demo, weights.download_weights, weights.convert_weights, plan.plan),
):
    app.command()(command)

app.add_typer(deploy.app, name="deploy")


def main() -> None:
    """Run the command."""
    logging.getLogger().addHandler(logging.NullHandler())  # commands print; `hunyuan serve` sets up log lines
    app()


if __name__ == "__main__":
    main()
