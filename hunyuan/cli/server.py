"""`hunyuan serve`, `worker`, `demo` and `downgrade-queue`: commands of the server and its workers."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final

import typer

from contract.job import Resolution
from hunyuan.cli import demo_server, launch, tasks
from hunyuan.cli.exits import ExitCode, fail, program
from hunyuan.cli.options import DEFAULT_DURATION, DEFAULT_RESOLUTION
from hunyuan.cli.output import Destination
from hunyuan.cli.session import connect

_UNITS: Final = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
#: A prompt for the demo model.
_DEMO_PROMPT: Final = "A red heart moves to the right over the sea"
_DEMO_FILE: Final = Path("demo.mp4")
_ABOUT_THE_DEMO: Final = """
This video is from the demo model, a tiny HunyuanVideo-1.5 that was trained on simple moving objects. Their colours and
the scene behind them (sea, meadow, night and the like) follow the prompt; their shapes and motions mostly do.
HunyuanVideo-1.5 itself needs an NVIDIA GPU and its weights, which have a licence of their own:

  {program} download-weights fast --to ~/models
  HUNYUAN_MODEL_PATH=~/models {program} serve

"Real videos" in README.md says which GPU, how much disk, and where the licence applies."""


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: HUNYUAN_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port. Default: HUNYUAN_PORT.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint or `demo`. Default: HUNYUAN_MODEL_PATH.")] = None,
) -> None:
    """Start the server. It starts a bucket unless BUCKET_* are set, and workers unless HUNYUAN_WORKERS is 0."""
    launch.serve(HUNYUAN_HOST=host, HUNYUAN_PORT=port, HUNYUAN_MODEL_PATH=model)


def worker(
    platform: Annotated[str | None, typer.Option(help="Address of the server. Default: HUNYUAN_PLATFORM_URL.")] = None,
    token: Annotated[str | None, typer.Option(help="The server's key. Default: HUNYUAN_PLATFORM_TOKEN.")] = None,
) -> None:
    """Start a worker for a server on another host. BUCKET_* must name the server's bucket."""
    launch.worker(HUNYUAN_PLATFORM_URL=platform, HUNYUAN_PLATFORM_TOKEN=token)


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,6})([smhdw])", text.strip(), re.ASCII)
    if match is None:
        raise typer.BadParameter("takes a number and a unit: 90m, 12h, 30d or 4w")
    return int(match[1]) * _UNITS[match[2]]


def prune(
    older_than: Annotated[timedelta, typer.Option(parser=_duration, metavar="AGE", help="30d, 12h, 90m, 4w.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the tasks and delete nothing.")] = False,
) -> None:
    """Delete old videos with their posters and manifests. Needs the server's BUCKET_* and HUNYUAN_* settings."""
    task_ids = launch.prune(older_than=older_than, dry_run=dry_run)
    for task_id in task_ids:
        typer.echo(task_id)
    typer.echo(f"{len(task_ids)} videos {'would be' if dry_run else 'are'} deleted", err=True)


def downgrade_queue(
    revision: Annotated[str, typer.Argument(help="The older release's revision, which its error text names: 0002.")],
) -> None:
    """Migrate the queue's database back, before you install an older release. Stop all servers first."""
    launch.downgrade_queue(revision)
    typer.echo(f"The database is at revision {revision}. Install the older release and start it.")


def demo(
    prompt: Annotated[str, typer.Argument(help="What the video shows, 10-500 characters.")] = _DEMO_PROMPT,
    duration: Annotated[int, typer.Option(help="Length in seconds, 5-10.")] = DEFAULT_DURATION,
    resolution: Annotated[Resolution, typer.Option(help="Output size.")] = DEFAULT_RESOLUTION,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to save to, also if it exists.")] = _DEMO_FILE,
) -> None:
    """Start a temporary server with the demo model, generate one video end to end, and stop the server."""
    typer.echo("starting a server with the demo model ...", err=True)
    request = {"prompt": prompt, "duration": duration, "resolution": resolution}
    try:
        with demo_server.running() as address, connect(address) as client:
            task_id = client.generate(request).task_id
            typer.echo(f"task {task_id}", err=True)
            tasks.follow_and_save(client, task_id, Destination(output, overwrite=True), as_json=False, quiet=False)
    except demo_server.DemoError as exc:
        fail(str(exc), ExitCode.FAILED)
    typer.echo(_ABOUT_THE_DEMO.format(program=program()), err=True)
