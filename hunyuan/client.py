"""A client of the documented API. The `hunyuan` command uses it."""

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

import httpx
from pydantic import BaseModel, ConfigDict

from contract.retry import RetryPolicy

_POLL_INTERVAL: Final = 1.0
#: For a POST /generate whose answer was lost.
_SUBMIT: Final = RetryPolicy(first=1.0, longest=3.0, attempts=3)
#: For a task's status: longer than a server's restart.
_POLL: Final = RetryPolicy(first=1.0, longest=5.0, total=120.0)


class _Answer(BaseModel):
    """Fields that a newer server adds are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")


class TaskStatus(_Answer):
    """The answer of /status. Which of the optional fields are set depends on `status`."""

    task_id: str
    status: Literal["processing", "completed", "failed"]
    progress: int | None = None
    elapsed_time: int | None = None
    stage: str | None = None
    queue_position: int | None = None
    video_url: str | None = None
    duration: int | None = None
    resolution: str | None = None
    file_size: int | None = None
    error: str | None = None
    error_code: str | None = None


class Health(_Answer):
    """The answer of /health."""

    status: str
    model_loaded: bool
    gpu_available: bool
    vram_free: str
    version: str


class ClientError(Exception):
    """The server could not be used as requested."""


class UnreachableError(ClientError):
    """The server did not answer."""


class RefusedError(ClientError):
    """The server answered with an error of the API. `retry_after` is its Retry-After in seconds."""

    def __init__(self, status: int, error: str, error_code: str, retry_after: str | None) -> None:
        super().__init__(error)
        self.status = status
        self.error_code = error_code
        self.retry_after = retry_after


class TaskFailedError(ClientError):
    """The task failed."""

    def __init__(self, status: TaskStatus) -> None:
        super().__init__(f"{status.error} ({status.error_code})")
        self.status = status


class Client:
    """Talks to one server. Every method may raise UnreachableError or RefusedError."""

    def __init__(self, server: str, api_key: str | None = None) -> None:
        self._server = server.rstrip("/")
        self._http = httpx.Client(
            base_url=self._server,
            headers={"Authorization": f"Bearer {api_key}"} if api_key is not None else {},
            timeout=httpx.Timeout(30, connect=5),
            follow_redirects=True,  # httpx sends the key to no other host
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def generate(self, request: Mapping[str, object]) -> str:
        """Submits the body of a POST /generate and returns the task's id.

        A request whose answer was lost is sent again under the same Idempotency-Key, so it makes one task.
        """
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        retrying = _SUBMIT.retrying(_is_lost_answer, what="submitting the task")
        task_id: str = retrying(self._ask, "POST", "/generate", json=request, headers=headers)["task_id"]
        return task_id

    def cancel(self, task_id: str) -> TaskStatus:
        """Cancels the task and returns its new status."""
        return TaskStatus.model_validate(self._ask("DELETE", f"/tasks/{task_id}"))

    def status(self, task_id: str) -> TaskStatus:
        """The task's status."""
        return TaskStatus.model_validate(self._ask("GET", f"/status/{task_id}"))

    def health(self) -> Health:
        """The server's health."""
        return Health.model_validate(self._ask("GET", "/health"))

    def ready(self) -> bool:
        """Whether the server accepts tasks now; also False while it can't be reached."""
        try:
            self._ask("GET", "/ready")
        except ClientError:
            return False
        return True

    def wait(self, task_id: str, on_status: Callable[[TaskStatus], None] = lambda _: None) -> TaskStatus:
        """Polls until the task is completed; a server that is away for up to two minutes, as in a restart, is retried.

        Raises:
            TaskFailedError: the task failed.
        """
        retrying = _POLL.retrying(_is_outage, what="asking for the task's status", at_least=_retry_after)
        while True:
            status = retrying(self.status, task_id)
            on_status(status)
            if status.status == "completed":
                return status
            if status.status == "failed":
                raise TaskFailedError(status)
            time.sleep(_POLL_INTERVAL)

    def download(self, task_id: str, output: Path) -> int:
        """Saves the video and returns its size in bytes. `output` is created only when the download is complete."""
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
            raise UnreachableError(f"the download from {self._server} was interrupted: {exc}") from exc
        finally:
            part.unlink(missing_ok=True)
        return size

    def _ask(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.HTTPError as exc:
            raise UnreachableError(f"no answer from {self._server}: {exc}") from exc
        if response.is_error:
            raise _refused(response)
        return response.json()


def _refused(response: httpx.Response) -> RefusedError:
    try:
        body = response.json()
        error, code = str(body["error"]), str(body["error_code"])
    except (ValueError, KeyError, TypeError):
        error, code = f"the server answered {response.status_code}", "INTERNAL_ERROR"
    return RefusedError(response.status_code, error, code, response.headers.get("retry-after"))


def _is_lost_answer(exc: BaseException) -> bool:
    return isinstance(exc, UnreachableError) and not isinstance(exc.__cause__, httpx.ConnectError)


def _is_outage(exc: BaseException) -> bool:
    return isinstance(exc, UnreachableError) or (isinstance(exc, RefusedError) and exc.status >= 500)


def _retry_after(exc: BaseException) -> float:
    value = exc.retry_after if isinstance(exc, RefusedError) else None
    return float(value) if value is not None and value.isdigit() else 0.0
