"""GET, HEAD and DELETE /videos/{task_id}.mp4. GET streams the video from the bucket in constant memory.

`curl -O` follows no redirect, so the bytes pass through the server: it reads a presigned URL with httpx and sends on
each chunk. It answers conditional and range requests from the manifest (size, sha256), because S3 servers differ in
which of them they support. RFC 9110, sections 13 (conditional requests) and 14 (ranges).
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import anyio.to_thread
import httpx
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Message, Send

from contract.errors import ErrorCode
from contract.result import Manifest
from shim.api.dependencies import GetServices, Services
from shim.api.documented import error_responses
from shim.errors import ApiError, ServerErrorCode
from shim.tasks import finished_video
from storage.errors import ObjectNotFoundError

#: Seconds for which a presigned URL is valid: enough for clocks that differ by minutes. The URL stays in this process,
#: and a download may take longer, because only the start of a request needs a valid URL.
_URL_EXPIRES_IN: Final = 300
#: Bytes that the server reads and sends at once. A download has about four times as many in memory.
_CHUNK: Final = 64 * 1024
#: Seconds after which a client that reads nothing loses its connection to the bucket, and the number of blocks of
#: `_CHUNK` that it must read without such a pause to get one for the rest of the video.
_STALL_SECONDS: Final = 1.0
_BLOCKS_AFTER_STALL: Final = 16
#: Waits in seconds before each retry of a read that broke off. The response breaks off after as many retries in a row
#: without a byte.
_RETRY_WAITS: Final = (0.0, 0.5, 1.0, 2.0, 4.0)

log = logging.getLogger(__name__)
router = APIRouter()


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `end`, inclusive."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start + 1


class UnsatisfiableRangeError(ValueError):
    """The range begins after the last byte."""


def parse_range(header: str, size: int) -> ByteRange | None:
    """The range that a Range header asks for in `size` bytes; None if the header is to be ignored.

    A server may ignore Range. This one does if the header is malformed, has another unit, or names several ranges.

    Raises:
        UnsatisfiableRangeError: respond with 416.
    """
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", header, re.ASCII | re.IGNORECASE)
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, end = max(size - int(last), 0), size - 1
        satisfiable = int(last) > 0 and size > 0
    else:
        start, end = int(first), min(int(last), size - 1) if last else size - 1
        if last and int(last) < start:
            return None
        satisfiable = start < size
    if not satisfiable:
        raise UnsatisfiableRangeError(header)
    return ByteRange(start, end)


def etag_of(manifest: Manifest) -> str:
    """A strong validator: the hash of the content, the same from every server and bucket."""
    return f'"{manifest.sha256}"'


_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"video/mp4": {}, "image/jpeg": {}}, "description": "The video, or its poster."},
    206: {"content": {"video/mp4": {}}, "description": "The requested range."},
    304: {"description": "The client has the video already."},
    **error_responses(401, 404, 416, 500, 503),
}


@router.head("/videos/{file_name:path}", operation_id="head_video", response_class=Response, responses=_RESPONSES)
@router.get("/videos/{file_name:path}", operation_id="get_video", response_class=Response, responses=_RESPONSES)
async def video(file_name: str, request: Request, services: GetServices) -> Response:
    """Download the generated video file, or with `.jpg` in place of `.mp4` its middle frame."""
    if file_name.endswith(".jpg"):
        return await _poster(file_name.removesuffix(".jpg"), request, services)
    task_id = _task_id(file_name)
    manifest = finished_video(await services.tasks.find_video(task_id))
    etag = etag_of(manifest)
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f'inline; filename="{task_id}.mp4"',
    }
    if names_etag(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    wanted = _range(request, etag, manifest.file_size)
    status = 200 if wanted is None else 206
    whole = ByteRange(0, manifest.file_size - 1)
    if wanted is not None:
        headers["Content-Range"] = f"bytes {wanted.start}-{wanted.end}/{manifest.file_size}"
    headers["Content-Length"] = str((wanted or whole).length)
    source = StoredVideo(services, manifest)
    if request.method == "HEAD":
        await source.check()
        return Response(status_code=status, headers=headers, media_type="video/mp4")
    body = await source.open(wanted or whole)
    return VideoResponse(body, status_code=status, headers=headers, media_type="video/mp4")


@router.delete(
    "/videos/{file_name:path}",
    operation_id="delete_video",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "The video is deleted."}, **error_responses(401, 404, 500, 503)},
)
async def delete(file_name: str, services: GetServices) -> Response:
    """Delete a completed task's video with its poster and its manifest."""
    await services.tasks.delete_video(_task_id(file_name))
    return Response(status_code=204)


async def _poster(task_id: str, request: Request, services: Services) -> Response:
    manifest = finished_video(await services.tasks.find_video(task_id))
    return await _picture(manifest.poster_key, f'"{manifest.sha256}.jpg"', request, services)


async def sprite_sheet(task_id: str, request: Request, services: Services) -> Response:
    """Sixteen frames of the video in one JPEG."""
    manifest = finished_video(await services.tasks.find_video(task_id))
    if manifest.sheet_key is None:
        text = "The video has no sprite sheet: an earlier release rendered it"
        raise ApiError(ServerErrorCode.VIDEO_NOT_READY, text)
    return await _picture(manifest.sheet_key, f'"{manifest.sha256}.sheet.jpg"', request, services)


async def _picture(key: str, etag: str, request: Request, services: Services) -> Response:
    """A JPEG of the bucket. It is small, so it is read at once."""
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if names_etag(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    try:
        picture = await anyio.to_thread.run_sync(services.bucket.get_bytes, key)
    except ObjectNotFoundError as exc:
        raise ApiError(ServerErrorCode.VIDEO_NOT_READY, "The picture is no longer in the bucket") from exc
    return Response(picture, headers=headers, media_type="image/jpeg")


def _task_id(file_name: str) -> str:
    task_id, dot, extension = file_name.rpartition(".")
    if not dot or extension != "mp4":
        raise ApiError(
            ServerErrorCode.NOT_FOUND, "videos are at /videos/{task_id}.mp4, their posters at /videos/{task_id}.jpg"
        )
    return task_id


def names_etag(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names `etag`, compared weakly."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def _range(request: Request, etag: str, size: int) -> ByteRange | None:
    # Only GET has ranges: RFC 9110, section 14.2.
    header = request.headers.get("range") if request.method == "GET" else None
    condition = request.headers.get("if-range")
    if header is None or (condition is not None and condition.strip() != etag):
        return None  # the client has a part of another version, so it needs the whole video
    try:
        return parse_range(header, size)
    except UnsatisfiableRangeError as exc:
        raise ApiError(
            ServerErrorCode.RANGE_NOT_SATISFIABLE, f"the video has {size} bytes", {"Content-Range": f"bytes */{size}"}
        ) from exc


class BrokenOffError(Exception):
    """The bucket did not return the rest of a video."""


class VideoResponse(StreamingResponse):
    """A response whose body may break off. It is then shorter than its Content-Length and its connection is closed, so
    that no client takes the part for the whole. A client that does not read holds no connection to the bucket.
    """

    def __init__(self, body: "VideoBody", **options: Any) -> None:
        super().__init__((), **options)
        self._body = body

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            while part := await self._body.read():
                await self._send_part(send, part)
        except BrokenOffError as exc:
            log.error("%s", exc)
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._body.release()

    async def _send_part(self, send: Send, part: bytes) -> None:
        message: Message = {"type": "http.response.body", "body": part, "more_body": True}
        try:
            # A cancelled send has written nothing: it waits before it writes.
            async with asyncio.timeout(_STALL_SECONDS):
                await send(message)
        except TimeoutError:
            await self._body.release()
            await send(message)


class StoredVideo:
    """One video in the bucket, read through presigned URLs."""

    def __init__(self, services: Services, manifest: Manifest) -> None:
        self._http = services.bucket_http
        self._bucket = services.bucket
        self._observe = services.metrics.s3_request
        self.key = manifest.video_key

    async def check(self) -> None:
        """Raise ApiError unless the bucket returns the video's head."""
        url = self._bucket.presign(self.key, method="HEAD", expires_in=_URL_EXPIRES_IN, public=False)
        try:
            with self._observe("head_video"):
                self._raise_for_status(await self._http.head(url))
        except httpx.HTTPError as exc:
            raise self.unavailable(exc) from exc

    async def open(self, wanted: ByteRange) -> "VideoBody":
        """Start reading. Returns when the first bytes are here.

        Raises:
            ApiError: the bucket does not have the video, or does not answer.
        """
        body = VideoBody(self, wanted)
        try:
            await body.start()
        except httpx.HTTPError as exc:
            raise self.unavailable(exc) from exc
        return body

    async def read(self, wanted: ByteRange) -> AsyncGenerator[bytes, None]:
        """The bytes of `wanted` from one request; fewer if the response is shorter.

        Raises:
            ApiError: the bucket does not have the video, or rejects the request.
            httpx.HTTPError: the bucket does not answer, or the connection breaks.
        """
        url = self._bucket.presign(self.key, expires_in=_URL_EXPIRES_IN, public=False)
        headers = {"Range": f"bytes={wanted.start}-{wanted.end}", "Accept-Encoding": "identity"}
        async with AsyncExitStack() as stack:
            with self._observe("get_video"):
                response = await stack.enter_async_context(self._http.stream("GET", url, headers=headers))
                self._raise_for_status(response)
            # Some S3 servers (rclone) ignore the Range of a presigned request: skip the bytes before the range.
            skip = wanted.start if response.status_code == 200 else 0
            left = wanted.length
            async for chunk in response.aiter_raw(_CHUNK):
                part = chunk[skip : skip + left]
                skip = max(skip - len(chunk), 0)
                left -= len(part)
                if part:
                    yield part
                if left == 0 and response.status_code == 200:
                    return

    def _raise_for_status(self, response: httpx.Response) -> None:
        if response.status_code == 404:
            raise ApiError(ServerErrorCode.VIDEO_NOT_READY, "The video is no longer in the bucket")
        if response.status_code not in (200, 206):
            raise self.unavailable(f"the bucket responded with {response.status_code}")

    def unavailable(self, why: object) -> ApiError:
        log.error("cannot read %s from the bucket: %s", self.key, str(why) or type(why).__name__)
        return ApiError(ErrorCode.STORAGE_UNAVAILABLE, "The video storage is not available just now")


class VideoBody:
    """The bytes of one download. It reads one response of the bucket as long as the client keeps up.

    `release` gives the connection to the bucket back while the client does not read. Then each of the next blocks is
    one short request, whose connection is free again before the client gets the block. If a request breaks, the next
    one continues at that byte.
    """

    def __init__(self, video: StoredVideo, wanted: ByteRange) -> None:
        self._video = video
        self._wanted = wanted
        self._position = wanted.start
        self._parts: AsyncGenerator[bytes, None] | None = None
        self._first = b""
        self._blocks = 0
        self._failures = 0

    async def start(self) -> None:
        """Reads the first bytes, without retries. Raises ApiError and httpx.HTTPError."""
        self._first = await self._next()
        if not self._first:
            raise self._video.unavailable("the bucket sent an empty body")

    async def read(self) -> bytes:
        """The next bytes; none at the end. Raises BrokenOffError when the retries are used up."""
        part, self._first = self._first, b""
        while not part and self._position <= self._wanted.end:
            try:
                part = await self._next()
                why = f"the bucket sent {self._position - self._wanted.start} of {self._wanted.length} bytes"
            except (httpx.HTTPError, ApiError) as exc:
                why = f"{type(exc).__name__}: {exc}"
            if not part:
                await self._close()
                await self._wait_to_retry(why)
        if part:
            self._position += len(part)
            self._failures = 0
        return part

    async def release(self) -> None:
        """Closes the request to the bucket. `read` opens the next one."""
        await self._close()
        self._blocks = _BLOCKS_AFTER_STALL

    async def _next(self) -> bytes:
        if self._blocks > 0:
            self._blocks -= 1
            end = min(self._position + _CHUNK - 1, self._wanted.end)
            return b"".join([part async for part in self._video.read(ByteRange(self._position, end))])
        if self._parts is None:
            self._parts = self._video.read(ByteRange(self._position, self._wanted.end))
        return await anext(self._parts, b"")

    async def _close(self) -> None:
        if self._parts is not None:
            await self._parts.aclose()
            self._parts = None

    async def _wait_to_retry(self, why: str) -> None:
        name, position = self._video.key, self._position
        if self._failures == len(_RETRY_WAITS):
            raise BrokenOffError(f"the download of {name} broke off at byte {position}, retries are used up: {why}")
        log.warning("the download of %s broke, reading on at byte %d: %s", name, position, why)
        await asyncio.sleep(_RETRY_WAITS[self._failures])
        self._failures += 1
