"""POST /images: stores the image that a video will start from. Most pictures do not fit the 64 KiB of a request."""

import logging
from datetime import datetime

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from contract.errors import ErrorCode
from contract.job import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, UPLOAD_PREFIX
from shim.api.dependencies import GetServices, Services, take_upload_token
from shim.api.documented import error_responses
from shim.api.image_size import ImageSize, image_size
from shim.errors import ApiError
from shim.http.body import limited_body

log = logging.getLogger(__name__)
router = APIRouter()


class UploadedImage(BaseModel):
    """A stored image."""

    image: str = Field(
        description="The value of the field `image` of `POST /generate`. Who knows it may use the image."
    )
    expires_at: datetime = Field(description="Until then a request may use the image.")


async def within_upload_limit(request: Request) -> None:
    """`take_upload_token` as a dependency: a coroutine, because FastAPI would call a function in a thread."""
    take_upload_token(request)


@router.post(
    "/images",
    status_code=201,
    operation_id="upload_image",
    dependencies=[Depends(within_upload_limit)],
    responses=error_responses(400, 401, 408, 413, 429, 500, 503),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                media_type: {"schema": {"type": "string", "format": "binary"}}
                for media_type in ("image/jpeg", "image/png", "image/webp")
            },
        },
    },
)
async def upload(request: Request, services: GetServices) -> UploadedImage:
    """Store the image that a video will start from: JPEG, PNG or WebP, at most 20 MiB and 50 megapixels.

    The body is the file. The image can be used for a day.
    """
    # A browser sends a form of another site without asking, but not with this Content-Type.
    if not request.headers.get("content-type", "").lower().startswith("image/"):
        raise ApiError(ErrorCode.INVALID_REQUEST, "Content-Type must be image/jpeg, image/png or image/webp")
    async with services.uploads:
        return await store_image(services, await limited_body(request, MAX_IMAGE_BYTES))


async def store_image(services: Services, body: bytes) -> UploadedImage:
    """Stores a file. Raises ApiError for one that is no image, or has too many pixels."""
    size = _checked(body)
    image_id, expires_at = await services.images.put(body, size.media_type)
    log.info("stored an image of %d x %d pixels, %d bytes", size.width, size.height, len(body))
    return UploadedImage(image=UPLOAD_PREFIX + image_id, expires_at=expires_at)


def _checked(body: bytes) -> ImageSize:
    size = image_size(body)
    if size is None or 0 in size:
        raise ApiError(ErrorCode.INVALID_REQUEST, "image: the body is no JPEG, PNG or WebP")
    if size.width * size.height > MAX_IMAGE_PIXELS:
        raise ApiError(
            ErrorCode.INVALID_REQUEST, f"image: {size.width} x {size.height} pixels are more than 50 megapixels"
        )
    return size
