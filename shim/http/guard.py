"""Middleware around every route: the Host, the API key, CORS, and headers that tell browsers to trust nothing.

Plain ASGI, so that responses stay streams and a client's disconnect reaches the route.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Final

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shim.access import Access, ApiKeys, is_allowed_host
from shim.errors import ApiError, ServerErrorCode

#: The platform's routes check the platform's own token instead of an API key.
_PLATFORM_PREFIX: Final = "/v2/"
#: Probes name a server as their orchestrator does, and learn nothing but its health.
_PROBES: Final = frozenset({"/health", "/ready"})
#: A response runs no script and shows no frame or form. A browser that opens a video may play it.
_POLICY: Final = b"default-src 'none'; media-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
#: On every response, last: no route sets them.
_HEADERS: Final = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
_CORS_REQUEST: Final = (
    *("Authorization", "X-API-Key", "Content-Type", "Idempotency-Key", "Range", "X-Request-ID", "Last-Event-ID"),
)
_CORS_RESPONSE: Final = ("Retry-After", "Content-Range", "Content-Length", "Accept-Ranges", "ETag", "X-Request-ID")


def guarded(app: ASGIApp, access: Access, open_paths: Collection[str]) -> ASGIApp:
    """`app` inside this module's middleware, which surrounds the error handling too: a 500 has the headers."""
    checks: list[Callable[[Scope], None]] = []
    if access.api_keys:
        checks.append(partial(_check_key, keys=ApiKeys(access.api_keys), open_paths=open_paths))
    if access.allowed_hosts is not None:
        checks.append(partial(_check_host, allowed=access.allowed_hosts))
    app = Guard(app, checks)
    if access.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=access.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=_CORS_REQUEST,
            expose_headers=_CORS_RESPONSE,
        )
    return SafeHeaders(app)


def error_response(error: ApiError, path: str) -> Response:
    """An error as clients of `path` get it."""
    return JSONResponse(error.shown(path), status_code=error.status, headers=error.headers)


class Guard:
    """Rejects a request with the ApiError that one of `checks` raises."""

    def __init__(self, app: ASGIApp, checks: Sequence[Callable[[Scope], None]]) -> None:
        self._app = app
        self._checks = checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] != "lifespan":
            try:
                for check in self._checks:
                    check(scope)
            except ApiError as exc:
                app = error_response(exc, scope.get("path", ""))
        await app(scope, receive, send)


def _check_key(scope: Scope, *, keys: ApiKeys, open_paths: Collection[str]) -> None:
    """A request needs a valid API key, except on `open_paths` and on the platform's routes.

    Sets the scope's `state["client"]` to the key's name, or to None for a request without a key.
    """
    name = keys.name_of(_key_in(Headers(scope=scope)).encode("latin-1"))
    if name is None and not (scope["path"] in open_paths or scope["path"].startswith(_PLATFORM_PREFIX)):
        raise ApiError(
            ServerErrorCode.UNAUTHORIZED,
            "an API key is needed: send it as Authorization: Bearer KEY, or X-API-Key: KEY",
            {"WWW-Authenticate": "Bearer"},
        )
    scope.setdefault("state", {})["client"] = name


def _key_in(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _check_host(scope: Scope, *, allowed: Collection[str]) -> None:
    """The Host must be an address or a name in `allowed`, except on probes and on the platform's routes.

    A web page can make its own name resolve to this server's address, and then reads the responses as its own. The
    browser still sends the page's name.
    """
    if scope["path"] in _PROBES or scope["path"].startswith(_PLATFORM_PREFIX):
        return
    if not all(is_allowed_host(host, allowed) for host in Headers(scope=scope).getlist("host")):
        raise ApiError(
            ServerErrorCode.HOST_NOT_ALLOWED,
            "the Host header names another host; use the server's IP address, or add the name to HUNYUAN_ALLOWED_HOSTS",
        )


class SafeHeaders:
    """Adds headers that forbid browsers to run anything and caches to store anything. A route may set its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                names = {name.lower() for name, _ in headers}
                headers += _HEADERS
                if b"content-security-policy" not in names:
                    headers.append((b"content-security-policy", _POLICY))
                if b"cache-control" not in names:
                    headers.append((b"cache-control", b"no-store"))
                message["headers"] = headers
            await send(message)

        await self._app(scope, receive, send_with_headers)
