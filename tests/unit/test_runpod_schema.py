"""`make runpod-schema`: what it finds between RunPod's OpenAPI document and our schema."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tools.runpod_schema import SCHEMA, compare

OURS: dict[str, Any] = json.loads(SCHEMA.read_text())


def published() -> dict[str, Any]:
    """An OpenAPI document that documents exactly our requests."""
    text = json.dumps(OURS["$defs"]).replace("#/$defs/", "#/components/schemas/")
    schemas = json.loads(text)
    paths: dict[str, Any] = {}
    for request in (name for name in schemas if " " in name):
        method, resource = request.split()
        path = f"/v2/{resource}/{{id}}" if method == "PATCH" else f"/v2/{resource}"
        body = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{request}"}}}}
        paths.setdefault(path, {})[method.lower()] = {"requestBody": body}
    return {"openapi": "3.1.0", "paths": paths, "components": {"schemas": schemas}}


def test_a_document_that_agrees_has_no_difference() -> None:
    assert compare(OURS, published()) == ([], [])


def test_a_field_that_is_gone_or_renamed_breaks() -> None:
    document = deepcopy(published())
    scaling = document["components"]["schemas"]["scaling"]["oneOf"][0]["properties"]
    scaling["delay"] = scaling.pop("queueDelay")
    broken, added = compare(OURS, document)
    assert "POST serverless: RunPod does not document the field scaling.queueDelay" in broken
    assert "POST serverless: scaling.delay" in added


def test_a_value_that_is_gone_breaks() -> None:
    document = deepcopy(published())
    document["components"]["schemas"]["endpoint"]["properties"]["flashboot"]["enum"].remove("FLASHBOOT")
    assert "PATCH serverless: flashboot does not take FLASHBOOT" in compare(OURS, document)[0]


def test_a_field_that_becomes_required_breaks() -> None:
    document = deepcopy(published())
    document["components"]["schemas"]["POST templates"]["required"].append("category")
    assert compare(OURS, document)[0] == ["POST templates: RunPod requires category"]


def test_a_request_that_is_gone_breaks() -> None:
    document = deepcopy(published())
    del document["paths"]["/v2/templates/{id}"]
    assert compare(OURS, document)[0] == ["PATCH templates: RunPod documents no such request"]


@pytest.mark.parametrize("agrees", [True, False])
def test_the_command_fails_only_if_they_disagree(agrees: bool, tmp_path: Path) -> None:
    document = published()
    if not agrees:
        del document["paths"]["/v2/serverless"]
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(document))
    command = [sys.executable, "-m", "tools.runpod_schema", str(file)]
    done = subprocess.run(command, cwd=SCHEMA.parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == agrees, done.stderr
    assert ("POST serverless" in done.stderr) != agrees
