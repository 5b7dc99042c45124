"""What a client raises: one class for each error code of the API, with the server's words as its text.

An answer with the code QUEUE_FULL raises an error that is a QueueFullError and a RefusedError. A task that ended with
OOM_ERROR raises one that is an OomError and a TaskFailedError. docs/errors.md lists the codes. A code that has no class
here, because the server is newer, raises a plain RefusedError or TaskFailedError.
"""

from typing import ClassVar, Final, TypeVar, cast

import httpx
from pydantic import BaseModel, ValidationError

from hunyuan.models import FailedStatus


class ClientError(Exception):
    """The base of all errors of a client."""


class UnreachableError(ClientError):
    """The server did not answer."""


class UnexpectedAnswerError(ClientError):
    """Something answered, but not as a HunyuanVideo server does."""


class WaitTimeoutError(ClientError, TimeoutError):
    """The task did not end within the time that `wait` was given. It continues on the server."""


class ApiError(ClientError):
    """The server reported an error. `error` is its text, `error_code` its code."""

    #: The code that a class stands for.
    code: ClassVar[str | None] = None

    def __init_subclass__(cls, code: str | None = None) -> None:
        if code is not None:
            cls.code = code
            ERRORS[code] = cls

    def __init__(self, error: str, error_code: str | None) -> None:
        super().__init__(f"{error} ({error_code})" if error_code is not None else error)
        self.error = error
        self.error_code = error_code


#: The class of each code.
ERRORS: Final[dict[str, type[ApiError]]] = {}


class RefusedError(ApiError):
    """The server answered a request with an error. `retry_after` is its Retry-After in seconds."""

    def __init__(self, error: str, error_code: str | None, *, status: int, retry_after: float | None) -> None:
        super().__init__(error, error_code)
        self.status = status
        self.retry_after = retry_after


class TaskFailedError(ApiError):
    """The task failed or was cancelled. `status` is how it ended."""

    def __init__(self, status: FailedStatus) -> None:
        super().__init__(status.error, status.error_code)
        self.status = status


class InvalidPromptError(ApiError, code="INVALID_PROMPT"):
    """The prompt does not have 10-500 characters."""


class InvalidDurationError(ApiError, code="INVALID_DURATION"):
    """The duration is not an integer from 5 to 10."""


class InvalidResolutionError(ApiError, code="INVALID_RESOLUTION"):
    """The resolution is not one that the server has."""


class InvalidModelError(ApiError, code="INVALID_MODEL"):
    """The model is unknown, or the server has no weights for it."""


class InvalidRequestError(ApiError, code="INVALID_REQUEST"):
    """A field is unknown or has an invalid value."""


class StorageUnavailableError(ApiError, code="STORAGE_UNAVAILABLE"):
    """The server's bucket does not answer or did not take the video."""


class OomError(ApiError, code="OOM_ERROR"):
    """The GPU ran out of memory: reduce resolution or duration."""


class GenerationFailedError(ApiError, code="GENERATION_FAILED"):
    """The render failed; the worker's log says why."""


class TaskCancelledError(ApiError, code="CANCELLED"):
    """The task was cancelled."""


class VideoDeletedError(ApiError, code="VIDEO_DELETED"):
    """The task was completed, and its video was deleted later."""


class RequestTooLargeError(ApiError, code="REQUEST_TOO_LARGE"):
    """The request is larger than the server takes, usually because of an image."""


class UnauthorizedError(ApiError, code="UNAUTHORIZED"):
    """The server needs an API key, and the request had none or a wrong one."""


class NotFoundError(ApiError, code="NOT_FOUND"):
    """The server does not have this path; it may be older than this client."""


class MethodNotAllowedError(ApiError, code="METHOD_NOT_ALLOWED"):
    """The path does not take this method; the server may be older than this client."""


class NotRetryableError(ApiError, code="NOT_RETRYABLE"):
    """Only a task that failed or was cancelled can be tried again."""


class NotSupportedError(ApiError, code="NOT_SUPPORTED"):
    """This server can't do that, for example because its queue is RunPod's."""


class RequestTimeoutError(ApiError, code="REQUEST_TIMEOUT"):
    """The request did not arrive in time."""


class TaskNotFoundError(ApiError, code="TASK_NOT_FOUND"):
    """The server has no task with this id."""


class VideoNotReadyError(ApiError, code="VIDEO_NOT_READY"):
    """The task has no video: it is not finished, or it failed."""


class NoPreviewError(ApiError, code="NO_PREVIEW"):
    """The task has no preview now: it waits, its picture does not form yet, or it has ended."""


class RangeNotSatisfiableError(ApiError, code="RANGE_NOT_SATISFIABLE"):
    """The requested range begins after the end of the video."""


class IdempotencyKeyReusedError(ApiError, code="IDEMPOTENCY_KEY_REUSED"):
    """An earlier request had the same idempotency key and another body."""


class HostNotAllowedError(ApiError, code="HOST_NOT_ALLOWED"):
    """The server does not answer to the host name in its address."""


class RateLimitedError(ApiError, code="RATE_LIMITED"):
    """This client requested too many videos in the last minute."""


class HeadersTooLargeError(ApiError, code="HEADERS_TOO_LARGE"):
    """The request's headers are too long."""


class ServerBusyError(ApiError, code="SERVER_BUSY"):
    """Too many connections are open."""


class QueueFullError(ApiError, code="QUEUE_FULL"):
    """As many tasks wait as the queue takes."""


class ModelNotLoadedError(ApiError, code="MODEL_NOT_LOADED"):
    """No worker has loaded the model yet; the text says why."""


class QueueUnavailableError(ApiError, code="QUEUE_UNAVAILABLE"):
    """The server's queue does not answer."""


class InternalError(ApiError, code="INTERNAL_ERROR"):
    """The server has a bug; its log has the details."""


_How = TypeVar("_How", RefusedError, TaskFailedError)


def _class_of(how: type[_How], code: str | None) -> type[_How]:
    """A class that is `how` and the class of the code."""
    named = ERRORS.get(code or "")
    if named is None:
        return how
    return cast(type[_How], type(named.__name__, (named, how), {"__module__": __name__, "__doc__": named.__doc__}))


class _Body(BaseModel):
    error: str
    error_code: str


def refused(response: httpx.Response) -> RefusedError:
    """The error of a response whose body has been read."""
    try:
        body = _Body.model_validate_json(response.content)
    except ValidationError:  # from a proxy in front of the server
        text, code = f"the server answered {response.status_code} {response.reason_phrase}", None
    else:
        text, code = body.error, body.error_code
    seconds = response.headers.get("retry-after", "")
    retry_after = float(seconds) if seconds.isdecimal() else None
    kind = _class_of(RefusedError, code)
    return kind(text, code, status=response.status_code, retry_after=retry_after)


def task_failed(status: FailedStatus) -> TaskFailedError:
    """The error of a task that ended without a video."""
    kind = _class_of(TaskFailedError, status.error_code)
    return kind(status)
