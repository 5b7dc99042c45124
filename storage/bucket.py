"""One bucket on any S3-compatible server: MinIO, AWS, R2, RunPod's network volumes, the embedded gateway.

boto3 is imported here and nowhere else. Every method is blocking and thread-safe (one boto3 client serves many
threads); every failure leaves as one of `storage.errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from storage.errors import (
    ObjectNotFoundError,
    StorageDeniedError,
    StorageError,
    StorageUnavailableError,
)
from storage.settings import BucketSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Checksums "when_required": boto3's default trailing checksums break ranged reads on rclone and uploads on
# several S3-compatible stores. Connect timeout slightly over a multiple of 3 s, the TCP retransmission timer.
_CLIENT_CONFIG: Final = Config(
    signature_version="s3v4",
    s3={"addressing_style": "path"},
    connect_timeout=3.05,
    read_timeout=30,
    retries={"mode": "standard", "max_attempts": 4},
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)

# One PutObject below 100 MB, as RunPod's network volumes prefer; parts above it.
_TRANSFER_CONFIG: Final = TransferConfig(multipart_threshold=100_000_000, multipart_chunksize=32_000_000)

_DENIED: Final = {
    "403",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "NoSuchBucket",
    "InvalidBucketName",
}
_MISSING: Final = {"404", "NoSuchKey", "NotFound"}


@dataclass(frozen=True)
class ObjectHead:
    """What a HEAD says of an object. `size` in bytes."""

    size: int
    etag: str
    content_type: str


class Bucket:
    """Objects of one bucket, by key.

    Each request is made within `observe(operation)`, which sees how long it takes and what it raises.
    """

    def __init__(
        self, settings: BucketSettings, *, observe: Callable[[str], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.name = settings.name
        self._settings = settings
        self._observe = observe
        self._client = _client(settings, str(settings.endpoint_url))
        public = settings.public_endpoint_url
        self._public_client = _client(settings, str(public)) if public else self._client

    def check(self) -> None:
        """Ask the server for the bucket.

        Raises:
            StorageDeniedError: the credentials are refused or the bucket does not exist.
            StorageUnavailableError: the server does not answer.
        """
        with self._observe("head_bucket"):
            try:
                with self._translated("the bucket"):
                    self._client.head_bucket(Bucket=self.name)
            except ObjectNotFoundError as exc:
                raise StorageDeniedError(f"bucket {self.name!r} does not exist") from exc

    def create(self) -> None:
        """Create the bucket unless it is there already."""
        try:
            self.check()
        except StorageDeniedError:
            with self._requesting("create_bucket", "the bucket"):
                self._client.create_bucket(Bucket=self.name)

    def put_file(self, path: Path, key: str, *, content_type: str) -> None:
        """Upload the file at `path`; the object appears whole or not at all."""
        with self._requesting("put_object", key):
            self._client.upload_file(
                str(path), self.name, key, ExtraArgs={"ContentType": content_type}, Config=_TRANSFER_CONFIG
            )

    def put_bytes(self, body: bytes, key: str, *, content_type: str) -> None:
        """Write a small object."""
        with self._requesting("put_object", key):
            self._client.put_object(Bucket=self.name, Key=key, Body=body, ContentType=content_type)

    def get_bytes(self, key: str) -> bytes:
        """Read a small object whole.

        Raises:
            ObjectNotFoundError: there is none.
        """
        with self._requesting("get_object", key):
            return self._client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def open_range(
        self, key: str, *, start: int = 0, end: int | None = None, chunk_size: int = 1 << 16
    ) -> Iterator[bytes]:
        """Stream bytes `start` to `end` inclusive (to the last one if None), `chunk_size` at a time."""
        with self._translated(key):
            byte_range = f"bytes={start}-{'' if end is None else end}"
            body = self._client.get_object(Bucket=self.name, Key=key, Range=byte_range)["Body"]
            yield from body.iter_chunks(chunk_size)

    def head(self, key: str) -> ObjectHead:
        """Size, ETag and type of an object.

        Raises:
            ObjectNotFoundError: there is none.
        """
        with self._requesting("head_object", key):
            answer = self._client.head_object(Bucket=self.name, Key=key)
        return ObjectHead(answer["ContentLength"], answer["ETag"], answer["ContentType"])

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is removed already."""
        with self._requesting("delete_object", key):
            self._client.delete_object(Bucket=self.name, Key=key)

    def presign(
        self,
        key: str,
        *,
        method: Literal["GET", "HEAD"] = "GET",
        expires_in: int | None = None,
        public: bool = True,
    ) -> str:
        """A URL that reads the object with no credentials for `expires_in` seconds. Signed here, with no request.

        `public` signs for the address clients use (`BUCKET_PUBLIC_ENDPOINT_URL`), else for our own.
        """
        client = self._public_client if public else self._client
        operation = "get_object" if method == "GET" else "head_object"
        with self._translated(key):
            return client.generate_presigned_url(
                operation,
                Params={"Bucket": self.name, "Key": key},
                ExpiresIn=self._settings.url_expires_in if expires_in is None else expires_in,
            )

    @contextmanager
    def _requesting(self, operation: str, what: str) -> Iterator[None]:
        with self._observe(operation), self._translated(what):
            yield

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn boto3's errors into ours, naming what was asked for and never how it was signed."""
        try:
            yield
        except ClientError as exc:
            code = str(exc.response.get("Error", {}).get("Code", ""))
            message = f"{what} in bucket {self.name!r}: {code or 'refused'}"
            if code in _MISSING:
                raise ObjectNotFoundError(message) from exc
            if code in _DENIED:
                raise StorageDeniedError(message) from exc
            if exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) >= 500:
                raise StorageUnavailableError(message) from exc
            raise StorageError(message) from exc
        except (BotoCoreError, Boto3Error) as exc:
            raise StorageUnavailableError(f"{what} in bucket {self.name!r}: {exc}") from exc


def _client(settings: BucketSettings, endpoint_url: str) -> S3Client:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=settings.access_key_id,
        aws_secret_access_key=settings.secret_access_key.get_secret_value(),
        region_name=settings.region,
        config=_CLIENT_CONFIG,
    )
