"""Format and dimensions of an image file, from its first bytes. Nothing is decoded."""

import struct
from typing import Final, NamedTuple

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_JPEG: Final = b"\xff\xd8"
#: JPEG's start-of-frame markers. The other markers of this range are tables and extensions.
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: JPEG's markers without a length: TEM, the restarts and the start of the image.
_BARE: Final = frozenset({0x01, *range(0xD0, 0xD9)})
_SCAN: Final = 0xDA


class ImageSize(NamedTuple):
    """`media_type` is what the bytes are, whatever a Content-Type says."""

    media_type: str
    width: int
    height: int


def image_size(body: bytes) -> ImageSize | None:
    """The size of a JPEG, PNG or WebP; None for other bytes."""
    try:
        if body.startswith(_PNG) and body[12:16] == b"IHDR":
            return ImageSize("image/png", *struct.unpack_from(">II", body, 16))
        if body.startswith(_JPEG):
            return _jpeg(body)
        if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
            return _webp(body)
    except (struct.error, IndexError):  # the bytes end too early
        return None
    return None


def _jpeg(body: bytes) -> ImageSize | None:
    """Follows the segments to the frame. Source: ITU-T T.81, annex B."""
    position = len(_JPEG)
    while body[position] == 0xFF:
        marker = body[position + 1]
        if marker == 0xFF:  # padding
            position += 1
        elif marker in _BARE:
            position += 2
        elif marker in _FRAMES:
            height, width = struct.unpack_from(">HH", body, position + 5)
            return ImageSize("image/jpeg", width, height)
        elif marker == _SCAN:
            return None
        else:
            position += 2 + struct.unpack_from(">H", body, position + 2)[0]
    return None


def _webp(body: bytes) -> ImageSize | None:
    """Source: RFC 9649, sections 2.5 to 2.7, and RFC 6386, section 9.1, for `VP8 `."""
    match body[12:16]:
        case b"VP8X":
            width, height = (int.from_bytes(body[at : at + 3], "little") + 1 for at in (24, 27))
        case b"VP8L" if body[20] == 0x2F:
            bits = struct.unpack_from("<I", body, 21)[0]
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 " if body[23:26] == b"\x9d\x01\x2a":
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", body, 26))
        case _:
            return None
    return ImageSize("image/webp", width, height)
