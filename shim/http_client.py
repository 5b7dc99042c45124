"""The HTTP client for the bucket and for RunPod."""

from __future__ import annotations

from typing import Any

import httpx


class HttpClient(httpx.AsyncClient):
    """httpx's client; every failure of a connection is an httpx.HTTPError, on uvloop too."""

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Send a request; every method of the client ends here.

        Raises:
            httpx.HTTPError: no response came.
        """
        try:
            return await super().send(request, **options)
        except AttributeError as exc:
            # On a connection that is reset at once, uvloop has closed the socket when anyio asks for its address.
            raise httpx.ConnectError("the connection was reset", request=request) from exc
