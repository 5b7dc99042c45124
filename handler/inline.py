"""A video in the result of its job: for a worker without a bucket on RunPod, whose results have a limit."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from contract.result import InlineResult, Manifest

#: Bytes that RunPod accepts as the result of /run. It drops a larger one, and the job stays without a result.
#: Source: https://docs.runpod.io/serverless/endpoints/operations.
RESULT_LIMIT: Final = 10_000_000
#: Bytes of a result beside its video: prompts, timings, sizes.
_REST: Final = 100_000
#: Base64 writes three bytes as four characters.
LARGEST_VIDEO: Final = (RESULT_LIMIT - _REST) // 4 * 3


class VideoTooLargeError(Exception):
    """The video does not fit into a result. The client reads the message."""


@dataclass(kw_only=True)
class InlineStore:
    """Takes the place of `JobStore` for one job that has no bucket. Nothing is stored, so nothing is found."""

    task_id: str
    keys: Mapping[str, str] = field(default_factory=dict)
    _video: bytes = b""

    def find(self) -> None:
        """There is no verdict of an earlier attempt."""

    def put(self, video: Path, _poster: Path, _sheet: Path, make_manifest: Callable[[], Manifest]) -> Manifest:
        """Keeps the video for `result`. Its pictures are dropped.

        Raises:
            VideoTooLargeError: RunPod would drop the result.
        """
        size = video.stat().st_size
        if size > LARGEST_VIDEO:
            raise VideoTooLargeError(
                f"The video has {size / 1e6:.1f} MB, and a result on RunPod can carry {LARGEST_VIDEO / 1e6:.1f} MB: "
                "set BUCKET_ENDPOINT_URL and its keys on the worker, or send s3Config with the job"
            )
        self._video = video.read_bytes()
        return make_manifest()

    def result(self, manifest: Manifest) -> InlineResult:
        """The manifest with the video."""
        return InlineResult(**dict(manifest), video_base64=base64.b64encode(self._video).decode())
