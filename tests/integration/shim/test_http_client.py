"""Connections that break, on the event loop that the server runs on."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest
import uvloop

from shim.http_client import HttpClient
from tests.support.fault_proxy import FaultProxy, Faults


def test_a_connection_that_is_reset_at_once_is_one_of_httpx_errors_on_a_busy_loop() -> None:
    """On a busy loop the connection and its reset are seen in the same turn."""

    async def ask(url: str) -> None:
        loop = asyncio.get_running_loop()

        def keep_busy() -> None:
            time.sleep(0.01)
            loop.call_soon(keep_busy)

        keep_busy()
        async with HttpClient() as client:
            for _ in range(20):
                with pytest.raises(httpx.TransportError):
                    await client.get(url)

    with FaultProxy(("127.0.0.1", 9)) as proxy:
        proxy.faults = Faults(reset_on_accept=True)
        uvloop.run(ask(proxy.url))
