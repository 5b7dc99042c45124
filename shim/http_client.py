"""The HTTP client for the object store and for RunPod. Every connection failure is an `httpx.HTTPError`."""

from typing import Any

import httpx


class HttpClient(httpx.AsyncClient):
    """`httpx.AsyncClient` that raises httpx's own errors on uvloop, too."""

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Sends a request. Every other method of the client calls this one.

        Raises:
            httpx.HTTPError: there is no response.
        """
        try:
            return await super().send(request, **options)
        except AttributeError as exc:
            # uvloop has closed a connection that was reset while it opened, and anyio asks that socket for its address.
            raise httpx.ConnectError("the connection was reset", request=request) from exc
