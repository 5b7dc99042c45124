"""Object keys. A task's objects differ only in their extension. `storage.videos` owns the order of writing them."""

import re

_TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", re.ASCII)


def is_task_id(text: str) -> bool:
    """Whether `text` is a valid task id. Ours are UUIDs; RunPod's look like `3f1c…-u1` or `sync-…`."""
    return _TASK_ID.fullmatch(text) is not None


def video_key(task_id: str) -> str:
    """Key of the MP4."""
    return _key(task_id, "mp4")


def manifest_key(task_id: str) -> str:
    """Key of the manifest (JSON)."""
    return _key(task_id, "json")


def poster_key(task_id: str) -> str:
    """Key of the poster image (JPEG)."""
    return _key(task_id, "jpg")


def _key(task_id: str, extension: str) -> str:
    if not is_task_id(task_id):
        raise ValueError(f"not a task id: {task_id!r}")
    return f"videos/{task_id}.{extension}"
