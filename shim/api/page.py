"""The web page: GET /, its files under /static, and GET /docs. The files are read once, when the server starts."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

from fastapi import APIRouter, Request, Response

from contract.job import JobInput
from shim.api.documented import schema_of
from shim.api.videos import names_etag

_MEDIA_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
#: The page loads everything from this server and has nothing inline. A blob is a video or a poster that was fetched
#: with a key.
_POLICY: Final = (
    "default-src 'self'; media-src 'self' blob:; img-src 'self' blob:; object-src 'none'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
)
#: Swagger UI draws its icons from data URLs.
_DOCS_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_PLACES: Final = {"index.html": "/", "docs.html": "/docs"}


@dataclass(frozen=True)
class _File:
    body: bytes
    media_type: str
    policy: str = _POLICY

    @property
    def headers(self) -> dict[str, str]:
        return {
            "ETag": f'"{hashlib.sha256(self.body).hexdigest()}"',
            "Cache-Control": "no-cache",  # a browser asks each time, so its files are all of one version
            "Content-Security-Policy": self.policy,
        }


def _files() -> dict[str, _File]:
    """Every file of the page by its path on the server; schema.js is JobInput's schema, for the form's fields."""
    web = resources.files("shim").joinpath("web")
    found = {
        _PLACES.get(name, f"/static/{name}"): _File(
            file.read_bytes(), _MEDIA_TYPES[name.rpartition(".")[2]], _DOCS_POLICY if name == "docs.html" else _POLICY
        )
        for name, file in _served(web)
    }
    schema = f"export default {json.dumps(schema_of(JobInput))};\n"
    return {**found, "/static/schema.js": _File(schema.encode(), _MEDIA_TYPES["js"])}


def _served(directory: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    """The files in `directory` that browsers ask for, with their paths: not the licence of Swagger UI."""
    for entry in directory.iterdir():
        if entry.is_dir():
            yield from _served(entry, f"{prefix}{entry.name}/")
        elif entry.name.rpartition(".")[2] in _MEDIA_TYPES:
            yield prefix + entry.name, entry


_FILES: Final = _files()
#: A browser gets these without a key, because it needs the page to ask its user for the key.
PATHS: Final = frozenset(_FILES)

router = APIRouter(include_in_schema=False)


async def _file(request: Request) -> Response:
    file = _FILES[request.scope["route"].path]
    if names_etag(request.headers.get("if-none-match"), file.headers["ETag"]):
        return Response(status_code=304, headers=file.headers)
    return Response(file.body, media_type=file.media_type, headers=file.headers)


for _path in PATHS:
    router.add_api_route(_path, _file, methods=["GET", "HEAD"])
