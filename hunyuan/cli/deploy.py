"""`hunyuan deploy`: workers on RunPod."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from contract.job import Profile
from hunyuan.cli.exits import AsJson, ExitCode, fail, print_answer, settings_errors
from hunyuan.deploy import deployment
from hunyuan.deploy.pools import DEFAULT_POOLS
from hunyuan.deploy.runpod_api import RunPodApi, RunPodError, RunPodUnreachableError
from hunyuan.settings import DeploySettings, deployed_environment

app = typer.Typer(help="Run workers on RunPod. Needs RUNPOD_API_KEY.", no_args_is_help=True)

Name = Annotated[str, typer.Option(help="Name of the template and of the endpoint.")]
GpuPools = Annotated[
    list[str] | None,
    typer.Option(help=f"GPU pool; up to three, the preferred one first. Default: {', '.join(DEFAULT_POOLS)}."),
]
Timeout = Annotated[
    int | None, typer.Option(min=5, help="Seconds that one job may run. Default: by profile and slowest pool.")
]
IdleTimeout = Annotated[int, typer.Option(min=1, max=3600, help="Seconds without a job before a worker is stopped.")]
Secrets = Annotated[
    list[str] | None, typer.Option(metavar="VARIABLE=SECRET", help="Set a variable from a secret stored at RunPod.")
]
Variables = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="VARIABLE=VALUE", help="Set a variable of the workers; without VALUE, remove it."),
]


@app.command()
def runpod(
    image: Annotated[str, typer.Option(help="The worker's image, with registry and tag.")],
    name: Name = "hunyuan-video",
    profile: Annotated[
        Profile | None, typer.Option(help="Profile to serve. Default: HUNYUAN_PROFILE, and then the endpoint's.")
    ] = None,
    gpu: GpuPools = None,
    execution_timeout: Timeout = None,
    disk: Annotated[int, typer.Option(min=1, help="Container disk in GB.")] = 100,
    network_volume: Annotated[str | None, typer.Option(help="Id of a network volume for weights.")] = None,
    registry: Annotated[str | None, typer.Option(help="Id of RunPod's credential for a private registry.")] = None,
    idle_timeout: IdleTimeout = 60,
    min_workers: Annotated[int, typer.Option(min=0, help="Workers that always run and always cost.")] = 0,
    max_workers: Annotated[int, typer.Option(min=0, help="Maximum number of workers.")] = 3,
    min_cuda: Annotated[str, typer.Option(help="Minimum CUDA version of a worker's driver.")] = "13.0",
    env: Variables = None,
    secret: Secrets = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the changes and make none.")] = False,
) -> None:
    """Create or update a template and an endpoint.

    Workers get the variables BUCKET_*, HF_* and the workers' HUNYUAN_*. Other variables of the endpoint stay.
    """
    settings = _settings(profile)
    wanted = deployment.Deployment(
        name=name,
        image=image,
        env=_worker_variables(settings.profile, secret or [], env or []),
        pools=tuple(gpu or DEFAULT_POOLS),
        execution_timeout=execution_timeout,
        disk=disk,
        network_volume=network_volume,
        registry=registry,
        idle_timeout=idle_timeout,
        min_workers=min_workers,
        max_workers=max_workers,
        min_cuda=min_cuda,
    )
    _deploy(settings, wanted, dry_run=dry_run)


def _worker_variables(profile: Profile | None, secrets: Collection[str], variables: Collection[str]) -> dict[str, str]:
    try:
        return deployment.worker_variables(deployed_environment(), profile, secrets, variables)
    except deployment.IncompleteError as exc:
        fail(str(exc), ExitCode.USAGE)


def _deploy(settings: DeploySettings, wanted: deployment.Deployment, *, dry_run: bool) -> None:
    with _api(settings) as api:
        try:
            plan = deployment.plan(api, wanted)
        except deployment.IncompleteError as exc:
            fail(str(exc), ExitCode.USAGE)
        for line in (*plan.wanted.warnings(), *plan.lines()):
            typer.echo(line, err=True)
        if not dry_run:
            endpoint = deployment.apply(api, plan)
            typer.echo(f"endpoint_id: {endpoint['id']}")


@app.command()
def status(name: Name = "hunyuan-video", as_json: AsJson = False) -> None:
    """Show an endpoint's workers and jobs."""
    with _api(_settings()) as api:
        answer = deployment.status(api, name)
    print_answer(answer, as_json)


@app.command()
def destroy(
    name: Name = "hunyuan-video",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete an endpoint and its template. Its queued and running jobs are cancelled; videos stay in the bucket."""
    with _api(_settings()) as api:
        found = deployment.existing(api, name)
        for kind, resource in found:
            typer.echo(f"{kind} {name} ({resource['id']})", err=True)
        if found and not yes:
            typer.confirm("Delete?", abort=True, err=True)
        for kind, resource in found:
            api.delete(kind, resource["id"])
    typer.echo("deleted" if found else f"there is nothing named {name}")


def _settings(profile: Profile | None = None) -> DeploySettings:
    given: dict[str, Any] = {} if profile is None else {"profile": profile}
    with settings_errors():
        return DeploySettings(**given)


@contextmanager
def _api(settings: DeploySettings) -> Iterator[RunPodApi]:
    """RunPod's API. Its errors end the command with their exit code."""
    try:
        with RunPodApi(settings) as api:
            yield api
    except RunPodUnreachableError as exc:
        fail(str(exc), ExitCode.UNREACHABLE)
    except RunPodError as exc:
        fail(str(exc), _exit_code(exc.status))


def _exit_code(status: int | None) -> ExitCode:
    match status:
        case 401 | 403:
            return ExitCode.USAGE
        case 404:
            return ExitCode.NOT_FOUND
        case int() if status == 429 or status >= 500:
            return ExitCode.BUSY
        case _:
            return ExitCode.FAILED
