"""A stand-in for one account at RunPod: its management API v2 over real HTTP, and its endpoints' /health.

Requests are validated against infra/runpod/api.schema.json, which has exactly the documented fields. The behaviour is
the documented one, too: an endpoint copies the template that a request names and is not linked to it, PATCH changes the
fields that it gets, and an answer has more fields than the request.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from jsonschema import Draft202012Validator

SCHEMA = json.loads((Path(__file__).parents[2] / "infra" / "runpod" / "api.schema.json").read_text())
KEY = "rpa_a-key-of-the-tests"
LISTED = {"templates": "templates", "serverless": "endpoints"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "templates": {
        "args": "",
        "ports": [],
        "mounts": {},
        "category": "NVIDIA",
        "startSsh": True,
        "startJupyter": True,
        "allowedCudaVersions": [],
    },
    "serverless": {
        "args": "",
        "ports": [],
        "dataCenterIds": [],
        "networkVolumes": [],
        "timeout": 300_000,
        "flashboot": "OFF",
        "createdAt": "2026-06-01T12:00:00Z",
    },
}


@dataclass
class Fault:
    """Replaces one answer; `late` means after the request was carried out."""

    method: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    late: bool = False
    detail: str = "later"


@dataclass
class Account:
    """Templates and endpoints by id, and every authorised request as (method and path, body)."""

    resources: dict[str, dict[str, dict[str, Any]]] = field(default_factory=lambda: {"templates": {}, "serverless": {}})
    requests: list[tuple[str, Any]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ids: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def template(self) -> dict[str, Any]:
        """The only one."""
        (template,) = self.resources["templates"].values()
        return template

    @property
    def endpoint(self) -> dict[str, Any]:
        """The only one."""
        (endpoint,) = self.resources["serverless"].values()
        return endpoint

    def writes(self) -> list[str]:
        """The requests since the last call, without GETs."""
        seen = [line for line, _ in self.requests if not line.startswith("GET")]
        self.requests.clear()
        return seen

    def app(self) -> FastAPI:
        """The management API under /manage and the endpoints' API under /endpoints."""
        app = FastAPI()
        methods = ["GET", "POST", "PATCH", "DELETE"]
        app.add_api_route("/endpoints/{resource_id}/health", self._health, response_model=None)
        app.add_api_route("/manage/{path}", self._manage, methods=methods, response_model=None)
        app.add_api_route("/manage/{path}/{resource_id}", self._manage, methods=methods, response_model=None)
        return app

    async def _health(self, request: Request, resource_id: str) -> Response:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return problem(401, "missing bearer token")
        assert resource_id in self.resources["serverless"]
        jobs = {"completed": 3, "failed": 0, "inProgress": 1, "inQueue": 2, "retried": 0}
        return JSONResponse({"jobs": jobs, "workers": {"idle": 0, "running": 1}})

    async def _manage(self, request: Request, path: str, resource_id: str | None = None) -> Response:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return problem(401, "missing bearer token")
        body = json.loads(content) if (content := await request.body()) else None
        self.requests.append((f"{request.method} {request.url.path.removeprefix('/manage')}", body))
        fault = next((each for each in self.faults if each.method == request.method), None)
        if fault is not None:
            self.faults.remove(fault)
        if fault is None or fault.late:
            answer = self._answer(request.method, path, resource_id, body)
        return answer if fault is None else problem(fault.status, fault.detail, headers=fault.headers)

    def _answer(self, method: str, path: str, resource_id: str | None, body: Any) -> Response:
        kept = self.resources.get(path)
        if kept is None or (resource_id is not None and resource_id not in kept):
            return problem(404, "resource not found")
        if method in ("POST", "PATCH"):
            schema = {**SCHEMA, "$ref": f"#/$defs/{method} {path}"}
            errors = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(body)]
            if errors:
                return problem(422, "Request validation failed.", errors=errors)
        match method, resource_id:
            case "GET", None:
                return JSONResponse({LISTED[path]: list(kept.values())})
            case "POST", None:
                made = {"id": f"{path[:2]}{next(self.ids)}", **DEFAULTS[path]}
                kept[made["id"]] = self._changed(path, made, body)
                return JSONResponse(kept[made["id"]], 201)
            case "PATCH", str(wanted):
                kept[wanted] = self._changed(path, kept[wanted], body)
                return JSONResponse(kept[wanted])
            case "DELETE", str(wanted):
                del kept[wanted]
                return Response(status_code=204)
        return problem(405, "method not allowed")

    def _changed(self, path: str, before: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        given = dict(body)
        template = self.resources["templates"].get(given.pop("templateId", ""), {})
        container = {name: template[name] for name in ("image", "args", "disk", "ports", "env", "registry") if template}
        after = {**before, **container, **given}
        if path == "serverless":
            after["gpu"] = {"count": 1, "minCudaVersion": None, **before.get("gpu", {}), **given.get("gpu", {})}
            after["workers"] = {
                "min": 0,
                "max": 3,
                "idleTimeout": 10,
                **given.get("workers", before.get("workers", {})),
            }
        return after


def problem(
    status: int, detail: str, errors: Sequence[str] = (), headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error in the form of RFC 9457."""
    body = {"title": "Error", "status": status, "detail": detail, "errors": list(errors)}
    return JSONResponse(body, status, headers, media_type="application/problem+json")
