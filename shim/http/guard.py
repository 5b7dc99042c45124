"""Middleware around every route: the Host, the API key, CORS, and headers that tell browsers to trust nothing.

Plain ASGI, so that responses stay streams and a client's disconnect reaches the route.
"""

from collections.abc import Collection, Sequence
from typing import Final

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shim.access import ApiKeys, is_allowed_host
from shim.errors import ApiError, ServerErrorCode

DOCS_PATH: Final = "/docs"
#: The platform's routes check the platform's own token instead of an API key.
_PLATFORM_PREFIX: Final = "/v2/"
#: Probes name a server as their orchestrator does, and learn nothing but its health.
_PROBES: Final = frozenset({"/health", "/ready"})
#: A response runs no script and shows no frame or form. A browser that opens a video may play it.
_POLICY: Final = b"default-src 'none'; media-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
#: FastAPI's documentation page loads Swagger UI from these hosts and starts it with an inline script.
_DOCS_POLICY: Final = (
    b"default-src 'none'; connect-src 'self'; img-src data: https://fastapi.tiangolo.com; frame-ancestors 'none'; "
    b"script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net"
)
#: On every response, last: no route sets them.
_HEADERS: Final = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
_CORS_REQUEST: Final = ("Authorization", "X-API-Key", "Content-Type", "Idempotency-Key", "Range", "X-Request-ID")
_CORS_RESPONSE: Final = ("Retry-After", "Content-Range", "Content-Length", "Accept-Ranges", "ETag", "X-Request-ID")


def guarded(
    app: ASGIApp,
    keys: ApiKeys,
    open_paths: Collection[str],
    cors_origins: Sequence[str],
    allowed_hosts: Collection[str] | None = None,
) -> ASGIApp:
    """`app` inside this module's middleware, which surrounds the error handling too: a 500 has the headers."""
    if allowed_hosts is not None:
        app = CheckHost(app, allowed_hosts)
    if keys:
        app = RequireKey(app, keys, open_paths)
    if cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=_CORS_REQUEST,
            expose_headers=_CORS_RESPONSE,
        )
    return SafeHeaders(app)


def error_response(error: ApiError) -> Response:
    """An error as clients get it."""
    return JSONResponse(error.body.model_dump(mode="json"), status_code=error.status, headers=error.headers)


class CheckHost:
    """Rejects a request whose Host is a name that is not in `allowed`, except probes and the platform's routes.

    A web page can make its own name resolve to this server's address, and then reads the responses as its own. The
    browser still sends the page's name.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_allowed(scope):
            error = ApiError(
                ServerErrorCode.HOST_NOT_ALLOWED,
                "the Host header names another host; use the server's IP address, or add the name to "
                "HUNYUAN_ALLOWED_HOSTS",
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if scope["path"] in _PROBES or scope["path"].startswith(_PLATFORM_PREFIX):
            return True
        return all(is_allowed_host(host, self._allowed) for host in Headers(scope=scope).getlist("host"))


class RequireKey:
    """Rejects a request without a valid API key, except on `open_paths` and on the platform's routes.

    Sets the scope's `state["client"]` to the key's name, or to None for a request without a key.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        name = self._keys.name_of(_key_in(Headers(scope=scope)).encode("latin-1"))
        if name is None and not self._is_open(scope["path"]):
            error = ApiError(
                ServerErrorCode.UNAUTHORIZED,
                "an API key is needed: send it as Authorization: Bearer KEY, or X-API-Key: KEY",
                {"WWW-Authenticate": "Bearer"},
            )
            await error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["client"] = name
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self._open_paths or path.startswith(_PLATFORM_PREFIX)


def _key_in(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


class SafeHeaders:
    """Adds headers that forbid browsers to run anything and caches to store anything. A route may set its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        policy = _DOCS_POLICY if scope["path"] == DOCS_PATH else _POLICY

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                names = {name.lower() for name, _ in headers}
                headers += _HEADERS
                if b"content-security-policy" not in names:
                    headers.append((b"content-security-policy", policy))
                if b"cache-control" not in names:
                    headers.append((b"cache-control", b"no-store"))
                message["headers"] = headers
            await send(message)

        await self._app(scope, receive, send_with_headers)
