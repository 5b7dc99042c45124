"""`make api-page` writes docs/api.md from the server's OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import HttpUrl, SecretStr

from shim.app import create_app
from shim.queue.runpod import RunPodQueue
from storage.bucket import Bucket
from storage.settings import BucketSettings

#: An enumeration with more values than this has its own page. Only the error codes do.
_MANY: Final = 8
PAGE: Final = Path(__file__).parents[1] / "docs" / "api.md"
_INTRODUCTION: Final = """# API

`make api-page` generates this page from the server's OpenAPI document (`/openapi.json`; try it at `/docs`).
[The API reference](api-reference.md) states what never changes, and [errors.md](errors.md) lists the errors. A server
with API keys requires one on every path except /health and /ready: `Authorization: Bearer KEY` or `X-API-Key: KEY`.
"""

Document = Mapping[str, Any]


def openapi() -> Document:
    """The server's OpenAPI document. Connects to no queue and no bucket."""
    nowhere = HttpUrl("http://127.0.0.1:9")
    bucket = BucketSettings(endpoint_url=nowhere, access_key_id="none", secret_access_key=SecretStr("none"))
    return create_app(RunPodQueue(endpoint_id="none", api_key="none"), Bucket(bucket)).openapi()


def page(document: Document) -> str:
    """The text of docs/api.md."""
    parts = [_INTRODUCTION]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method != "head":
                parts += _operation(document, f"{method.upper()} {path}", operation)
    return "\n".join(parts)


def _body(document: Document, content: Document) -> Iterator[str]:
    if "application/json" not in content:
        yield f"Body: {', '.join(content)}\n"
        return
    yield "Body, application/json:\n"
    schema = content["application/json"]["schema"]
    yield _table("| field | type | default | |", _fields(document, schema, with_default=True))


def _operation(document: Document, name: str, operation: Document) -> Iterator[str]:
    yield f"## {name}\n\n{operation['description']}\n"
    body = operation.get("requestBody")
    if body is not None:
        yield from _body(document, body["content"])
    for place, title in (("query", "parameter"), ("header", "header")):
        given = [one for one in operation.get("parameters", []) if one["in"] == place]
        if given:
            yield _table(f"| {title} | type | |", (_parameter(document, one) for one in given))
    responses = {int(status): one for status, one in operation["responses"].items() if status != "422"}
    for status, response in sorted(responses.items()):
        if status < 300:
            for model in _models(document, response):
                yield f"{status}, {_lower(model['description'])}\n"
                yield _table("| field | type | |", _fields(document, model, with_default=False))
    errors = ", ".join(str(status) for status in sorted(responses) if status >= 300)
    yield f"Other status codes: {errors}.\n"


def _parameter(document: Document, given: Document) -> str:
    default = f" Default: {given['schema']['default']}." if "default" in given["schema"] else ""
    return f"| `{given['name']}` | {_type(document, given['schema'])} | {given['description']}{default} |"


def _models(document: Document, response: Document) -> Iterator[Document]:
    """The schemas that a response may have, with references resolved."""
    schema = response.get("content", {}).get("application/json", {}).get("schema", {})
    for one in schema.get("anyOf", [schema]):
        if "$ref" in one:
            yield document["components"]["schemas"][one["$ref"].rpartition("/")[2]]


def _fields(document: Document, schema: Document, *, with_default: bool) -> Iterator[str]:
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        cells = [f"`{name}`", _type(document, field)]
        if with_default:
            cells.append("required" if name in required else f"`{field['default']}`" if "default" in field else "")
        yield f"| {' | '.join([*cells, field.get('description', '')])} |"


def _type(document: Document, field: Document) -> str:
    if "anyOf" in field:
        return " or ".join(_type(document, one) for one in field["anyOf"])
    if "$ref" in field:
        return _type(document, document["components"]["schemas"][field["$ref"].rpartition("/")[2]])
    if "enum" in field:
        many = len(field["enum"]) > _MANY
        return "see [errors.md](errors.md)" if many else ", ".join(f'"{value}"' for value in field["enum"])
    if "const" in field:
        return f'"{field["const"]}"'
    if "properties" in field:
        return f"object of {', '.join(f'`{name}`' for name in field['properties'])}"
    for low, high in (("minimum", "maximum"), ("minLength", "maxLength")):
        if low in field and high in field:
            unit = " characters" if low == "minLength" else ""
            return f"{field['type']}, {field[low]:.0f}-{field[high]:.0f}{unit}"
    return str(field.get("type", "any"))


def _table(head: str, rows: Iterator[str]) -> str:
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows, ""])


def _lower(text: str) -> str:
    return f"{text[0].lower()}{text[1:].rstrip('.')}:"


def main() -> None:
    """Writes docs/api.md."""
    PAGE.write_text(page(openapi()))


if __name__ == "__main__":
    main()
