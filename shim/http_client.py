"""The HTTP client for the object store and for RunPod. Every connection failure is an `httpx.HTTPError`."""

import socket
from typing import Any, Final
from urllib.request import getproxies

import httpx

#: Bytes that the kernel receives before the server reads them. A fast bucket fills the usual 6 MB at once, and the
#: event loop then reads all of it into memory, whether or not the client takes it.
_RECEIVE_BUFFER: Final = 128 * 1024


def transport_with_small_buffers(limits: httpx.Limits) -> httpx.AsyncHTTPTransport | None:
    """A transport for many downloads at once. None if the environment names a proxy, which httpx then uses."""
    if getproxies():
        return None
    options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)]
    return httpx.AsyncHTTPTransport(limits=limits, socket_options=options)


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
