"""How our errors look over HTTP. Status codes are decided here, in one table, and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import StrEnum
from http import HTTPStatus
from typing import Final

from pydantic import BaseModel

from contract.errors import ErrorCode
from contract.job import InvalidInputError
from shim.queue.base import IdempotencyConflictError, ModelNotLoadedError, QueueFullError, QueueUnavailableError
from shim.tasks import TaskNotFoundError
from storage.errors import StorageError

log = logging.getLogger(__name__)


class ServerErrorCode(StrEnum):
    """The codes that only the server speaks."""

    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    UNAUTHORIZED = "UNAUTHORIZED"
    NOT_FOUND = "NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"
    TASK_NOT_FOUND = "TASK_NOT_FOUND"
    VIDEO_NOT_READY = "VIDEO_NOT_READY"
    RANGE_NOT_SATISFIABLE = "RANGE_NOT_SATISFIABLE"
    IDEMPOTENCY_KEY_REUSED = "IDEMPOTENCY_KEY_REUSED"
    RATE_LIMITED = "RATE_LIMITED"
    HEADERS_TOO_LARGE = "HEADERS_TOO_LARGE"
    SERVER_BUSY = "SERVER_BUSY"
    QUEUE_FULL = "QUEUE_FULL"
    MODEL_NOT_LOADED = "MODEL_NOT_LOADED"
    QUEUE_UNAVAILABLE = "QUEUE_UNAVAILABLE"
    INTERNAL_ERROR = "INTERNAL_ERROR"


#: Every `error_code` that a client can meet.
AnyErrorCode = ErrorCode | ServerErrorCode


class ErrorBody(BaseModel):
    """An error as clients read it: `{"error": text, "error_code": CODE}`."""

    error: str
    error_code: AnyErrorCode


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
    ServerErrorCode.METHOD_NOT_ALLOWED: 405,
    ServerErrorCode.REQUEST_TIMEOUT: 408,
    ServerErrorCode.IDEMPOTENCY_KEY_REUSED: 409,
    ServerErrorCode.REQUEST_TOO_LARGE: 413,
    ServerErrorCode.RANGE_NOT_SATISFIABLE: 416,
    ServerErrorCode.RATE_LIMITED: 429,
    ServerErrorCode.HEADERS_TOO_LARGE: 431,
    ServerErrorCode.INTERNAL_ERROR: 500,
    ServerErrorCode.SERVER_BUSY: 503,
    ServerErrorCode.QUEUE_FULL: 503,
    ServerErrorCode.MODEL_NOT_LOADED: 503,
    ServerErrorCode.QUEUE_UNAVAILABLE: 503,
    ErrorCode.STORAGE_UNAVAILABLE: 503,
}
"""A failed job is no HTTP error: OOM_ERROR, GENERATION_FAILED and CANCELLED stand in a 200's body only."""

#: Seconds after which it makes sense to try again, where nothing better is known.
RETRY_AFTER: Final[Mapping[AnyErrorCode, int]] = {
    ServerErrorCode.SERVER_BUSY: 5,
    ServerErrorCode.QUEUE_FULL: 30,
    ServerErrorCode.MODEL_NOT_LOADED: 10,
    ServerErrorCode.QUEUE_UNAVAILABLE: 5,
    ErrorCode.STORAGE_UNAVAILABLE: 5,
}


class ApiError(Exception):
    """A request that can't be answered as asked, in the words and with the headers the client gets."""

    def __init__(self, code: AnyErrorCode, error: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.body = ErrorBody(error=error, error_code=code)
        self.headers = dict(headers or {})
        if code in RETRY_AFTER:
            self.headers.setdefault("Retry-After", str(RETRY_AFTER[code]))

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.body.error_code]

    @property
    def phrase(self) -> str:
        """The HTTP status in words."""
        return HTTPStatus(self.status).phrase


def api_error(exc: Exception) -> ApiError:
    """The HTTP face of an error. One that nobody expected is INTERNAL_ERROR: its traceback stays in the log."""
    match exc:
        case ApiError():
            return exc
        case InvalidInputError():
            return ApiError(exc.failure.error_code, exc.failure.error)
        case TaskNotFoundError():
            return ApiError(ServerErrorCode.TASK_NOT_FOUND, "There is no task with this id")
        case IdempotencyConflictError():
            return ApiError(ServerErrorCode.IDEMPOTENCY_KEY_REUSED, str(exc))
        case QueueFullError():
            return ApiError(ServerErrorCode.QUEUE_FULL, str(exc))
        case ModelNotLoadedError():
            return ApiError(ServerErrorCode.MODEL_NOT_LOADED, str(exc))
        case QueueUnavailableError():
            return ApiError(ServerErrorCode.QUEUE_UNAVAILABLE, str(exc))
        case StorageError():
            log.error("%s", exc)
            return ApiError(ErrorCode.STORAGE_UNAVAILABLE, "The video storage is not available just now")
        case _:
            return ApiError(ServerErrorCode.INTERNAL_ERROR, "Internal server error")
