"""`hunyuan deploy`: describes a deployment on RunPod, plans the changes to reach it, and applies them.

A template holds the container's settings: image, disk, environment. RunPod copies a template into an endpoint when a
request names it and does not link the two, so every update of the template is followed by one of the endpoint.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from contract.job import Profile
from hunyuan.deploy.runpod_api import Kind, Resource, RunPodApi, RunPodError
from hunyuan.settings import BUCKET_SECRET, REQUIRED_BUCKET_VARIABLES

#: The fields that an endpoint copies from its template.
_CONTAINER: Final = ("image", "disk", "env", "registry")
#: RunPod adds a worker when a job has waited for this many seconds; its default.
_QUEUE_DELAY: Final = 4


@dataclass(frozen=True)
class Sizing:
    """The GPU pools of a profile, the preferred one first, and the seconds that one job may run."""

    pools: tuple[str, ...]
    execution_timeout: int


#: Every profile runs on 24 GB, streamed from host memory; the slower profiles get GPUs that hold more of the model and
#: compute faster (docs/performance.md). Timeouts are at least twice what `hunyuan plan` calculates for 10 s at 1080p on
#: the slowest of the pools; the API's default is 300 s. At most three pools, of
#: https://docs.runpod.io/references/gpu-types.
SIZES: Final[Mapping[Profile, Sizing]] = {
    Profile.TURBO: Sizing(("ADA_24", "ADA_48_PRO"), 1800),
    Profile.FAST: Sizing(("ADA_24", "ADA_48_PRO"), 21600),
    Profile.BALANCED: Sizing(("ADA_48_PRO", "AMPERE_80", "ADA_80_PRO"), 14400),
    Profile.QUALITY: Sizing(("ADA_80_PRO", "HOPPER_141", "AMPERE_80"), 36000),
}

_SECRET_OPTION: Final = re.compile(r"([A-Z_][A-Z0-9_]*)=([A-Za-z0-9_-]+)")
#: RunPod replaces this by the secret when a worker starts. Source: https://docs.runpod.io/pods/templates/secrets
_PLACEHOLDER: Final = "{{{{ RUNPOD_SECRET_{} }}}}"


class IncompleteError(Exception):
    """The workers' environment is incomplete or wrong; the message names the variable or option."""


def worker_variables(environment: Mapping[str, str], profile: Profile, secrets: Iterable[str]) -> dict[str, str]:
    """The workers' environment: ours, the profile, and a placeholder for each of `secrets` (`VARIABLE=SECRET`).

    Raises:
        IncompleteError: only a part of BUCKET_* is set, or one of `secrets` is malformed.
    """
    variables = {**environment, "HUNYUAN_PROFILE": profile.value}
    for option in secrets:
        parts = _SECRET_OPTION.fullmatch(option)
        if parts is None:
            raise IncompleteError("--secret takes VARIABLE=SECRET, where SECRET is the name of a secret at RunPod")
        variables[parts[1]] = _PLACEHOLDER.format(parts[2])
    missing = [name for name in REQUIRED_BUCKET_VARIABLES if name not in variables]
    if missing and len(missing) < len(REQUIRED_BUCKET_VARIABLES):
        raise IncompleteError(f"{', '.join(missing)}: Field required")
    return variables


@dataclass(frozen=True)
class Deployment:
    """A template and an endpoint of one name. Times in seconds, `disk` in GB."""

    name: str
    image: str
    env: Mapping[str, str]
    pools: tuple[str, ...]
    execution_timeout: int
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
                "count": 1,
                "minCudaVersion": self.min_cuda,
                "allowedCudaVersions": [],  # RunPod refuses both fields at once
            },
            "workers": {"min": self.min_workers, "max": self.max_workers, "idleTimeout": self.idle_timeout},
            "scaling": {"type": "QUEUE_DELAY", "queueDelay": _QUEUE_DELAY},
            "timeout": self.execution_timeout * 1000,
            "flashboot": "FLASHBOOT",
            "networkVolumes": [self.network_volume] if self.network_volume else [],
        }

    @property
    def secrets(self) -> tuple[str, ...]:
        """The values in `env` that must not be printed."""
        value = self.env.get(BUCKET_SECRET, "")
        return (value,) if value and not value.startswith("{{ RUNPOD_SECRET_") else ()

    def warnings(self) -> Iterator[str]:
        """Warnings about a deployment that works but may not be what the operator wants."""
        if BUCKET_SECRET not in self.env:
            yield "warning: no BUCKET_* is set: workers can store only the videos of jobs that carry an s3Config"
        if self.secrets:
            yield (
                f"warning: the template will contain {BUCKET_SECRET} in clear text; "
                f"store it at RunPod and pass --secret {BUCKET_SECRET}=NAME"
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
    """The changes that `apply` makes."""

    template: Change
    endpoint: Change

    def lines(self) -> Iterator[str]:
        """All changes as text."""
        yield from self.template.lines()
        yield from self.endpoint.lines()


def plan(api: RunPodApi, wanted: Deployment) -> Plan:
    """The changes from what RunPod has to `wanted`. Changes nothing.

    Raises:
        RunPodError: also if the endpoint of that name has no job queue.
    """
    endpoint = api.find(Kind.ENDPOINT, wanted.name)
    if endpoint is not None:
        endpoint = {"type": "QUEUE", **endpoint}  # RunPod may omit it
        if endpoint["type"] != "QUEUE":
            raise RunPodError(
                f"endpoint {wanted.name} has type {endpoint['type']}, which can't be changed; pass another --name"
            )
    return Plan(
        _difference(Kind.TEMPLATE, wanted.template(), api.find(Kind.TEMPLATE, wanted.name)),
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
