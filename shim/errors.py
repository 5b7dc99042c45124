"""Errors over HTTP: the server's error codes, and the one table of their status codes."""

import logging
from collections.abc import Mapping
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Final

from pydantic import BaseModel

from contract.errors import ErrorCode
from contract.job import InvalidInputError
from shim.queue.base import (
    IdempotencyConflictError,
    ModelNotLoadedError,
    NotSupportedError,
    QueueFullError,
    QueueUnavailableError,
)
from shim.tasks import NotRetryableError, NoVideoError, TaskNotFoundError, VideoDeletedError
from storage.errors import StorageError

log = logging.getLogger(__name__)


class ServerErrorCode(StrEnum):
    """The codes that only the server sends."""

    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    UNAUTHORIZED = "UNAUTHORIZED"
    NOT_FOUND = "NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"
    TASK_NOT_FOUND = "TASK_NOT_FOUND"
    VIDEO_NOT_READY = "VIDEO_NOT_READY"
    NO_PREVIEW = "NO_PREVIEW"
    RANGE_NOT_SATISFIABLE = "RANGE_NOT_SATISFIABLE"
    IDEMPOTENCY_KEY_REUSED = "IDEMPOTENCY_KEY_REUSED"
    NOT_RETRYABLE = "NOT_RETRYABLE"
    HOST_NOT_ALLOWED = "HOST_NOT_ALLOWED"
    RATE_LIMITED = "RATE_LIMITED"
    HEADERS_TOO_LARGE = "HEADERS_TOO_LARGE"
    SERVER_BUSY = "SERVER_BUSY"
    QUEUE_FULL = "QUEUE_FULL"
    MODEL_NOT_LOADED = "MODEL_NOT_LOADED"
    QUEUE_UNAVAILABLE = "QUEUE_UNAVAILABLE"
    INTERNAL_ERROR = "INTERNAL_ERROR"
    NOT_SUPPORTED = "NOT_SUPPORTED"


#: Every `error_code` that a client can receive.
AnyErrorCode = ErrorCode | ServerErrorCode


class ErrorBody(BaseModel):
    """The body of an error response: `{"error": text, "error_code": CODE}`."""

    error: str
    error_code: AnyErrorCode


#: OOM_ERROR, GENERATION_FAILED and CANCELLED are absent: a failed job is reported in the body of a 200.
STATUS: Final[Mapping[AnyErrorCode, int]] = {
    ErrorCode.INVALID_PROMPT: 400,
    ErrorCode.INVALID_DURATION: 400,
    ErrorCode.INVALID_RESOLUTION: 400,
    ErrorCode.INVALID_MODEL: 400,
    ErrorCode.INVALID_REQUEST: 400,
    ServerErrorCode.UNAUTHORIZED: 401,
    ServerErrorCode.NOT_FOUND: 404,
    ServerErrorCode.TASK_NOT_FOUND: 404,
    ServerErrorCode.VIDEO_NOT_READY: 404,
    ServerErrorCode.NO_PREVIEW: 404,
    ErrorCode.VIDEO_DELETED: 404,
    ServerErrorCode.METHOD_NOT_ALLOWED: 405,
    ServerErrorCode.REQUEST_TIMEOUT: 408,
    ServerErrorCode.IDEMPOTENCY_KEY_REUSED: 409,
    ServerErrorCode.NOT_RETRYABLE: 409,
    ServerErrorCode.REQUEST_TOO_LARGE: 413,
    ServerErrorCode.RANGE_NOT_SATISFIABLE: 416,
    ServerErrorCode.HOST_NOT_ALLOWED: 421,
    ServerErrorCode.RATE_LIMITED: 429,
    ServerErrorCode.HEADERS_TOO_LARGE: 431,
    ServerErrorCode.INTERNAL_ERROR: 500,
    ServerErrorCode.NOT_SUPPORTED: 501,
    ServerErrorCode.SERVER_BUSY: 503,
    ServerErrorCode.QUEUE_FULL: 503,
    ServerErrorCode.MODEL_NOT_LOADED: 503,
    ServerErrorCode.QUEUE_UNAVAILABLE: 503,
    ErrorCode.STORAGE_UNAVAILABLE: 503,
}

#: The Retry-After header in seconds, unless the error brings its own.
RETRY_AFTER: Final[Mapping[AnyErrorCode, int]] = {
    ServerErrorCode.SERVER_BUSY: 5,
    ServerErrorCode.QUEUE_FULL: 30,
    ServerErrorCode.MODEL_NOT_LOADED: 10,
    ServerErrorCode.QUEUE_UNAVAILABLE: 5,
    ErrorCode.STORAGE_UNAVAILABLE: 5,
}


#: What begins the paths whose errors have the shape that OpenAI's client reads.
OPENAI_PREFIX: Final = "/v1/"
#: OpenAI's names for kinds of errors, by HTTP status.
_OPENAI_TYPES: Final[Mapping[int, str]] = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
#: The request's field that an error is about, in the names of OpenAI's API.
_OPENAI_PARAMS: Final[Mapping[AnyErrorCode, str]] = {
    ErrorCode.INVALID_PROMPT: "prompt",
    ErrorCode.INVALID_DURATION: "seconds",
    ErrorCode.INVALID_RESOLUTION: "size",
    ErrorCode.INVALID_MODEL: "model",
}


class ApiError(Exception):
    """An error response: its code, its text and its headers."""

    def __init__(self, code: AnyErrorCode, error: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.body = ErrorBody(error=error, error_code=code)
        self.headers = dict(headers or {})
        if code in RETRY_AFTER:
            self.headers.setdefault("Retry-After", str(RETRY_AFTER[code]))

    @property
    def status(self) -> int:
        return STATUS[self.body.error_code]

    def shown(self, path: str) -> dict[str, Any]:
        """The body of the response to a request for `path`, as JSON."""
        if not path.startswith(OPENAI_PREFIX):
            return self.body.model_dump(mode="json")
        code = self.body.error_code
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.body.error, "type": kind, "code": code, "param": _OPENAI_PARAMS.get(code)}}

    @property
    def phrase(self) -> str:
        """The reason phrase of the HTTP status."""
        return HTTPStatus(self.status).phrase


#: The codes of exceptions whose message is for the client.
_CODES: Final[Mapping[type[Exception], AnyErrorCode]] = {
    VideoDeletedError: ErrorCode.VIDEO_DELETED,
    NoVideoError: ServerErrorCode.VIDEO_NOT_READY,
    NotRetryableError: ServerErrorCode.NOT_RETRYABLE,
    IdempotencyConflictError: ServerErrorCode.IDEMPOTENCY_KEY_REUSED,
    QueueFullError: ServerErrorCode.QUEUE_FULL,
    ModelNotLoadedError: ServerErrorCode.MODEL_NOT_LOADED,
    QueueUnavailableError: ServerErrorCode.QUEUE_UNAVAILABLE,
    NotSupportedError: ServerErrorCode.NOT_SUPPORTED,
}


def api_error(exc: Exception) -> ApiError:
    """The error response for an exception. An unexpected one is INTERNAL_ERROR: its traceback is only logged."""
    match exc:
        case ApiError():
            return exc
        case InvalidInputError():
            return ApiError(exc.failure.error_code, exc.failure.error)
        case TaskNotFoundError():
            return ApiError(ServerErrorCode.TASK_NOT_FOUND, "There is no task with this id")
        case StorageError():
            log.error("the request failed with STORAGE_UNAVAILABLE: %s", exc)
            return ApiError(ErrorCode.STORAGE_UNAVAILABLE, "The video storage is not available just now")
    code = next((code for kind, code in _CODES.items() if isinstance(exc, kind)), None)
    if code is None:
        return ApiError(ServerErrorCode.INTERNAL_ERROR, "Internal server error")
    return ApiError(code, str(exc))
