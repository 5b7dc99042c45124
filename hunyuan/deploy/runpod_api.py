"""RunPod's management API as far as `hunyuan deploy` needs it: templates and serverless endpoints, found by name.

Source: https://docs.runpod.io/api-reference-v2 and the OpenAPI document beside it, as of 2026-08-20; the endpoint's
health: https://docs.runpod.io/serverless/endpoints/operation-reference. Never run against RunPod itself: the tests'
stand-in holds each request against infra/runpod/api.schema.json, which says the same as those pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, Self

import httpx

from hunyuan.settings import DeploySettings

#: A template, an endpoint or a part of one, as it goes over the wire.
Resource = dict[str, Any]

#: Seconds before a request that RunPod could not take is made again, where it names none itself.
_PAUSES: Final = (1.0, 2.0, 4.0)
#: No Retry-After is waited for longer, in seconds.
_LONGEST_PAUSE: Final = 60.0


class RunPodError(Exception):
    """RunPod did not do what it was asked. `status` is its HTTP status, if it answered."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class RunPodUnreachableError(RunPodError):
    """Nobody answers there."""


class Kind(StrEnum):
    """What there is to manage."""

    TEMPLATE = "template"
    ENDPOINT = "endpoint"

    @property
    def path(self) -> str:
        """Where the API keeps them."""
        return {Kind.TEMPLATE: "templates", Kind.ENDPOINT: "serverless"}[self]


class RunPodApi:
    """One account's templates and endpoints. `secrets` are cut out of what RunPod says before anybody reads it.

    Every method raises RunPodError or RunPodUnreachableError where it must.
    """

    def __init__(self, settings: DeploySettings, secrets: Collection[str] = ()) -> None:
        key = settings.api_key.get_secret_value()
        self._api = str(settings.api_url).rstrip("/")
        self._endpoints = str(settings.endpoint_base_url).rstrip("/")
        self._secrets = (key, *secrets)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}", "User-Agent": "hunyuan-video-service"},
            timeout=httpx.Timeout(30, connect=5),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def find(self, kind: Kind, name: str) -> Resource | None:
        """The one of that name; None if there is none. Names are not unique on RunPod: two are an error."""
        listed: list[Resource] = self._ask("GET", f"{self._api}/{kind.path}").get(f"{kind}s", [])
        found = [resource for resource in listed if resource.get("name") == name]
        if len(found) > 1:
            ids = ", ".join(str(resource["id"]) for resource in found)
            raise RunPodError(f"there are {len(found)} {kind}s named {name} ({ids}): delete or rename all but one")
        return found[0] if found else None

    def create(self, kind: Kind, body: Resource) -> Resource:
        """Make one, and only one: after an answer that was lost it is looked for before it is asked for again."""
        return self._ask(
            "POST", f"{self._api}/{kind.path}", body, done_after_all=lambda: self.find(kind, str(body["name"]))
        )

    def update(self, kind: Kind, resource_id: str, body: Resource) -> Resource:
        """Change the fields that `body` has."""
        return self._ask("PATCH", f"{self._api}/{kind.path}/{resource_id}", body)

    def delete(self, kind: Kind, resource_id: str) -> None:
        """Delete it; that it is gone already is no error."""
        try:
            self._ask("DELETE", f"{self._api}/{kind.path}/{resource_id}")
        except RunPodError as exc:
            if exc.status != 404:
                raise

    def health(self, endpoint_id: str) -> Resource:
        """The numbers of the endpoint's jobs and workers, by state."""
        return self._ask("GET", f"{self._endpoints}/{endpoint_id}/health")

    def _ask(
        self,
        method: str,
        url: str,
        body: Resource | None = None,
        *,
        done_after_all: Callable[[], Resource | None] = lambda: None,
    ) -> Resource:
        """The decoded answer. After 429, 5xx or none at all it is asked again, unless it was `done_after_all`."""
        for pause in (*_PAUSES, None):
            wait = pause
            try:
                response = self._http.request(method, url, json=body)
            except httpx.HTTPError as exc:
                failure: RunPodError = RunPodUnreachableError(f"no answer from {httpx.URL(url).host}: {exc}")
            else:
                if response.status_code < 500 and response.status_code != 429:
                    return self._decoded(response)
                failure = self._refusal(response)
                retry_after = response.headers.get("retry-after", "")
                if wait is not None and retry_after.isdigit():
                    wait = min(float(retry_after), _LONGEST_PAUSE)
            if wait is None:
                raise failure
            time.sleep(wait)
            found = done_after_all()
            if found is not None:
                return found
        raise AssertionError("the last round returns or raises")

    def _decoded(self, response: httpx.Response) -> Resource:
        if response.is_error:
            raise self._refusal(response)
        if response.status_code == 204:
            return {}
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RunPodError(f"{response.url.host} answered with no JSON object: is it RunPod's API?")
        return answer

    def _refusal(self, response: httpx.Response) -> RunPodError:
        """From an answer of the form of RFC 9457, which RunPod's errors have; from any other the status alone."""
        try:
            problem = response.json()
            text = ": ".join([str(problem["detail"]), *map(str, problem.get("errors", []))])
        except (ValueError, KeyError, TypeError, AttributeError):
            text = response.reason_phrase
        for secret in self._secrets:
            text = text.replace(secret, "…")
        said = f"RunPod answered {response.status_code}: {text}"
        if response.status_code in (401, 403):
            said = f"RUNPOD_API_KEY was refused. {said}"
        return RunPodError(said, response.status_code)
