"""Uploaded images: a client stores one before it requests a video that starts from it.

An image has a random id, which its client alone knows. The id begins with the time at which the image expires, so that
the keys are in the order of their expiry.
"""

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from storage import layout
from storage.bucket import Bucket
from storage.errors import ObjectNotFoundError

#: Seconds for which a new request may name an uploaded image.
LIFETIME: Final = 24 * 3600
#: Seconds after its expiry for which an image stays in the bucket: tasks that were queued before may still wait.
GRACE: Final = 24 * 3600
#: The images that one call of `delete_expired` deletes.
_PAGE: Final = 100


class Images:
    """The uploaded images of one bucket, by id. Every method sends requests and may raise StorageError."""

    def __init__(self, bucket: Bucket, *, now: Callable[[], float] = time.time) -> None:
        self._bucket = bucket
        self._now = now

    def put(self, body: bytes, *, content_type: str) -> tuple[str, datetime]:
        """Stores an image. Returns its id, and when it expires."""
        expires = int(self._now()) + LIFETIME
        image_id = f"{expires:010d}-{secrets.token_urlsafe(32)}"
        self._bucket.put_bytes(body, layout.image_key(image_id), content_type=content_type)
        return image_id, datetime.fromtimestamp(expires, UTC)

    def is_available(self, image_id: str) -> bool:
        """Whether a new request may name this image: it was stored and has not expired."""
        key = layout.image_key(image_id)
        expires = layout.image_expires(key)
        return expires is not None and self._now() < expires and self._bucket.list_keys(key, limit=1) == [key]

    def get(self, image_id: str) -> bytes | None:
        """The image; None if it is not in the bucket. It may have expired: its task was queued before."""
        try:
            return self._bucket.get_bytes(layout.image_key(image_id))
        except ObjectNotFoundError:
            return None

    def delete_expired(self) -> bool:
        """Deletes some of the images whose grace is over; whether there may be others. Touches no other objects."""
        keys = self._bucket.list_keys(layout.IMAGES, limit=_PAGE)
        before = self._now() - GRACE
        old = [key for key in keys if (expires := layout.image_expires(key)) is not None and expires < before]
        for key in old:
            self._bucket.delete(key)
        return len(old) == _PAGE
