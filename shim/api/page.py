"""The web page: GET /, and its files under /static. The files are read once, when the server starts."""

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
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
#: The page loads everything from this server and has nothing inline. A blob is a video that was fetched with a key.
_POLICY: Final = (
    "default-src 'self'; media-src 'self' blob:; object-src 'none'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'; require-trusted-types-for 'script'"
)


@dataclass(frozen=True)
class _File:
    body: bytes
    media_type: str

    @property
    def headers(self) -> dict[str, str]:
        return {
            "ETag": f'"{hashlib.sha256(self.body).hexdigest()}"',
            "Cache-Control": "no-cache",  # a browser asks each time, so its files are all of one version
            "Content-Security-Policy": _POLICY,
        }


def _files() -> dict[str, _File]:
    """Every file of the page by its path on the server; schema.js is JobInput's schema, for the form's fields."""
    found = {}
    for file in resources.files("shim").joinpath("web").iterdir():
        path = "/" if file.name == "index.html" else f"/static/{file.name}"
        found[path] = _File(file.read_bytes(), _MEDIA_TYPES[file.name.rpartition(".")[2]])
    schema = f"export default {json.dumps(schema_of(JobInput))};\n"
    return {**found, "/static/schema.js": _File(schema.encode(), _MEDIA_TYPES["js"])}


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
