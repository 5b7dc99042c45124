"""Object keys. `storage.videos` owns the order of writing them.

videos/{task_id}.json             the verdict: the manifest of a completed task, or the tombstone of another one
videos/{task_id}/{attempt}.mp4    the video of one attempt
videos/{task_id}/{attempt}.jpg    its poster
videos/{task_id}/{attempt}.sheet.jpg  its sprite sheet
videos/{task_id}.mp4, .jpg        video and poster that an older release stored
uploaded-images/{expires}-{random}  an uploaded image, until some time after `expires`, in seconds since 1970
"""

import re
from typing import Final

_TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", re.ASCII)


#: What the keys of all tasks begin with.
PREFIX: Final = "videos/"
#: What the keys of uploaded images begin with.
IMAGES: Final = "uploaded-images/"
_IMAGE_ID = re.compile(r"([0-9]{10})-[A-Za-z0-9_-]{43}", re.ASCII)


def is_task_id(text: str) -> bool:
    """Whether `text` is a valid task id. Ours are UUIDs; RunPod's look like `3f1c…-u1` or `sync-…`."""
    return _TASK_ID.fullmatch(text) is not None


def video_key(task_id: str, attempt: str | None = None) -> str:
    """Key of an attempt's MP4; without `attempt`, the key that older releases used."""
    return _key(task_id, attempt, "mp4")


def poster_key(task_id: str, attempt: str | None = None) -> str:
    """Key of an attempt's poster image (JPEG); without `attempt`, the key that older releases used."""
    return _key(task_id, attempt, "jpg")


def sheet_key(task_id: str, attempt: str) -> str:
    """Key of an attempt's sprite sheet (JPEG)."""
    return _key(task_id, attempt, "sheet.jpg")


def manifest_key(task_id: str) -> str:
    """Key of the verdict (JSON)."""
    return _key(task_id, None, "json")


def attempts_prefix(task_id: str) -> str:
    """What the keys of every attempt's objects begin with."""
    return f"{_key(task_id, None, '')[:-1]}/"


def task_id_of(key: str) -> str | None:
    """The task whose object has this key; None for an object that is not one of a task."""
    name = key.removeprefix(PREFIX)
    task_id = name.partition("/")[0] if "/" in name else name.rpartition(".")[0]
    return task_id if key.startswith(PREFIX) and is_task_id(task_id) else None


def image_key(image_id: str) -> str:
    """Key of an uploaded image."""
    if _IMAGE_ID.fullmatch(image_id) is None:
        raise ValueError(f"not an image id: {image_id!r}")
    return f"{IMAGES}{image_id}"


def image_expires(key: str) -> int | None:
    """When the uploaded image with this key expires, in seconds since 1970; None for another object."""
    match = _IMAGE_ID.fullmatch(key.removeprefix(IMAGES)) if key.startswith(IMAGES) else None
    return int(match[1]) if match is not None else None


def _key(task_id: str, attempt: str | None, extension: str) -> str:
    if not is_task_id(task_id):
        raise ValueError(f"not a task id: {task_id!r}")
    return f"{PREFIX}{task_id}.{extension}" if attempt is None else f"{PREFIX}{task_id}/{attempt}.{extension}"
