"""`hunyuan serve`, `worker`, `demo` and `downgrade-queue`: commands of the server and its workers."""

from pathlib import Path
from typing import Annotated

import typer

from contract.job import Resolution
from hunyuan.cli import demo_server, launch, tasks
from hunyuan.cli.exits import ExitCode, fail


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: HUNYUAN_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port. Default: HUNYUAN_PORT.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint or `demo`. Default: HUNYUAN_MODEL_PATH.")] = None,
) -> None:
    """Start the server. It starts a bucket unless BUCKET_* are set, and workers unless HUNYUAN_WORKERS is 0."""
    try:
        launch.serve(HUNYUAN_HOST=host, HUNYUAN_PORT=port, HUNYUAN_MODEL_PATH=model)
    except launch.LaunchError as exc:
        fail(str(exc), ExitCode(exc.exit_code))


def worker(
    platform: Annotated[str | None, typer.Option(help="Address of the server. Default: HUNYUAN_PLATFORM_URL.")] = None,
    token: Annotated[str | None, typer.Option(help="The server's key. Default: HUNYUAN_PLATFORM_TOKEN.")] = None,
) -> None:
    """Start a worker for a server on another host. BUCKET_* must name the server's bucket."""
    try:
        launch.worker(HUNYUAN_PLATFORM_URL=platform, HUNYUAN_PLATFORM_TOKEN=token)
    except launch.LaunchError as exc:
        fail(str(exc), ExitCode(exc.exit_code))


def downgrade_queue(
    revision: Annotated[str, typer.Argument(help="The older release's revision, which its error text names: 0002.")],
) -> None:
    """Migrate the queue's database back, before you install an older release. Stop all servers first."""
    try:
        launch.downgrade_queue(revision)
    except launch.LaunchError as exc:
        fail(str(exc), ExitCode(exc.exit_code))
    typer.echo(f"The database is at revision {revision}. Install the older release and start it.")


def demo(
    prompt: tasks.Prompt = "A red fox walks through fresh snow at dawn, cinematic, soft light",
    duration: Annotated[int, typer.Option(help="Length in seconds, 5-10.")] = tasks.DEFAULT_DURATION,
    resolution: Annotated[Resolution, typer.Option(help="Output size.")] = tasks.DEFAULT_RESOLUTION,
    output: tasks.Output = Path("demo.mp4"),
) -> None:
    """Start a temporary server with the demo model, generate one video end to end, and stop the server."""
    typer.echo("starting a server with the demo model ...", err=True)
    request = {"prompt": prompt, "duration": duration, "resolution": resolution}
    try:
        with demo_server.running() as address, tasks.connect(address) as client:
            tasks.generate_and_save(client, request, output, as_json=False)
    except demo_server.DemoError as exc:
        fail(str(exc), ExitCode.FAILED)
