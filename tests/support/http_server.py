"""An app on a real port of loopback, in the test's own event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from shim.access import CONNECTION_LIMITS, ConnectionLimits
from shim.http.server import Connection, HttpServer


@asynccontextmanager
async def serving(
    app: FastAPI,
    connection: type[Connection] = Connection,
    *,
    port: int = 0,
    limits: ConnectionLimits = CONNECTION_LIMITS,
) -> AsyncIterator[str]:
    """The app's address, on a free port if none is named."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = HttpServer(app, grace=1, connection=connection, limits=limits)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
