"""Format and dimensions from the bytes of an image file: the same as Pillow's."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from shim.api.image_size import ImageSize, image_size


def file(kind: str, size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
    made = io.BytesIO()
    Image.new(mode, size, 80).save(made, kind, **options)
    return made.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (300, 17), (17, 4000)])
@pytest.mark.parametrize(
    ("kind", "media_type", "mode", "options"),
    [
        ("PNG", "image/png", "RGB", {}),
        ("JPEG", "image/jpeg", "RGB", {}),
        ("JPEG", "image/jpeg", "L", {"progressive": True, "comment": b"x" * 60_000}),
        ("JPEG", "image/jpeg", "RGB", {"exif": b"Exif\0\0" + bytes(500), "dpi": (72, 72)}),
        ("WEBP", "image/webp", "RGB", {}),
        ("WEBP", "image/webp", "RGB", {"lossless": True}),
        ("WEBP", "image/webp", "RGB", {"exif": b"Exif\0\0" + bytes(500)}),
    ],
)
def test_the_size_is_read_from_the_first_bytes(
    kind: str, media_type: str, mode: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    assert image_size(file(kind, size, mode, **options)) == ImageSize(media_type, *size)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_bytes_that_end_too_early_have_no_size_or_the_right_one(kind: str) -> None:
    whole = file(kind, (300, 17))
    found = {image_size(whole[:length]) for length in range(len(whole))}
    assert found <= {None, image_size(whole)}
    assert None in found


@pytest.mark.parametrize(
    "body", [b"", b"GIF89a" + bytes(40), b"<svg/>", b"\xff\xd8" + bytes(40), b"RIFF0000WEBPALPH" + bytes(40)]
)
def test_other_bytes_have_no_size(body: bytes) -> None:
    assert image_size(body) is None


def test_segments_that_point_at_themselves_end_the_search() -> None:
    assert image_size(b"\xff\xd8" + b"\xff\xe0\x00\x00" * 10) is None
