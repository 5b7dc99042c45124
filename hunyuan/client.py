"""The clients of a HunyuanVideo server. docs/client.md shows them."""

from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Self, Unpack

import httpx

from hunyuan.connection import AsyncConnection, BlockingConnection, finish
from hunyuan.models import (
    AcceptedTask,
    CompletedStatus,
    Health,
    RequestFields,
    TaskAnswer,
    TaskPage,
    TaskStatus,
    Video,
)
from hunyuan.operations import Operations, ignore
from hunyuan.settings import ClientSettings


class Client:
    """Talks to one server.

        with Client("http://localhost:8000") as client:
            task = client.generate("A paper boat on a rainy street", duration=5)
            client.wait(task)
            client.download(task, "boat.mp4")

    Without a `server`, the server and its key are HUNYUAN_SERVER and HUNYUAN_API_KEY. `timeout` is how many seconds the
    server may take to answer.

    Every method that talks to the server may raise:
        UnreachableError: there was no answer. Lost answers are asked for again first.
        RefusedError: the answer is an error; its class is the one of its code in `hunyuan.errors`.
        UnexpectedAnswerError: the answer is not one of such a server.
    """

    def __init__(self, server: str | None = None, api_key: str | None = None, *, timeout: float = 30.0) -> None:
        self._connection = BlockingConnection(**_options(server, api_key, timeout))
        self._operations = Operations(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        finish(self._connection.close())

    def generate(
        self,
        prompt: str | Mapping[str, object],
        *,
        idempotency_key: str | None = None,
        wait_if_busy: float = 0.0,
        **fields: Unpack[RequestFields],
    ) -> AcceptedTask:
        """Submit a task. `prompt` may also be a whole request, and `image` a file, which is uploaded if it is large.

        The same `idempotency_key` with the same request returns the same task. Without one, each call makes a task of
        its own; a request whose answer was lost makes one task in either case. While the server is busy (429, 503), the
        request is sent again for `wait_if_busy` seconds.

        Raises:
            OSError, NotAnImageError: the image can't be read.
        """
        return finish(
            self._operations.generate(prompt, idempotency_key=idempotency_key, wait_if_busy=wait_if_busy, **fields)
        )

    def status(self, task: str | TaskAnswer) -> TaskStatus:
        """The task's status now."""
        return finish(self._operations.status(task))

    def cancel(self, task: str | TaskAnswer) -> TaskStatus:
        """Cancel the task and return its new status. A task that has ended does not change."""
        return finish(self._operations.cancel(task))

    def list(self, *, status: str | None = None, limit: int = 20, cursor: str | None = None) -> TaskPage:
        """The newest tasks, or those of one status. The page's `next_cursor` gets the next page.

        Raises:
            NotFoundError: the server is too old to list tasks, or it is in front of RunPod.
        """
        return finish(self._operations.list(status=status, limit=limit, cursor=cursor))

    def health(self) -> Health:
        """The server's health."""
        return finish(self._operations.health())

    def ready(self) -> bool:
        """Whether the server accepts tasks now; also False while it can't be reached."""
        return finish(self._operations.ready())

    def stream_events(self, task: str | TaskAnswer) -> Generator[TaskStatus, None, None]:
        """The task's status now and at each change, until it has ended.

        The server sends the changes; one that does not is asked every second. A server that is away for up to two
        minutes, as in a restart, is waited for.
        """
        statuses = self._operations.stream_events(task)
        try:
            while True:
                yield finish(statuses.asend(None))
        except StopAsyncIteration:
            return
        finally:
            finish(statuses.aclose())

    def wait(
        self,
        task: str | TaskAnswer,
        on_status: Callable[[TaskStatus], None] = ignore,
        *,
        timeout: float | None = None,
    ) -> CompletedStatus:
        """Wait for the task's video. `on_status` receives what `stream_events` yields.

        Raises:
            TaskFailedError: the task failed; its class is also the one of the error code, for example OomError.
            WaitTimeoutError: it did not end within `timeout` seconds.
        """
        return finish(self._operations.wait(task, on_status, timeout=timeout))

    def download(self, task: str | TaskAnswer, output: str | Path | None = None, *, overwrite: bool = True) -> Video:
        """Save the task's video, by default as TASK_ID.mp4; `output` is a file or an existing directory.

        The file appears when it is complete. A download that breaks off is continued where it did.

        Raises:
            FileExistsError: the file exists, unless `overwrite`.
            OSError: it can't be written.
        """
        return finish(self._operations.download(task, output, overwrite=overwrite))


class AsyncClient(Operations):
    """`Client` for asyncio and trio: the same methods, awaited.

    async with AsyncClient("http://localhost:8000") as client:
        task = await client.generate("A paper boat on a rainy street", duration=5)
        async for status in client.stream_events(task):
            print(status)
        await client.download(task, "boat.mp4")
    """

    def __init__(self, server: str | None = None, api_key: str | None = None, *, timeout: float = 30.0) -> None:
        super().__init__(AsyncConnection(**_options(server, api_key, timeout)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._connection.close()


def _options(server: str | None, api_key: str | None, timeout: float) -> dict[str, Any]:
    """What httpx is created with. An explicit server never gets the key of the environment."""
    if server is None:
        settings = ClientSettings()
        server = str(settings.server)
        if api_key is None and settings.api_key is not None:
            api_key = settings.api_key.get_secret_value()
    return {
        "base_url": server.rstrip("/"),
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key is not None else {},
        "timeout": httpx.Timeout(timeout, connect=min(timeout, 5.0)),
        "follow_redirects": True,  # httpx sends the key to no other host
    }
