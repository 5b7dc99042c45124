"""How our errors look over HTTP. Status codes are decided here, in one table, and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from handler.contract import ErrorCode, InvalidInputError, JobFailure
from shim.queue.base import IdempotencyConflictError, ModelNotLoadedError, QueueFullError, QueueUnavailableError
from shim.tasks import TaskNotFoundError
from storage.errors import StorageError

log = logging.getLogger(__name__)

STATUS: Final[Mapping[ErrorCode, int]] = {
    ErrorCode.INVALID_PROMPT: 400,
    ErrorCode.INVALID_DURATION: 400,
    ErrorCode.INVALID_RESOLUTION: 400,
    ErrorCode.INVALID_MODEL: 400,
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.TASK_NOT_FOUND: 404,
    ErrorCode.VIDEO_NOT_READY: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.REQUEST_TIMEOUT: 408,
    ErrorCode.IDEMPOTENCY_KEY_REUSED: 409,
    ErrorCode.REQUEST_TOO_LARGE: 413,
    ErrorCode.RANGE_NOT_SATISFIABLE: 416,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.HEADERS_TOO_LARGE: 431,
    ErrorCode.INTERNAL_ERROR: 500,
    ErrorCode.SERVER_BUSY: 503,
    ErrorCode.QUEUE_FULL: 503,
    ErrorCode.MODEL_NOT_LOADED: 503,
    ErrorCode.QUEUE_UNAVAILABLE: 503,
    ErrorCode.STORAGE_UNAVAILABLE: 503,
}
"""A failed job is no HTTP error: OOM_ERROR, GENERATION_FAILED and CANCELLED stand in a 200's body only."""

#: Seconds after which it makes sense to try again, where nothing better is known.
RETRY_AFTER: Final[Mapping[ErrorCode, int]] = {
    ErrorCode.SERVER_BUSY: 5,
    ErrorCode.QUEUE_FULL: 30,
    ErrorCode.MODEL_NOT_LOADED: 10,
    ErrorCode.QUEUE_UNAVAILABLE: 5,
    ErrorCode.STORAGE_UNAVAILABLE: 5,
}


class ApiError(Exception):
    """A request that can't be answered as asked, in the words and with the headers the client gets."""

    def __init__(self, code: ErrorCode, error: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.failure = JobFailure(error=error, error_code=code)
        self.headers = dict(headers or {})
        if code in RETRY_AFTER:
            self.headers.setdefault("Retry-After", str(RETRY_AFTER[code]))

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.failure.error_code]

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
            return ApiError(ErrorCode.TASK_NOT_FOUND, "There is no task with this id")
        case IdempotencyConflictError():
            return ApiError(ErrorCode.IDEMPOTENCY_KEY_REUSED, str(exc))
        case QueueFullError():
            return ApiError(ErrorCode.QUEUE_FULL, str(exc))
        case ModelNotLoadedError():
            return ApiError(ErrorCode.MODEL_NOT_LOADED, str(exc))
        case QueueUnavailableError():
            return ApiError(ErrorCode.QUEUE_UNAVAILABLE, str(exc))
        case StorageError():
            log.error("%s", exc)
            return ApiError(ErrorCode.STORAGE_UNAVAILABLE, "The video storage is not available just now")
        case _:
            return ApiError(ErrorCode.INTERNAL_ERROR, "Internal server error")
