"""How the clients reach a server: awaited, or blocking.

`hunyuan.operations` is written once, with `await`. On a `BlockingConnection` it never suspends, so `finish` runs it to
its end without an event loop.
"""

import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol, TypeVar

import anyio
import httpx

T = TypeVar("T")


class Connection(Protocol):
    """What the operations need of httpx and of a clock."""

    def build(self, method: str, path: str, **options: Any) -> httpx.Request:
        """A request to the server."""

    async def send(self, request: httpx.Request) -> httpx.Response:
        """The response, whose body is not read yet."""

    async def read(self, response: httpx.Response) -> None:
        """Reads the body."""

    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive."""

    async def release(self, response: httpx.Response) -> None:
        """Ends a response, read or not."""

    async def sleep(self, seconds: float) -> None:
        """Waits."""

    async def close(self) -> None:
        """Closes all connections."""


class AsyncConnection:
    """A connection for an event loop of asyncio or trio."""

    def __init__(self, **options: Any) -> None:
        self._http = httpx.AsyncClient(**options)

    def build(self, method: str, path: str, **options: Any) -> httpx.Request:
        return self._http.build_request(method, path, **options)

    async def send(self, request: httpx.Request) -> httpx.Response:
        return await self._http.send(request, stream=True)

    async def read(self, response: httpx.Response) -> None:
        await response.aread()

    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        return response.aiter_bytes()

    async def release(self, response: httpx.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def close(self) -> None:
        await self._http.aclose()


class BlockingConnection:
    """A connection whose coroutines block and never suspend."""

    def __init__(self, **options: Any) -> None:
        self._http = httpx.Client(**options)

    def build(self, method: str, path: str, **options: Any) -> httpx.Request:
        return self._http.build_request(method, path, **options)

    async def send(self, request: httpx.Request) -> httpx.Response:
        return self._http.send(request, stream=True)

    async def read(self, response: httpx.Response) -> None:
        response.read()

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for chunk in response.iter_bytes():
            yield chunk

    async def release(self, response: httpx.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - it is to block

    async def close(self) -> None:
        self._http.close()


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        coroutine.close()
    raise RuntimeError("a coroutine over a blocking connection waited for an event loop")
