"""What `hunyuan deploy` wants to have on RunPod, how that differs from what is there, and making it so.

A template holds the container's settings: image, disk, environment. RunPod copies a template into an endpoint when it
is named in a request and keeps no link, so each change of the template is followed by one of the endpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from contract.job import Profile
from hunyuan.deploy.runpod_api import Kind, Resource, RunPodApi, RunPodError
from storage.settings import BucketSettings

#: What an endpoint takes from its template.
_CONTAINER: Final = ("image", "disk", "env", "registry")
#: A worker is added when a job has waited so long, in seconds: RunPod's own default.
_QUEUE_DELAY: Final = 4


@dataclass(frozen=True)
class Sizing:
    """What a profile takes: GPU pools, the first preferred, and the seconds that one job may run."""

    pools: tuple[str, ...]
    execution_timeout: int


#: Any profile runs from 24 GB on, streamed; the slower ones get GPUs that hold more of it and compute faster
#: (docs/performance.md). Timeouts are at least twice what `shim.estimates` reckons for the longest video at 1080p; the
#: API's default of 300 s is less. Pools: https://docs.runpod.io/references/gpu-types; an endpoint takes up to three.
SIZES: Final[Mapping[Profile, Sizing]] = {
    Profile.FAST: Sizing(("ADA_24", "ADA_48_PRO"), 900),
    Profile.BALANCED: Sizing(("ADA_48_PRO", "AMPERE_80", "ADA_80_PRO"), 1800),
    Profile.QUALITY: Sizing(("ADA_80_PRO", "HOPPER_141", "AMPERE_80"), 7200),
}

_BUCKET: Final = [str(field.validation_alias) for field in BucketSettings.model_fields.values() if field.is_required()]
_SECRET: Final = "BUCKET_SECRET_ACCESS_KEY"  # noqa: S105 - its name
#: `VARIABLE=SECRET`, and what RunPod puts the secret in place of when a worker starts. Source:
#: https://docs.runpod.io/pods/templates/secrets
_REFERENCE: Final = re.compile(r"([A-Z_][A-Z0-9_]*)=([A-Za-z0-9_-]+)")
_REFERENCED: Final = "{{{{ RUNPOD_SECRET_{} }}}}"


class IncompleteError(Exception):
    """The workers' environment can't be put together; the text says which part is missing or wrong."""


def worker_variables(environment: Mapping[str, str], profile: Profile, references: Iterable[str]) -> dict[str, str]:
    """The workers' environment: ours, the profile, and what `references` (`VARIABLE=SECRET`) say is kept at RunPod.

    Raises:
        IncompleteError: the bucket is named in part, or a reference is none.
    """
    variables = {**environment, "HUNYUAN_PROFILE": profile.value}
    for reference in references:
        parts = _REFERENCE.fullmatch(reference)
        if parts is None:
            raise IncompleteError("--secret takes VARIABLE=SECRET, SECRET being the name of a secret at RunPod")
        variables[parts[1]] = _REFERENCED.format(parts[2])
    missing = [name for name in _BUCKET if name not in variables]
    if missing and missing != _BUCKET:
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
        """As POST /v2/templates takes it."""
        return {
            "name": self.name,
            **self._container(),
            "serverless": True,
            "public": False,
            "startSsh": False,
            "startJupyter": False,
        }

    def endpoint(self) -> Resource:
        """As POST /v2/serverless takes it, with the container's settings written out."""
        return {
            "name": self.name,
            "type": "QUEUE",
            **self._container(),
            "gpu": {
                "pools": list(self.pools),
                "count": 1,
                "minCudaVersion": self.min_cuda,
                "allowedCudaVersions": [],  # both at once are refused
            },
            "workers": {"min": self.min_workers, "max": self.max_workers, "idleTimeout": self.idle_timeout},
            "scaling": {"type": "QUEUE_DELAY", "queueDelay": _QUEUE_DELAY},
            "timeout": self.execution_timeout * 1000,
            "flashboot": "FLASHBOOT",
            "networkVolumes": [self.network_volume] if self.network_volume else [],
        }

    @property
    def secrets(self) -> tuple[str, ...]:
        """What of `env` nobody may read."""
        value = self.env.get(_SECRET, "")
        return (value,) if value and not value.startswith("{{ RUNPOD_SECRET_") else ()

    def warnings(self) -> Iterator[str]:
        """What works, and is perhaps not what was meant."""
        if _SECRET not in self.env:
            yield "warning: no BUCKET_* is set: only jobs that bring an s3Config can be stored"
        if self.secrets:
            yield f"warning: {_SECRET} will stand in the template in clear: see --secret"

    def _container(self) -> Resource:
        return {"image": self.image, "disk": self.disk, "env": dict(self.env), "registry": self.registry}


@dataclass(frozen=True)
class Change:
    """What is to be done about one resource: `body` has the fields that are not as they should be, perhaps none."""

    kind: Kind
    name: str
    there: Resource | None
    body: Resource

    def lines(self) -> Iterator[str]:
        """What will be done, for people to read; of the environment the names and no value."""
        if not self.body:
            yield f"{self.kind} {self.name}: as it should be"
            return
        yield f"{self.kind} {self.name}: {'create' if self.there is None else 'update'}"
        before = self.there or {}
        for field, value in self.body.items():
            if field == "env":
                yield f"  env: {_env_change(before.get('env') or {}, value)}"
            elif self.there is None:
                yield f"  {field}: {json.dumps(value)}"
            else:
                yield f"  {field}: {json.dumps(before.get(field))} -> {json.dumps(value)}"


@dataclass(frozen=True)
class Plan:
    """What `apply` will do."""

    template: Change
    endpoint: Change

    def lines(self) -> Iterator[str]:
        """All of it, for people to read."""
        yield from self.template.lines()
        yield from self.endpoint.lines()


def plan(api: RunPodApi, wanted: Deployment) -> Plan:
    """How what is there differs from what is wanted. Changes nothing.

    Raises:
        RunPodError: also where the endpoint of that name is one that no job queue feeds.
    """
    endpoint = api.find(Kind.ENDPOINT, wanted.name)
    if endpoint is not None:
        endpoint = {"type": "QUEUE", **endpoint}  # RunPod may leave it out, and takes no update of it
        if endpoint["type"] != "QUEUE":
            raise RunPodError(f"endpoint {wanted.name} is of type {endpoint['type']} for good: choose another --name")
    return Plan(
        _difference(Kind.TEMPLATE, wanted.template(), api.find(Kind.TEMPLATE, wanted.name)),
        _difference(Kind.ENDPOINT, wanted.endpoint(), endpoint),
    )


def apply(api: RunPodApi, planned: Plan) -> Resource:
    """Do it; the endpoint. Cut short, it is finished by planning and applying once more."""
    template = _carry_out(api, planned.template, planned.template.body)
    body = planned.endpoint.body
    if body.keys() & set(_CONTAINER):
        others = {field: value for field, value in body.items() if field not in _CONTAINER}
        body = {**others, "templateId": template["id"]}
    return _carry_out(api, planned.endpoint, body)


def status(api: RunPodApi, name: str) -> Resource:
    """What runs there and how it fares.

    Raises:
        RunPodError: also with status 404, where there is no endpoint of that name.
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
    """What there is of that name, in the order in which it can be deleted."""
    found = [(kind, api.find(kind, name)) for kind in (Kind.ENDPOINT, Kind.TEMPLATE)]
    return [(kind, resource) for kind, resource in found if resource is not None]


def _difference(kind: Kind, wanted: Resource, there: Resource | None) -> Change:
    before = there or {}
    body = {field: value for field, value in wanted.items() if not _holds(field, value, before)}
    return Change(kind, wanted["name"], there, body)


def _holds(field: str, value: object, there: Resource) -> bool:
    present = there.get(field)
    if isinstance(value, dict) and isinstance(present, dict) and field != "env":
        return {**present, **value} == present  # RunPod answers with more parts than were sent
    return field in there and bool(present == value)


def _carry_out(api: RunPodApi, change: Change, body: Resource) -> Resource:
    if change.there is None:
        return api.create(change.kind, body)
    if body:
        return api.update(change.kind, change.there["id"], body)
    return change.there


def _env_change(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    signs = {
        name: "+" if name not in before else "-" if name not in after else "~"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    }
    return " ".join(f"{sign}{name}" for name, sign in signs.items()) or "none"
