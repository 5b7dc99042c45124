"""A client of the documented API, as the `hunyuan` command uses it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx

#: What a server says, decoded.
Answer = Mapping[str, Any]

_POLL_INTERVAL: Final = 1.0
#: Seconds after which a request whose answer was lost is sent again.
_AGAIN_AFTER: Final = (1.0, 3.0)
#: How long a wait outlasts a server that is away: long enough for a restart.
_OUTAGE: Final = 120.0


class ClientError(Exception):
    """The server could not be used as asked."""


class UnreachableError(ClientError):
    """Nobody answers there."""


class RefusedError(ClientError):
    """The server answered with an error of the API."""

    def __init__(self, status: int, error: str, error_code: str, retry_after: str | None) -> None:
        super().__init__(error)
        self.status = status
        self.error_code = error_code
        self.retry_after = retry_after


class TaskFailedError(ClientError):
    """The task ended with no video."""

    def __init__(self, status: Answer) -> None:
        super().__init__(f"{status['error']} ({status['error_code']})")
        self.status = status


class Client:
    """Talks to one server. Every method raises UnreachableError or RefusedError where it must."""

    def __init__(self, server: str, api_key: str | None = None) -> None:
        self._server = server.rstrip("/")
        self._http = httpx.Client(
            base_url=self._server,
            headers={"Authorization": f"Bearer {api_key}"} if api_key is not None else {},
            timeout=httpx.Timeout(30, connect=5),
            follow_redirects=True,  # the key goes to no other host: httpx leaves it out
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def generate(self, request: Mapping[str, object]) -> str:
        """Submit a task by the body of a POST /generate; its id. An answer that was lost is asked for again."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        for delay in _AGAIN_AFTER:
            try:
                return self._submit(request, headers)
            except UnreachableError as exc:
                if isinstance(exc.__cause__, httpx.ConnectError):
                    raise
            time.sleep(delay)
        return self._submit(request, headers)

    def _submit(self, request: Mapping[str, object], headers: Mapping[str, str]) -> str:
        task_id: str = self._ask("POST", "/generate", json=request, headers=headers)["task_id"]
        return task_id

    def cancel(self, task_id: str) -> Answer:
        """Cancel the task; its status from then on."""
        return self._ask("DELETE", f"/tasks/{task_id}")

    def status(self, task_id: str) -> Answer:
        """The task's status."""
        return self._ask("GET", f"/status/{task_id}")

    def health(self) -> Answer:
        """What /health says."""
        return self._ask("GET", "/health")

    def ready(self) -> bool:
        """Whether the server takes tasks now; False while it can't be reached, too."""
        try:
            self._ask("GET", "/ready")
        except ClientError:
            return False
        return True

    def wait(self, task_id: str, on_status: Callable[[Answer], None]) -> Answer:
        """Poll until the task is completed, through a server's restart if need be.

        Raises:
            TaskFailedError: it failed.
        """
        last_answer = time.monotonic()
        while True:
            try:
                status = self.status(task_id)
            except (UnreachableError, RefusedError) as exc:
                lasting = isinstance(exc, RefusedError) and exc.status < 500
                if lasting or time.monotonic() - last_answer > _OUTAGE:
                    raise
            else:
                last_answer = time.monotonic()
                on_status(status)
                if status["status"] == "completed":
                    return status
                if status["status"] == "failed":
                    raise TaskFailedError(status)
            time.sleep(_POLL_INTERVAL)

    def download(self, task_id: str, output: Path) -> int:
        """Save the video; `output` appears whole or not at all. Its size in bytes."""
        part = output.with_name(f"{output.name}.part")
        try:
            with self._http.stream("GET", f"/videos/{task_id}.mp4") as response, part.open("wb") as file:
                if response.is_error:
                    response.read()
                    raise _refused(response)
                for chunk in response.iter_bytes():
                    file.write(chunk)
            size = part.stat().st_size
            part.replace(output)
        except httpx.HTTPError as exc:
            raise UnreachableError(f"the download broke: {exc}") from exc
        finally:
            part.unlink(missing_ok=True)
        return size

    def _ask(self, method: str, path: str, **arguments: Any) -> Answer:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.HTTPError as exc:
            raise UnreachableError(f"no answer from {self._server}: {exc}") from exc
        if response.is_error:
            raise _refused(response)
        answer: Answer = response.json()
        return answer


def _refused(response: httpx.Response) -> RefusedError:
    try:
        body = response.json()
        error, code = str(body["error"]), str(body["error_code"])
    except (ValueError, KeyError, TypeError):
        error, code = f"the server answered {response.status_code}", "INTERNAL_ERROR"
    return RefusedError(response.status_code, error, code, response.headers.get("retry-after"))
