"""`hunyuan deploy`: describes a deployment on RunPod, plans the changes to reach it, and applies them.

A template holds the container's settings: image, disk, environment. RunPod copies a template into an endpoint when a
request names it and does not link the two, so every update of the template is followed by one of the endpoint.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from contract.job import Profile
from contract.worker import GPUS_PER_JOB
from hunyuan.deploy.pools import execution_timeout, pool_warnings
from hunyuan.deploy.runpod_api import Kind, Resource, RunPodApi, RunPodError
from hunyuan.settings import BUCKET_SECRET, INIT_TIMEOUT, REQUIRED_BUCKET_VARIABLES

#: The fields that an endpoint copies from its template.
_CONTAINER: Final = ("image", "disk", "env", "registry")
_PROFILE: Final = "HUNYUAN_PROFILE"
#: RunPod adds a worker when a job has waited for this many seconds; its default.
_QUEUE_DELAY: Final = 4


#: What workers get if neither the operator nor the endpoint says otherwise. The seconds are those that a cold start may
#: take: the download of 34 GB at 25 MB/s takes 23 minutes, and the load some more.
DEFAULT_VARIABLES: Final = {_PROFILE: Profile.TURBO.value, INIT_TIMEOUT: "1800"}

_ENV_OPTION: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_SECRET_OPTION: Final = re.compile(r"([A-Z_][A-Z0-9_]*)=([A-Za-z0-9_-]+)")
#: RunPod replaces this by the secret when a worker starts. Source: https://docs.runpod.io/pods/templates/secrets
_PLACEHOLDER: Final = "{{{{ RUNPOD_SECRET_{} }}}}"
#: Names of variables whose values nobody may read.
_SECRET_NAME: Final = re.compile(r"SECRET|TOKEN|PASSWORD|_KEY$")
#: A shorter value may be a part of any text, so it is not removed from RunPod's errors.
_SHORTEST_SECRET: Final = 6


class IncompleteError(Exception):
    """The workers' environment is incomplete or wrong; the message names the variable or option."""


def worker_variables(
    environment: Mapping[str, str], profile: Profile | None, secrets: Iterable[str], settings: Iterable[str] = ()
) -> dict[str, str]:
    """The workers' environment: ours, the profile, and a placeholder for each of `secrets` (`VARIABLE=SECRET`).

    `settings` (`VARIABLE=VALUE`) replace the others. An empty value removes the variable from the deployment.

    Raises:
        IncompleteError: one of `secrets` or `settings` is malformed.
    """
    variables = {**environment, **({_PROFILE: profile.value} if profile is not None else {})}
    for option in secrets:
        parts = _SECRET_OPTION.fullmatch(option)
        if parts is None:
            raise IncompleteError("--secret takes VARIABLE=SECRET, where SECRET is the name of a secret at RunPod")
        variables[parts[1]] = _PLACEHOLDER.format(parts[2])
    for option in settings:
        parts = _ENV_OPTION.fullmatch(option)
        if parts is None:
            raise IncompleteError("--env takes VARIABLE=VALUE, or VARIABLE= to remove the variable")
        if parts[1] == _PROFILE:
            raise IncompleteError("--env HUNYUAN_PROFILE: pass --profile, which also sets the time limit")
        variables[parts[1]] = parts[2]
    return variables


@dataclass(frozen=True)
class Deployment:
    """A template and an endpoint of one name. Times in seconds, `disk` in GB.

    `plan` completes `env`. With an `execution_timeout` of None, its HUNYUAN_PROFILE and the pools decide.
    """

    name: str
    image: str
    env: Mapping[str, str]
    pools: tuple[str, ...]
    execution_timeout: int | None
    disk: int
    idle_timeout: int
    min_workers: int
    max_workers: int
    min_cuda: str
    network_volume: str | None = None
    registry: str | None = None

    def template(self) -> Resource:
        """The body of POST /v2/templates."""
        return {
            "name": self.name,
            **self._container(),
            "serverless": True,
            "public": False,
            "startSsh": False,
            "startJupyter": False,
        }

    def endpoint(self) -> Resource:
        """The body of POST /v2/serverless, with the template's fields written out."""
        return {
            "name": self.name,
            "type": "QUEUE",
            **self._container(),
            "gpu": {
                "pools": list(self.pools),
                "count": self._gpus_per_worker,
                "minCudaVersion": self.min_cuda,
                "allowedCudaVersions": [],  # RunPod refuses both fields at once
            },
            "workers": {"min": self.min_workers, "max": self.max_workers, "idleTimeout": self.idle_timeout},
            "scaling": {"type": "QUEUE_DELAY", "queueDelay": _QUEUE_DELAY},
            "timeout": 1000 * (self.execution_timeout or execution_timeout(*self._served)),
            "flashboot": "FLASHBOOT",
            "networkVolumes": [self.network_volume] if self.network_volume else [],
        }

    @property
    def secrets(self) -> tuple[str, ...]:
        """The values in `env` that must not be printed."""
        return tuple(self.env[name] for name in self._clear_text())

    @property
    def _gpus_per_worker(self) -> int:
        value = self.env.get("HUNYUAN_GPUS_PER_JOB") or "1"
        if value not in map(str, GPUS_PER_JOB):
            raise IncompleteError("HUNYUAN_GPUS_PER_JOB takes 1, 2, 4 or 8")
        return int(value)

    @property
    def _served(self) -> tuple[Profile, tuple[str, ...], str | None]:
        return Profile(self.env[_PROFILE]), self.pools, self.env.get("HUNYUAN_MODEL_PATH")

    def _clear_text(self) -> list[str]:
        """The variables whose secret values the template contains."""
        return [
            name
            for name, value in self.env.items()
            if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and "{{ RUNPOD_SECRET_" not in value
        ]

    def check(self) -> None:
        """Raises IncompleteError if only a part of BUCKET_* is set, or if the endpoint has an unknown profile."""
        if self.env[_PROFILE] not in list(Profile):
            raise IncompleteError(f"{_PROFILE}: the endpoint has {self.env[_PROFILE]!r}; pass --profile")
        missing = [name for name in REQUIRED_BUCKET_VARIABLES if name not in self.env]
        if missing and len(missing) < len(REQUIRED_BUCKET_VARIABLES):
            raise IncompleteError(f"{', '.join(missing)}: Field required")

    def warnings(self) -> Iterator[str]:
        """Warnings about a deployment that works but may not be what the operator wants."""
        yield from pool_warnings(*self._served)
        if BUCKET_SECRET not in self.env:
            yield (
                "warning: no BUCKET_* is set: a worker returns a small video in its result, and can store a larger one "
                "only if the job carries an s3Config"
            )
        for name in self._clear_text():
            yield (
                f"warning: the template will contain {name} in clear text; "
                f"store it at RunPod and pass --secret {name}=NAME"
            )

    def _container(self) -> Resource:
        return {"image": self.image, "disk": self.disk, "env": dict(self.env), "registry": self.registry}


@dataclass(frozen=True)
class Change:
    """The change of one resource: `body` has the fields that differ from the current ones, possibly none."""

    kind: Kind
    name: str
    current: Resource | None
    body: Resource

    def lines(self) -> Iterator[str]:
        """The change as text, with the names of environment variables but not their values."""
        if not self.body:
            yield f"{self.kind} {self.name}: no change"
            return
        yield f"{self.kind} {self.name}: {'create' if self.current is None else 'update'}"
        before = self.current or {}
        for field, value in self.body.items():
            if field == "env":
                yield f"  env: {_env_change(before.get('env') or {}, value)}"
            elif self.current is None:
                yield f"  {field}: {json.dumps(value)}"
            else:
                yield f"  {field}: {json.dumps(before.get(field))} -> {json.dumps(value)}"


@dataclass(frozen=True)
class Plan:
    """The changes that `apply` makes to reach `wanted`."""

    wanted: Deployment
    template: Change
    endpoint: Change

    def lines(self) -> Iterator[str]:
        """All changes as text."""
        yield from self.template.lines()
        yield from self.endpoint.lines()


def plan(api: RunPodApi, wanted: Deployment) -> Plan:
    """The changes from what RunPod has to `wanted`. Changes nothing.

    Environment variables that `wanted` does not name keep their values: someone has set them in the console.

    Raises:
        RunPodError: also if the endpoint of that name has no job queue.
        IncompleteError: see `Deployment.check`.
    """
    template = api.find(Kind.TEMPLATE, wanted.name)
    endpoint = api.find(Kind.ENDPOINT, wanted.name)
    if endpoint is not None:
        endpoint = {"type": "QUEUE", **endpoint}  # RunPod may omit it
        if endpoint["type"] != "QUEUE":
            raise RunPodError(
                f"endpoint {wanted.name} has type {endpoint['type']}, which can't be changed; pass another --name"
            )
    present = (endpoint or template or {}).get("env") or {}
    env = {name: value for name, value in {**DEFAULT_VARIABLES, **present, **wanted.env}.items() if value}
    wanted = replace(wanted, env=env)
    wanted.check()
    api.hide(wanted.secrets)
    return Plan(
        wanted,
        _difference(Kind.TEMPLATE, wanted.template(), template),
        _difference(Kind.ENDPOINT, wanted.endpoint(), endpoint),
    )


def apply(api: RunPodApi, planned: Plan) -> Resource:
    """Makes the changes and returns the endpoint. After an interruption, plan and apply again."""
    template = _apply_change(api, planned.template, planned.template.body)
    body = planned.endpoint.body
    if body.keys() & set(_CONTAINER):
        others = {field: value for field, value in body.items() if field not in _CONTAINER}
        body = {**others, "templateId": template["id"]}
    return _apply_change(api, planned.endpoint, body)


def status(api: RunPodApi, name: str) -> Resource:
    """The endpoint's settings, workers and jobs.

    Raises:
        RunPodError: also with status 404 if there is no endpoint of that name.
    """
    endpoint = api.find(Kind.ENDPOINT, name)
    if endpoint is None:
        raise RunPodError(f"there is no endpoint named {name}", 404)
    health = api.health(endpoint["id"])
    return {
        "endpoint_id": endpoint["id"],
        "name": name,
        "image": endpoint.get("image"),
        "gpu": ", ".join((endpoint.get("gpu") or {}).get("pools", [])),
        "limits": endpoint["workers"],
        "workers": health.get("workers", {}),
        "jobs": health.get("jobs", {}),
    }


def existing(api: RunPodApi, name: str) -> list[tuple[Kind, Resource]]:
    """The endpoint and the template of that name, in the order in which they must be deleted."""
    found = [(kind, api.find(kind, name)) for kind in (Kind.ENDPOINT, Kind.TEMPLATE)]
    return [(kind, resource) for kind, resource in found if resource is not None]


def _difference(kind: Kind, wanted: Resource, current: Resource | None) -> Change:
    before = current or {}
    body = {field: value for field, value in wanted.items() if not _is_current(field, value, before)}
    return Change(kind, wanted["name"], current, body)


def _is_current(field: str, value: object, current: Resource) -> bool:
    present = current.get(field)
    if isinstance(value, dict) and isinstance(present, dict) and field != "env":
        return {**present, **value} == present  # RunPod adds parts to its answer
    return field in current and bool(present == value)


def _apply_change(api: RunPodApi, change: Change, body: Resource) -> Resource:
    if change.current is None:
        return api.create(change.kind, body)
    if body:
        return api.update(change.kind, change.current["id"], body)
    return change.current


def _env_change(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    signs = {
        name: "+" if name not in before else "-" if name not in after else "~"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    }
    return " ".join(f"{sign}{name}" for name, sign in signs.items()) or "none"
