"""The body of POST /v1/videos, a form or JSON, as a JobInput."""

import json
from collections.abc import Mapping
from typing import Any, Final

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from contract.errors import ErrorCode, JobFailure
from contract.job import MAX_IMAGE_BYTES, AspectRatio, InvalidInputError, JobInput, Resolution, parse_input, plain_type
from shim.api.dependencies import Services, services_of
from shim.api.images import store_image
from shim.errors import ApiError
from shim.http.body import json_body, limited_body, media_type

#: As POST /generate takes, besides the file of a form.
_MAX_BODY: Final = 64 * 1024
_MAX_FIELDS: Final = 32
#: What a request without them gets: the defaults of OpenAI are short and 720p, too.
_DEFAULTS: Final = {"seconds": "5", "size": "1280x720"}
_SIZES: Final[Mapping[str, tuple[Resolution, AspectRatio]]] = {
    f"{width}x{height}": (resolution, ratio)
    for resolution in Resolution
    for ratio, (width, height) in resolution.sizes.items()
}
#: The fields of JobInput that take text. A form has text only, so the others are read as JSON.
_TEXTS: Final = frozenset(
    name for name, field in JobInput.model_fields.items() if issubclass(plain_type(field.annotation), str)
)


async def asked_video(request: Request) -> JobInput:
    """The request's body. Raises ApiError and InvalidInputError, whose text names the field of this API."""
    fields = {**_DEFAULTS, **await _fields(request)}
    seconds, size, reference = fields.pop("seconds"), fields.pop("size"), fields.pop("input_reference", None)
    if size not in _SIZES:
        known = ", ".join(f'"{each}"' for each in _SIZES)
        raise _invalid(ErrorCode.INVALID_RESOLUTION, f"size must be one of {known}; got {json.dumps(size)}")
    try:
        duration = int(seconds)
    except (TypeError, ValueError) as exc:
        text = f"seconds must be a whole number of seconds; got {json.dumps(seconds)}"
        raise _invalid(ErrorCode.INVALID_DURATION, text) from exc
    resolution, ratio = _SIZES[size]
    image = {"image": _image(reference)} if reference is not None else {}
    asked = {"duration": duration, "resolution": resolution.value, "aspect_ratio": ratio.value, **fields, **image}
    return parse_input(asked)


def _image(reference: Any) -> Any:
    """The `image` of JobInput for an `input_reference`, which is a file or an object with the URL of an image."""
    return reference.get("image_url") if isinstance(reference, dict) else reference


async def _fields(request: Request) -> dict[str, Any]:
    kind = media_type(request)
    if kind == "application/json":
        fields = await json_body(request, _MAX_BODY)
        if not isinstance(fields, dict):
            raise ApiError(ErrorCode.INVALID_REQUEST, "the body must be a JSON object")
        return fields
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        services = services_of(request)
        async with services.uploads:
            return await _form(request, await limited_body(request, MAX_IMAGE_BYTES + _MAX_BODY), services)
    raise ApiError(ErrorCode.INVALID_REQUEST, "Content-Type must be multipart/form-data or application/json")


async def _form(request: Request, body: bytes, services: Services) -> dict[str, Any]:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, receive).form(max_files=1, max_fields=_MAX_FIELDS) as form:
            return {name: await _value(name, value, services) for name, value in form.items()}
    except HTTPException as exc:
        raise ApiError(ErrorCode.INVALID_REQUEST, f"the form is not valid: {exc.detail}") from exc


async def _value(name: str, value: UploadFile | str, services: Services) -> Any:
    if isinstance(value, UploadFile):
        return (await store_image(services, await value.read())).image
    if name in _TEXTS or name in _DEFAULTS:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _invalid(code: ErrorCode, error: str) -> InvalidInputError:
    return InvalidInputError(JobFailure(error=error, error_code=code))
