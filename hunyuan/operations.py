"""What a client does. `AsyncClient` awaits this code, `Client` runs it on a blocking connection."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, Unpack
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from contract.retry import RetryPolicy
from hunyuan.connection import Connection
from hunyuan.errors import (
    ClientError,
    RefusedError,
    UnexpectedAnswerError,
    UnreachableError,
    WaitTimeoutError,
    refused,
    task_failed,
)
from hunyuan.events import data_of
from hunyuan.images import local_image
from hunyuan.models import (
    TASK_STATUS,
    AcceptedTask,
    CompletedStatus,
    FailedStatus,
    Health,
    ProcessingStatus,
    RequestFields,
    TaskAnswer,
    TaskPage,
    TaskStatus,
    UploadedImage,
    Video,
)
from hunyuan.part_file import PartFile, output_path

_POLL_INTERVAL: Final = 1.0
#: For a request whose answer was lost. Each request may be sent again: POST /generate has its Idempotency-Key.
_LOST: Final = RetryPolicy(first=1.0, longest=3.0, attempts=3)
#: For a task's status: longer than a server's restart.
_POLL: Final = RetryPolicy(first=1.0, longest=5.0, total=120.0)
#: For a download that broke off. Only attempts in a row that received nothing count.
_RESUME: Final = RetryPolicy(first=0.5, longest=5.0, attempts=6)
#: Seconds without a byte after which a stream of events is dead. Servers send a comment more often.
_SILENT_STREAM: Final = 60.0

T = TypeVar("T")


def ignore(_: TaskStatus) -> None:
    """For callers who need no statuses."""


class Operations:
    """The operations on one server. `hunyuan.client.Client` documents them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def generate(
        self,
        prompt: str | Mapping[str, object],
        *,
        idempotency_key: str | None = None,
        wait_if_busy: float = 0.0,
        **fields: Unpack[RequestFields],
    ) -> AcceptedTask:
        """As `Client.generate`."""
        whole: Mapping[str, object] = {"prompt": prompt} if isinstance(prompt, str) else prompt
        request = await self._with_image({**whole, **fields}, wait_if_busy)
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        post = partial(self._ask, AcceptedTask.model_validate_json, "POST", "/generate", json=request, headers=headers)
        return await self._retried(RetryPolicy(total=wait_if_busy), _is_busy, post)

    async def _with_image(self, request: dict[str, object], wait_if_busy: float) -> dict[str, object]:
        """The request with an image that a server can read: a file is part of it, or is uploaded first."""
        image = local_image(request.get("image"))
        if image is None:
            return request
        if image.fits_inline:
            return {**request, "image": image.data_url}
        options = {"content": image.data, "headers": {"Content-Type": image.media_type}}
        post = partial(self._ask, UploadedImage.model_validate_json, "POST", "/images", **options)
        return {**request, "image": (await self._retried(RetryPolicy(total=wait_if_busy), _is_busy, post)).image}

    async def status(self, task: str | TaskAnswer) -> TaskStatus:
        """As `Client.status`."""
        return await self._ask(TASK_STATUS.validate_json, "GET", f"/status/{_path_of(task)}")

    async def cancel(self, task: str | TaskAnswer) -> TaskStatus:
        """As `Client.cancel`."""
        return await self._ask(TASK_STATUS.validate_json, "DELETE", f"/tasks/{_path_of(task)}")

    async def list(self, *, status: str | None = None, limit: int = 20, cursor: str | None = None) -> TaskPage:
        """As `Client.list`."""
        given = {"status": status, "limit": limit, "cursor": cursor}
        wanted = {name: value for name, value in given.items() if value is not None}
        return await self._ask(TaskPage.model_validate_json, "GET", "/tasks", params=wanted)

    async def health(self) -> Health:
        """As `Client.health`."""
        return await self._ask(Health.model_validate_json, "GET", "/health")

    async def ready(self) -> bool:
        """As `Client.ready`."""
        try:
            await self._ask(bytes, "GET", "/ready")
        except ClientError:
            return False
        return True

    async def stream_events(self, task: str | TaskAnswer) -> AsyncGenerator[TaskStatus, None]:
        """As `Client.stream_events`."""
        last: TaskStatus | None = None
        async with aclosing(self._statuses(task)) as statuses:
            async for status in statuses:
                if status != last:
                    yield status
                if not isinstance(status, ProcessingStatus):
                    return
                last = status

    async def wait(
        self,
        task: str | TaskAnswer,
        on_status: Callable[[TaskStatus], None] = ignore,
        *,
        timeout: float | None = None,
    ) -> CompletedStatus:
        """As `Client.wait`."""
        statuses = self.stream_events(task) if timeout is None else self._polled_until(task, timeout)
        async with aclosing(statuses):
            async for status in statuses:
                on_status(status)
                if isinstance(status, CompletedStatus):
                    return status
                if isinstance(status, FailedStatus):
                    raise task_failed(status)
        raise WaitTimeoutError(f"the task did not end within {timeout:g} s; it continues on the server")

    async def download(
        self, task: str | TaskAnswer, output: str | Path | None = None, *, overwrite: bool = True
    ) -> Video:
        """As `Client.download`."""
        task_id = _id_of(task)
        path = output_path(task_id, output)
        with PartFile(path, overwrite=overwrite) as part:
            await self._receive_all(task_id, part)
            part.publish()
        return Video(task_id=task_id, path=path, file_size=part.size)

    async def _receive_all(self, task_id: str, part: PartFile) -> None:
        """Receives the video; one that breaks off is continued where it did."""
        failures = 0
        while True:
            before = part.size
            try:
                return await self._receive(task_id, part)
            except UnreachableError:
                failures = 1 if part.size > before else failures + 1
                if part.size == 0 or failures == _RESUME.attempts:
                    raise
            await self._connection.sleep(_RESUME.wait_after(failures))

    async def _receive(self, task_id: str, part: PartFile) -> None:
        resumed = {"Range": f"bytes={part.size}-", "If-Range": part.etag} if part.size and part.etag else {}
        async with self._response("GET", f"/videos/{quote(task_id, safe='')}.mp4", headers=resumed) as response:
            if response.status_code != httpx.codes.PARTIAL_CONTENT:
                part.restart(response.headers.get("etag"))
            async for chunk in self._connection.chunks(response):
                part.write(chunk)

    async def _statuses(self, task: str | TaskAnswer) -> AsyncGenerator[TaskStatus, None]:
        """The server's events; its answers to polls if it sends none, and between two streams."""
        streams = True
        while True:
            if streams:
                try:
                    async with aclosing(self._events(task)) as events:
                        async for status in events:
                            yield status
                except UnreachableError:
                    pass  # the poll below finds out whether the server is back
                except (RefusedError, UnexpectedAnswerError):
                    streams = False  # a server without events, or a proxy that does not pass them on
            yield await self._polled(task, _POLL)
            await self._connection.sleep(_POLL_INTERVAL)

    async def _events(self, task: str | TaskAnswer) -> AsyncGenerator[TaskStatus, None]:
        options = {"headers": {"Accept": "text/event-stream"}, "timeout": httpx.Timeout(_SILENT_STREAM, connect=5)}
        async with self._response("GET", f"/tasks/{_path_of(task)}/events", **options) as response:
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise UnexpectedAnswerError(f"{response.url} does not send events")
            async for data in data_of(self._connection.chunks(response)):
                yield _parsed(TASK_STATUS.validate_json, data, response)

    async def _polled_until(self, task: str | TaskAnswer, timeout: float) -> AsyncGenerator[TaskStatus, None]:
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            yield await self._polled(task, RetryPolicy(_POLL.first, _POLL.longest, min(_POLL.total, left)))
            await self._connection.sleep(max(min(_POLL_INTERVAL, deadline - time.monotonic()), 0.0))

    async def _polled(self, task: str | TaskAnswer, policy: RetryPolicy) -> TaskStatus:
        return await self._retried(policy, _is_outage, partial(self.status, task))

    async def _ask(self, parse: Callable[[bytes], T], method: str, path: str, **options: Any) -> T:
        """The answer to a request, which is sent again if its answer was lost."""

        async def ask() -> T:
            async with self._response(method, path, **options) as response:
                await self._connection.read(response)
                return _parsed(parse, response.content, response)

        return await self._retried(_LOST, _is_lost_answer, ask)

    async def _retried(
        self, policy: RetryPolicy, on: Callable[[BaseException], bool], call: Callable[[], Awaitable[T]]
    ) -> T:
        retrying = policy.async_retrying(on, what="a request to the server", at_least=_retry_after)
        answer: T = await retrying.copy(sleep=self._connection.sleep)(call)
        return answer

    @asynccontextmanager
    async def _response(self, method: str, path: str, **options: Any) -> AsyncIterator[httpx.Response]:
        """A response without an error, whose body is not read yet.

        Raises:
            UnreachableError: there was no answer, or the block was reading it when it broke off.
            RefusedError: the answer is an error.
        """
        request = self._connection.build(method, path, **options)
        try:
            response = await self._connection.send(request)
            try:
                if response.is_error:
                    await self._connection.read(response)
                    raise refused(response)
                yield response
            finally:
                await self._connection.release(response)
        except httpx.HTTPError as exc:
            server = f"{request.url.scheme}://{request.url.netloc.decode()}"
            raise UnreachableError(f"no answer from {server}: {exc or type(exc).__name__}") from exc


def _parsed(parse: Callable[[bytes], T], body: bytes, response: httpx.Response) -> T:
    try:
        return parse(body)
    except ValidationError as exc:
        raise UnexpectedAnswerError(f"{response.url} did not answer as a HunyuanVideo server does") from exc


def _id_of(task: str | TaskAnswer) -> str:
    return task if isinstance(task, str) else task.task_id


def _path_of(task: str | TaskAnswer) -> str:
    return quote(_id_of(task), safe="")


def _is_lost_answer(exc: BaseException) -> bool:
    lost = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadTimeout)
    return isinstance(exc, UnreachableError) and isinstance(exc.__cause__, lost)


def _is_busy(exc: BaseException) -> bool:
    return isinstance(exc, RefusedError) and exc.status in (429, 503)


def _is_outage(exc: BaseException) -> bool:
    return isinstance(exc, UnreachableError) or (isinstance(exc, RefusedError) and exc.status >= 500)


def _retry_after(exc: BaseException) -> float:
    return (exc.retry_after or 0.0) if isinstance(exc, RefusedError) else 0.0
