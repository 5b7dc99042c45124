"""The part of RunPod's management API that `hunyuan deploy` needs: templates and serverless endpoints, found by name.

Source: https://docs.runpod.io/api-reference-v2 and its OpenAPI document, as of 2026-08-20; an endpoint's health:
https://docs.runpod.io/serverless/endpoints/operation-reference. Never run against RunPod itself: the tests validate
each request against infra/runpod/api.schema.json, which restates those pages.
"""

from collections.abc import Collection
from enum import StrEnum
from typing import Any, Final, Self

import httpx
from tenacity import Retrying

from contract.retry import RetryPolicy
from hunyuan.settings import DeploySettings

#: JSON of a template or an endpoint, or a part of it.
Resource = dict[str, Any]

#: `longest` also bounds what a Retry-After header asks for.
_RETRY: Final = RetryPolicy(first=1.0, longest=60.0, attempts=4)


class RunPodError(Exception):
    """RunPod refused or failed. `status` is the HTTP status of its answer, `retry_after` its Retry-After in seconds."""

    def __init__(self, text: str, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after = retry_after


class RunPodUnreachableError(RunPodError):
    """RunPod did not answer."""


class Kind(StrEnum):
    """A kind of resource."""

    TEMPLATE = "template"
    ENDPOINT = "endpoint"

    @property
    def path(self) -> str:
        """Its path below the API's base URL."""
        return {Kind.TEMPLATE: "templates", Kind.ENDPOINT: "serverless"}[self]


class RunPodApi:
    """One account's templates and endpoints.

    Every method may raise RunPodError or RunPodUnreachableError.
    """

    def __init__(self, settings: DeploySettings) -> None:
        key = settings.api_key.get_secret_value()
        self._api = str(settings.api_url).rstrip("/")
        self._endpoints = str(settings.endpoint_base_url).rstrip("/")
        self._secrets: tuple[str, ...] = (key,)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}", "User-Agent": "hunyuan-video-service"},
            timeout=httpx.Timeout(30, connect=5),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def hide(self, secrets: Collection[str]) -> None:
        """From now on RunPod's error texts are shown without these values, too."""
        self._secrets = (*self._secrets, *secrets)

    def find(self, kind: Kind, name: str) -> Resource | None:
        """The resource of that name, or None. RunPod allows two of one name; that raises RunPodError."""
        listed: list[Resource] = self._ask("GET", f"{self._api}/{kind.path}").get(f"{kind}s", [])
        found = [resource for resource in listed if resource.get("name") == name]
        if len(found) > 1:
            ids = ", ".join(str(resource["id"]) for resource in found)
            raise RunPodError(f"there are {len(found)} {kind}s named {name} ({ids}); delete or rename all but one")
        return found[0] if found else None

    def create(self, kind: Kind, body: Resource) -> Resource:
        """Creates one resource, and only one: a retry first looks whether a lost answer had created it."""
        is_retry = False

        def create_once() -> Resource:
            nonlocal is_retry
            created = self.find(kind, str(body["name"])) if is_retry else None
            is_retry = True
            return created or self._ask_once("POST", f"{self._api}/{kind.path}", body)

        return self._retrying()(create_once)

    def update(self, kind: Kind, resource_id: str, body: Resource) -> Resource:
        """Changes the fields that `body` has."""
        return self._ask("PATCH", f"{self._api}/{kind.path}/{resource_id}", body)

    def delete(self, kind: Kind, resource_id: str) -> None:
        """Deletes the resource; one that does not exist is no error."""
        try:
            self._ask("DELETE", f"{self._api}/{kind.path}/{resource_id}")
        except RunPodError as exc:
            if exc.status != 404:
                raise

    def health(self, endpoint_id: str) -> Resource:
        """How many jobs and workers the endpoint has in each state."""
        return self._ask("GET", f"{self._endpoints}/{endpoint_id}/health")

    def _ask(self, method: str, url: str, body: Resource | None = None) -> Resource:
        """The decoded answer; retried after 429, 5xx or no answer."""
        return self._retrying()(self._ask_once, method, url, body)

    def _retrying(self) -> Retrying:
        return _RETRY.retrying(_is_temporary, what="a request to RunPod", at_least=_retry_after)

    def _ask_once(self, method: str, url: str, body: Resource | None) -> Resource:
        try:
            return self._decoded(self._http.request(method, url, json=body))
        except httpx.HTTPError as exc:
            raise RunPodUnreachableError(f"no answer from {httpx.URL(url).host}: {exc}") from exc

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
            raise RunPodError(
                f"the answer of {response.url.host} is no JSON object; check that RUNPOD_API_URL is RunPod's API"
            )
        return answer

    def _refusal(self, response: httpx.Response) -> RunPodError:
        """RunPod's own error text if the answer has the form of RFC 9457, else the HTTP reason."""
        try:
            problem = response.json()
            text = ": ".join([str(problem["detail"]), *map(str, problem.get("errors", []))])
        except (ValueError, KeyError, TypeError, AttributeError):
            text = response.reason_phrase
        for secret in self._secrets:
            text = text.replace(secret, "…")
        message = f"RunPod answered {response.status_code}: {text}"
        if response.status_code in (401, 403):
            message = f"RUNPOD_API_KEY was refused. {message}"
        retry_after = response.headers.get("retry-after", "")
        return RunPodError(message, response.status_code, float(retry_after) if retry_after.isdigit() else 0.0)


def _is_temporary(exc: BaseException) -> bool:
    return isinstance(exc, RunPodUnreachableError) or (
        isinstance(exc, RunPodError) and exc.status is not None and (exc.status == 429 or exc.status >= 500)
    )


def _retry_after(exc: BaseException) -> float:
    return exc.retry_after if isinstance(exc, RunPodError) else 0.0
