"""The image that a video starts from, if it is a file on this machine."""

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from contract.job import UPLOAD_PREFIX
from hunyuan.errors import ClientError

#: The first bytes of the kinds of image that a worker reads.
_KINDS: Final = {rb"\xff\xd8\xff": "jpeg", rb"\x89PNG\r\n\x1a\n": "png", rb"RIFF....WEBP": "webp"}
#: Bytes of a file that fits into a request, which may have 64 KiB. Base64 writes three bytes as four.
_INLINE: Final = 36 * 1024


class NotAnImageError(ClientError, ValueError):
    """The file is not one that a video can start from."""


@dataclass(frozen=True)
class LocalImage:
    """The bytes of a file."""

    data: bytes
    media_type: str

    @property
    def fits_inline(self) -> bool:
        """Whether a request may have it as a data URL. A larger one is uploaded."""
        return len(self.data) <= _INLINE

    @property
    def data_url(self) -> str:
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode()}"


def local_image(image: object) -> LocalImage | None:
    """The file that a request has as its `image`; None if it has a URL or an uploaded image, or none.

    Raises:
        NotAnImageError: the file is neither JPEG nor PNG nor WebP.
        OSError: it can't be read.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:", UPLOAD_PREFIX)):
        return None
    if not isinstance(image, str | Path):
        return None
    data = Path(image).read_bytes()
    kind = next((kind for start, kind in _KINDS.items() if re.match(start, data, re.DOTALL)), None)
    if kind is None:
        raise NotAnImageError(f"{image} is not a JPEG, PNG or WebP file")
    return LocalImage(data, f"image/{kind}")
