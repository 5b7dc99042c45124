"""Connections that break, on uvloop, which the server runs on."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest
import uvloop

from shim.http_client import HttpClient
from tests.support.fault_proxy import FaultProxy, Faults


def test_a_connection_that_is_reset_at_once_is_an_httpx_error_on_a_busy_loop() -> None:
    """A busy loop sees the connection and its reset in one iteration."""

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
