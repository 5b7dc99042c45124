"""Reads a request's body, up to a limit."""

import json
from typing import Any, Final

from fastapi import Request

from contract.errors import ErrorCode
from shim.errors import ApiError, ServerErrorCode

#: A client reads the response only after it has sent its body, so a body up to this size is read to its end.
_DRAINED: Final = 1024 * 1024


def media_type(request: Request) -> str:
    """The Content-Type without its parameters, in small letters; empty without one."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def limited_body(request: Request, limit: int) -> bytes:
    """The request's body; never more than `limit` bytes of it are in memory.

    Raises:
        ApiError: REQUEST_TOO_LARGE for a larger one.
    """
    body = bytearray()
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max(limit, _DRAINED):
            break
        if size <= limit:
            body += chunk
    if size > limit:
        raise ApiError(ServerErrorCode.REQUEST_TOO_LARGE, f"the body is larger than {limit // 1024} KiB")
    return bytes(body)


async def json_body(request: Request, limit: int) -> Any:
    """The body, decoded, whatever its Content-Type; None for an empty one.

    Raises:
        ApiError: REQUEST_TOO_LARGE, or INVALID_REQUEST for a body that is not JSON.
    """
    body = await limited_body(request, limit)
    try:
        return json.loads(body or b"null")
    except (ValueError, RecursionError) as exc:
        raise ApiError(ErrorCode.INVALID_REQUEST, "the body is not valid JSON") from exc
