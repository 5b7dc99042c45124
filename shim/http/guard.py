"""What stands before every route, those to come included: the key, the browsers' origins, the safe headers.

Plain ASGI, so that a stream stays a stream and a client that leaves is seen to leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shim.access import ApiKeys
from shim.api import page
from shim.errors import ApiError, ServerErrorCode

DOCS_PATH: Final = "/docs"
#: What needs no key: for load balancers, and what is the same on every server.
OPEN_PATHS: Final = frozenset({"/health", "/ready", DOCS_PATH, "/openapi.json"}) | page.PATHS
#: The platform's routes: each checks the platform's own token.
PLATFORM_PREFIX: Final = "/v2/"
#: An answer is no place for scripts, frames or forms; a browser that opens a video may play it.
_POLICY: Final = "default-src 'none'; media-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
#: FastAPI's page loads Swagger UI from its usual place, and starts it with a script of its own.
_DOCS_POLICY: Final = (
    "default-src 'none'; connect-src 'self'; img-src data: https://fastapi.tiangolo.com; frame-ancestors 'none'; "
    "script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net"
)
_CORS_REQUEST: Final = ("Authorization", "X-API-Key", "Content-Type", "Idempotency-Key", "Range", "X-Request-ID")
_CORS_ANSWER: Final = ("Retry-After", "Content-Range", "Content-Length", "Accept-Ranges", "ETag", "X-Request-ID")


def guarded(app: ASGIApp, keys: ApiKeys, cors_origins: Sequence[str]) -> ASGIApp:
    """`app` behind everything in this module. Outside of its error handling: a 500 has the headers, too."""
    if keys:
        app = RequireKey(app, keys)
    if cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=_CORS_REQUEST,
            expose_headers=_CORS_ANSWER,
        )
    return SafeHeaders(app)


def error_response(error: ApiError) -> Response:
    """An error as clients get it."""
    return JSONResponse(error.body.model_dump(mode="json"), status_code=error.status, headers=error.headers)


class RequireKey:
    """Lets through who has a key, whatever the path; but for OPEN_PATHS, and the platform's own.

    The scope's `state["client"]` is then the key's name, None for who came without one.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        name = self._keys.name_of(_given_key(Headers(scope=scope)).encode("latin-1"))
        if name is None and scope["path"] not in OPEN_PATHS and not scope["path"].startswith(PLATFORM_PREFIX):
            error = ApiError(
                ServerErrorCode.UNAUTHORIZED,
                "an API key is needed: send it as Authorization: Bearer KEY, or X-API-Key: KEY",
                {"WWW-Authenticate": "Bearer"},
            )
            await error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["client"] = name
        await self._app(scope, receive, send)


def _given_key(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


class SafeHeaders:
    """Tells browsers to trust an answer with nothing, and caches to keep none, where the route says no other."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        policy = _DOCS_POLICY if scope["path"] == DOCS_PATH else _POLICY

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers.setdefault("Content-Security-Policy", policy)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, send_safely)
