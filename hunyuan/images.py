"""The image that a video starts from, as a request has it."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

#: The first bytes of the kinds of image that a worker reads.
_KINDS: Final = {rb"\xff\xd8\xff": "jpeg", rb"\x89PNG\r\n\x1a\n": "png", rb"RIFF....WEBP": "webp"}


class NotAnImageError(ValueError):
    """The file is not one that a video can start from."""


def as_url(image: str | Path) -> str:
    """A URL as it is, and a file as a data URL.

    Raises:
        NotAnImageError: the file is neither JPEG nor PNG nor WebP.
        OSError: it can't be read.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        return image
    data = Path(image).read_bytes()
    kind = next((kind for start, kind in _KINDS.items() if re.match(start, data, re.DOTALL)), None)
    if kind is None:
        raise NotAnImageError(f"{image} is not a JPEG, PNG or WebP file")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def with_image_url(request: Mapping[str, object]) -> dict[str, object]:
    """`request` with its image, if it has one, as a URL."""
    image = request.get("image")
    return {**request, "image": as_url(image)} if isinstance(image, str | Path) else dict(request)
