"""The `hunyuan` command."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from tqdm import tqdm

from contract.job import DEFAULT_MODEL, AspectRatio, Profile, Resolution
from contract.settings import explain
from hunyuan.cli import weights
from hunyuan.client import Answer, Client, ClientError, RefusedError, TaskFailedError, UnreachableError
from hunyuan.settings import ClientSettings, DeploySettings, deployed_environment
from shim.settings import RemoteWorkerSettings, ShimSettings, child_environment
from storage.settings import bucket_settings

if TYPE_CHECKING:
    from hunyuan.deploy.runpod_api import RunPodApi


class ExitCode(IntEnum):
    """What the command's exit says. Documented in the README."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    BUSY = 5


app = typer.Typer(
    name="hunyuan",
    help="Text in, MP4 out: serve HunyuanVideo-1.5 and use a server of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

deploy = typer.Typer(help="Run workers on RunPod. Needs RUNPOD_API_KEY.", no_args_is_help=True)
app.add_typer(deploy, name="deploy")

Server = Annotated[str | None, typer.Option(help="Address of the server; else HUNYUAN_SERVER.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to save; else TASK_ID.mp4.")]
Prompt = Annotated[str, typer.Argument(help="What the video shows, 10-500 characters.")]
Duration = Annotated[int, typer.Option(help="Length in seconds, 5-10.")]
DeploymentName = Annotated[str, typer.Option(help="Name of template and endpoint.")]
Size = Annotated[Resolution, typer.Option(help="Output size.")]


def main() -> None:
    """Run the command."""
    app()


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; else HUNYUAN_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; else HUNYUAN_PORT.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint or `demo`; else HUNYUAN_MODEL_PATH.")] = None,
) -> None:
    """Start the REST server, with its bucket and workers where the environment names none."""
    from shim.host import serve as server

    given: dict[str, Any] = {"HUNYUAN_HOST": host, "HUNYUAN_PORT": port, "HUNYUAN_MODEL_PATH": model}
    with _settings_explained():
        settings = ShimSettings(**{name: value for name, value in given.items() if value is not None})
    try:
        server.run(settings)
    except server.StartError as exc:
        _fail(str(exc), ExitCode.USAGE)


@app.command()
def worker(
    platform: Annotated[str | None, typer.Option(help="Address of a server; else HUNYUAN_PLATFORM_URL.")] = None,
    token: Annotated[str | None, typer.Option(help="The server's key; else HUNYUAN_PLATFORM_TOKEN.")] = None,
) -> None:
    """Render jobs of a server on another host. It needs the server's bucket in BUCKET_*."""
    from shim.host.worker_environment import ENDPOINT_ID, worker_environment

    given: dict[str, Any] = {"HUNYUAN_PLATFORM_URL": platform, "HUNYUAN_PLATFORM_TOKEN": token}
    with _settings_explained():
        settings = RemoteWorkerSettings(**{name: value for name, value in given.items() if value is not None})
        if bucket_settings() is None:
            _fail("BUCKET_ENDPOINT_URL: needed, and the same bucket as the server's", ExitCode.USAGE)
    worker_id = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    base_url = f"{str(settings.platform_url).rstrip('/')}/v2"
    key = settings.platform_token.get_secret_value()
    environment = child_environment(**worker_environment(base_url, ENDPOINT_ID, worker_id, key))
    os.execve(sys.executable, [sys.executable, "-u", "-m", "handler"], environment)


@app.command()
def generate(
    prompt: Prompt,
    duration: Duration = 5,
    resolution: Size = Resolution.P720,
    model: Annotated[str, typer.Option(help="Model to use.")] = DEFAULT_MODEL,
    aspect_ratio: Annotated[AspectRatio, typer.Option(help="Width to height.")] = AspectRatio.WIDE,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same video again.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None,
    image: Annotated[str | None, typer.Option(help="URL of an image to start from.")] = None,
    output: Output = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Generate a video, show how far it is, and save it."""
    wanted = {
        "prompt": prompt,
        "duration": duration,
        "resolution": resolution,
        "model": model,
        "aspect_ratio": aspect_ratio,
        "seed": seed,
        "negative_prompt": negative_prompt,
        "image": image,
    }
    request = {name: value for name, value in wanted.items() if value is not None}
    with _client(server) as client:
        _generate(client, request, output, as_json)


@app.command()
def status(task_id: str, server: Server = None, as_json: AsJson = False) -> None:
    """Show how far a task is."""
    with _client(server) as client:
        answer = client.status(task_id)
    _print(answer, as_json)
    if answer["status"] == "failed":
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def cancel(task_id: str, server: Server = None, as_json: AsJson = False) -> None:
    """Cancel a task that waits or runs."""
    with _client(server) as client:
        _print(client.cancel(task_id), as_json)


@app.command()
def download(task_id: str, output: Output = None, server: Server = None, as_json: AsJson = False) -> None:
    """Save a finished task's video."""
    with _client(server) as client:
        _download(client, task_id, output, as_json)


@app.command()
def health(server: Server = None, as_json: AsJson = False) -> None:
    """Show the server's health; fails while no model is loaded."""
    with _client(server) as client:
        answer = client.health()
    _print(answer, as_json)
    if not answer["model_loaded"]:
        raise typer.Exit(ExitCode.BUSY)


@app.command()
def demo(
    prompt: Prompt = "A red fox walks through fresh snow at dawn, cinematic, soft light",
    duration: Duration = 5,
    resolution: Size = Resolution.P720,
    output: Output = Path("demo.mp4"),
) -> None:
    """Start a server of its own with the demo model, generate one video end to end, and stop it."""
    from hunyuan.cli import demo_server

    typer.echo("starting the server with the demo model ...", err=True)
    try:
        with demo_server.running() as address, _client(address) as client:
            request = {"prompt": prompt, "duration": duration, "resolution": resolution}
            _generate(client, request, output, as_json=False)
    except demo_server.DemoError as exc:
        _fail(str(exc), ExitCode.FAILED)


app.command()(weights.download_weights)
app.command()(weights.convert_weights)


@deploy.command()
def runpod(
    image: Annotated[str, typer.Option(help="The worker's image, with registry and tag.")],
    name: DeploymentName = "hunyuan-video",
    profile: Annotated[Profile | None, typer.Option(help="Sizes the deployment; else HUNYUAN_PROFILE.")] = None,
    gpu: Annotated[
        list[str] | None, typer.Option(help="GPU pool, up to three, the first preferred; else by profile.")
    ] = None,
    execution_timeout: Annotated[
        int | None, typer.Option(min=5, help="Seconds one job may run; else by profile.")
    ] = None,
    disk: Annotated[int, typer.Option(min=1, help="Container disk in GB.")] = 100,
    network_volume: Annotated[str | None, typer.Option(help="Id of a network volume, for weights.")] = None,
    registry: Annotated[str | None, typer.Option(help="Id of RunPod's credential for a private registry.")] = None,
    idle_timeout: Annotated[int, typer.Option(min=1, max=3600, help="Seconds a worker waits for a next job.")] = 60,
    min_workers: Annotated[int, typer.Option(min=0, help="Workers that always run, and always cost.")] = 0,
    max_workers: Annotated[int, typer.Option(min=0, help="Workers at most.")] = 3,
    min_cuda: Annotated[str, typer.Option(help="Lowest CUDA version of a worker's driver.")] = "13.0",
    secret: Annotated[
        list[str] | None, typer.Option(metavar="VARIABLE=SECRET", help="Take a variable from a secret kept at RunPod.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
) -> None:
    """Create a template and an endpoint, or bring them up to date. BUCKET_* and HUNYUAN_* go to the workers."""
    from hunyuan.deploy import deployment as runpod_deploy

    settings = _deploy_settings(profile)
    size = runpod_deploy.SIZES[settings.profile]
    try:
        env = runpod_deploy.worker_variables(deployed_environment(), settings.profile, secret or [])
    except runpod_deploy.IncompleteError as exc:
        _fail(str(exc), ExitCode.USAGE)
    wanted = runpod_deploy.Deployment(
        name=name,
        image=image,
        env=env,
        pools=tuple(gpu or size.pools),
        execution_timeout=execution_timeout or size.execution_timeout,
        disk=disk,
        network_volume=network_volume,
        registry=registry,
        idle_timeout=idle_timeout,
        min_workers=min_workers,
        max_workers=max_workers,
        min_cuda=min_cuda,
    )
    with _runpod_api(settings, wanted.secrets) as api:
        planned = runpod_deploy.plan(api, wanted)
        for line in (*wanted.warnings(), *planned.lines()):
            typer.echo(line, err=True)
        if not dry_run:
            endpoint = runpod_deploy.apply(api, planned)
            typer.echo(f"endpoint_id: {endpoint['id']}")


@deploy.command("status")
def deploy_status(name: DeploymentName = "hunyuan-video", as_json: AsJson = False) -> None:
    """Show an endpoint's workers and jobs."""
    from hunyuan.deploy import deployment as runpod_deploy

    with _runpod_api(_deploy_settings()) as api:
        answer = runpod_deploy.status(api, name)
    _print(answer, as_json)


@deploy.command()
def destroy(
    name: DeploymentName = "hunyuan-video",
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
) -> None:
    """Delete an endpoint and its template. Jobs that wait or run there are cancelled; videos stay in the bucket."""
    from hunyuan.deploy import deployment as runpod_deploy

    with _runpod_api(_deploy_settings()) as api:
        found = runpod_deploy.existing(api, name)
        for kind, resource in found:
            typer.echo(f"{kind} {name} ({resource['id']})", err=True)
        if found and not yes:
            typer.confirm("Delete?", abort=True, err=True)
        for kind, resource in found:
            api.delete(kind, resource["id"])
    typer.echo("deleted" if found else f"there is nothing named {name}")


def _deploy_settings(profile: Profile | None = None) -> DeploySettings:
    given: dict[str, Any] = {} if profile is None else {"profile": profile}
    with _settings_explained():
        return DeploySettings(**given)


@contextmanager
def _runpod_api(settings: DeploySettings, secrets: Collection[str] = ()) -> Iterator[RunPodApi]:
    """RunPod's API; its errors end the command with what they mean."""
    from hunyuan.deploy.runpod_api import RunPodApi, RunPodError, RunPodUnreachableError

    try:
        with RunPodApi(settings, secrets) as api:
            yield api
    except RunPodUnreachableError as exc:
        _fail(str(exc), ExitCode.UNREACHABLE)
    except RunPodError as exc:
        _fail(str(exc), _runpod_exit(exc.status))


def _runpod_exit(status: int | None) -> ExitCode:
    match status:
        case 401 | 403:
            return ExitCode.USAGE
        case 404:
            return ExitCode.NOT_FOUND
        case int() if status == 429 or status >= 500:
            return ExitCode.BUSY
        case _:
            return ExitCode.FAILED


def _generate(client: Client, request: Mapping[str, object], output: Path | None, as_json: bool) -> None:
    task_id = client.generate(request)
    typer.echo(f"task {task_id}", err=True)
    with tqdm(total=100, unit="%", bar_format="{desc:<16}|{bar}| {n:3.0f} % [{elapsed}]", file=sys.stderr) as bar:

        def show(answer: Answer) -> None:
            stage = str(answer.get("stage", answer["status"])).replace("_", " ")
            bar.set_description_str(stage, refresh=False)
            bar.update(max(answer.get("progress", 100 if answer["status"] == "completed" else 0) - bar.n, 0))
            bar.refresh()

        client.wait(task_id, show)
    _download(client, task_id, output, as_json)


def _download(client: Client, task_id: str, output: Path | None, as_json: bool) -> None:
    path = output or Path(f"{task_id}.mp4")
    size = client.download(task_id, path)
    _print({"task_id": task_id, "output": str(path), "file_size": size}, as_json)


def _print(answer: Answer, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(answer))
        return
    for name, value in answer.items():
        typer.echo(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")


@contextmanager
def _settings_explained() -> Iterator[None]:
    try:
        yield
    except ValidationError as exc:
        _fail(explain(exc), ExitCode.USAGE)


@contextmanager
def _client(server: str | None) -> Iterator[Client]:
    """A client whose errors end the command with what they mean."""
    with _settings_explained():
        settings = ClientSettings()
    key = settings.api_key.get_secret_value() if settings.api_key is not None else None
    try:
        with Client(server or str(settings.server), key) as client:
            yield client
    except TaskFailedError as exc:
        _fail(f"the task failed: {exc}", ExitCode.FAILED)
    except UnreachableError as exc:
        _fail(f"{exc}\nIs the server running? Start one with `hunyuan serve`.", ExitCode.UNREACHABLE)
    except RefusedError as exc:
        _fail(*_refusal(exc))
    except (ClientError, OSError) as exc:
        _fail(str(exc), ExitCode.FAILED)
    except KeyboardInterrupt:
        # The task goes on: the server has it.
        os.write(2, b"\n")
        raise typer.Exit(130) from None


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


def _fail(text: str, code: ExitCode) -> NoReturn:
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
