"""Our HTTP client for the store and for RunPod: whatever becomes of a connection is one of httpx's own errors."""

from __future__ import annotations

from typing import Any

import httpx


class HttpClient(httpx.AsyncClient):
    """httpx's client, as it is meant to be on uvloop, too."""

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Send a request; every method of the client does it by this.

        Raises:
            httpx.HTTPError: there is no answer.
        """
        try:
            return await super().send(request, **options)
        except AttributeError as exc:
            # Reset the moment it was there: uvloop has taken the socket away, and anyio asks for its address.
            raise httpx.ConnectError("the connection was reset", request=request) from exc
