"""`make runpod-schema` compares RunPod's published OpenAPI document with infra/runpod/api.schema.json.

Our schema restates the request bodies that `hunyuan deploy` sends. The comparison fails if a field or a value that we
restate is gone, or if RunPod requires a field that we do not require. Fields that RunPod added are printed only.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

SCHEMA: Final = Path(__file__).parents[1] / "infra" / "runpod" / "api.schema.json"
PUBLISHED: Final = "https://api.runpod.io/v2/openapi.json"
_TIMEOUT: Final = 60.0

Schema = dict[str, Any]


class Shape:
    """The fields of a request body, by dotted path: each field's listed values, and the required fields at the top."""

    def __init__(self, body: Schema, document: Schema) -> None:
        self.values: dict[str, set[Any]] = {}
        self.required: set[str] = set()
        self._document = document
        self._read(body, "")

    def _read(self, schema: Schema, path: str, seen: tuple[str, ...] = ()) -> None:
        if (reference := schema.get("$ref")) is not None:
            if reference in seen:
                return
            self._read(_resolve(reference, self._document), path, (*seen, reference))
        if path:
            listed = schema.get("enum", [schema["const"]] if "const" in schema else [])
            self.values.setdefault(path, set()).update(listed)
        else:
            self.required |= set(schema.get("required", []))
        for name, field in schema.get("properties", {}).items():
            self._read(field, f"{path}.{name}" if path else name, seen)
        for part in _alternatives(schema):
            alternative = {**part, "required": []} if not path and part not in schema.get("allOf", []) else part
            self._read(alternative, path, seen)


def _alternatives(schema: Schema) -> Iterator[Schema]:
    for keyword in ("allOf", "oneOf", "anyOf"):
        yield from schema.get(keyword, [])


def _resolve(reference: str, document: Schema) -> Schema:
    found: Any = document
    for part in reference.removeprefix("#/").split("/"):
        found = found[part.replace("~1", "/").replace("~0", "~")]
    return dict(found)


def published_body(document: Schema, request: str) -> Schema | None:
    """The body of `POST serverless` or the like, or None if RunPod documents no such request."""
    method, _, resource = request.partition(" ")
    for path, operations in document["paths"].items():
        last = [part for part in path.strip("/").split("/") if not part.startswith("{")][-1:]
        if last == [resource] and path.endswith("}") == (method == "PATCH") and method.lower() in operations:
            content = operations[method.lower()].get("requestBody", {}).get("content", {})
            return dict(content.get("application/json", {}).get("schema", {}))
    return None


def compare(ours: Schema, published: Schema) -> tuple[list[str], list[str]]:
    """The differences that break our requests, and the fields that RunPod has and our schema has not."""
    broken: list[str] = []
    added: list[str] = []
    for request in (name for name in ours["$defs"] if " " in name):
        body = published_body(published, request)
        if body is None:
            broken.append(f"{request}: RunPod documents no such request")
            continue
        here, there = Shape(ours["$defs"][request], ours), Shape(body, published)
        for field, values in sorted(here.values.items()):
            if field not in there.values:
                broken.append(f"{request}: RunPod does not document the field {field}")
            elif there.values[field] and (gone := values - there.values[field]):
                broken.append(f"{request}: {field} does not take {', '.join(map(str, sorted(gone)))}")
        broken += [f"{request}: RunPod requires {field}" for field in sorted(there.required - here.required)]
        added += [f"{request}: {field}" for field in sorted(there.values.keys() - here.values.keys())]
    return broken, added


def main(
    source: Annotated[str, typer.Argument(help="URL or file of the OpenAPI document.")] = PUBLISHED,
) -> None:
    """Compares RunPod's OpenAPI document with our schema of its requests."""
    if source.startswith("https://"):
        with urllib.request.urlopen(source, timeout=_TIMEOUT) as answer:  # nosec B310 - https only
            published = json.load(answer)
    else:
        published = json.loads(Path(source).read_text())
    broken, added = compare(json.loads(SCHEMA.read_text()), published)
    for line in added:
        print(f"not in our schema: {line}")
    if broken:
        sys.exit("\n".join([f"{SCHEMA.name} does not agree with {source}:", *broken]))


if __name__ == "__main__":
    typer.run(main)
