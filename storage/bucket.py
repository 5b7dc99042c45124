"""One bucket on any S3-compatible server: MinIO, AWS, R2, RunPod's network volumes, the embedded gateway.

boto3 is imported here and nowhere else. Every method is blocking and thread-safe (one boto3 client serves many
threads); every failure leaves as one of `storage.errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import boto3
import urllib3
from boto3.exceptions import Boto3Error, S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
)

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
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)

# One PutObject below 100 MB, as RunPod's network volumes prefer; parts above it.
_TRANSFER_CONFIG: Final = TransferConfig(multipart_threshold=100_000_000, multipart_chunksize=32_000_000)

#: Refusals that last until somebody mends something: what they mean, and the setting to look at.
#: Source: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; a HEAD has but the status.
_DENIED: Final[Mapping[str, tuple[str, str | None]]] = {
    "403": ("the server refuses", "access_key_id"),
    "AccessDenied": ("the access key may not do this", "access_key_id"),
    "InvalidAccessKeyId": ("the server does not know the access key", "access_key_id"),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", "secret_access_key"),
    "NoSuchBucket": ("there is no such bucket", "name"),
    "InvalidBucketName": ("no bucket can have this name", "name"),
    "AuthorizationHeaderMalformed": ("the region in the signature is wrong", "region"),
    "PermanentRedirect": ("the bucket is in another region, or at another address", "region"),
    "301": ("the bucket is in another region, or at another address", "region"),
    "RequestTimeTooSkewed": ("this machine's clock and the server's are too far apart: set the clock", None),
}
_MISSING: Final = {"404", "NoSuchKey", "NotFound"}
#: Below 500, but gone when the request is sent again.
_PASSING: Final = {"RequestTimeout", "IncompleteBody", "BadDigest", "OperationAborted", "TooManyRequests", "429"}


@dataclass(frozen=True)
class ObjectHead:
    """What a HEAD says of an object. `size` in bytes."""

    size: int
    etag: str
    content_type: str


class Bucket:
    """Objects of one bucket, by key.

    A request is sent up to `attempts` times, some seconds apart, where the server is away or busy; each waits up to
    `timeout` seconds for the next byte of the answer. Each is made within `observe(operation)`, which sees how long it
    takes and what it raises.
    """

    def __init__(
        self,
        settings: BucketSettings,
        *,
        timeout: float = 30,
        attempts: int = 4,
        observe: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.name = settings.name
        self._settings = settings
        self._observe = observe
        retries = Config(read_timeout=timeout, retries={"mode": "standard", "max_attempts": attempts})
        self._client = _client(settings, str(settings.endpoint_url), retries)
        public = settings.public_endpoint_url
        self._public_client = _client(settings, str(public), retries) if public else self._client

    def check(self) -> None:
        """Ask the server for the bucket.

        Raises:
            StorageDeniedError: a setting is wrong, which the text names, or the clock.
            StorageUnavailableError: the server does not answer.
        """
        what = f"bucket {self.name!r}"
        try:
            with self._requesting("head_bucket", what):
                self._client.head_bucket(Bucket=self.name)
        except StorageUnavailableError:
            raise
        except StorageError:
            try:
                with self._requesting("list_objects", what):  # the answer to a HEAD has no body to say why
                    self._client.list_objects_v2(Bucket=self.name, MaxKeys=1)
            except ObjectNotFoundError as exc:
                raise StorageDeniedError(f"{exc}: no S3 server ({self._variable('endpoint_url')})") from exc

    def create(self) -> None:
        """Create the bucket unless it is there already."""
        try:
            self.check()
        except StorageDeniedError:
            with self._requesting("create_bucket", f"bucket {self.name!r}"):
                self._client.create_bucket(Bucket=self.name)

    def put_file(self, path: Path, key: str, *, content_type: str) -> None:
        """Upload the file at `path`; the object appears whole or not at all."""
        with self._requesting("put_object", self._named(key)):
            self._client.upload_file(
                str(path), self.name, key, ExtraArgs={"ContentType": content_type}, Config=_TRANSFER_CONFIG
            )

    def put_bytes(self, body: bytes, key: str, *, content_type: str) -> None:
        """Write a small object."""
        with self._requesting("put_object", self._named(key)):
            self._client.put_object(Bucket=self.name, Key=key, Body=body, ContentType=content_type)

    def get_bytes(self, key: str) -> bytes:
        """Read a small object whole.

        Raises:
            ObjectNotFoundError: there is none.
        """
        with self._requesting("get_object", self._named(key)):
            answer = self._client.get_object(Bucket=self.name, Key=key)
            with closing(answer["Body"]) as body:
                _require_length(answer)
                return body.read()

    def open_range(
        self, key: str, *, start: int = 0, end: int | None = None, chunk_size: int = 1 << 16
    ) -> Iterator[bytes]:
        """Stream bytes `start` to `end` inclusive (to the last one if None), `chunk_size` at a time."""
        with self._translated(self._named(key)):
            byte_range = f"bytes={start}-{'' if end is None else end}"
            answer = self._client.get_object(Bucket=self.name, Key=key, Range=byte_range)
            with closing(answer["Body"]) as body:
                _require_length(answer)
                yield from body.iter_chunks(chunk_size)

    def head(self, key: str) -> ObjectHead:
        """Size, ETag and type of an object.

        Raises:
            ObjectNotFoundError: there is none.
        """
        with self._requesting("head_object", self._named(key)):
            answer = self._client.head_object(Bucket=self.name, Key=key)
            _require_length(answer)
        return ObjectHead(answer["ContentLength"], answer["ETag"], answer["ContentType"])

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is removed already."""
        with self._requesting("delete_object", self._named(key)):
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
        with self._translated(self._named(key)):
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
        where = f"{what} at {self._settings.endpoint_url}"
        try:
            yield
        except ClientError as exc:
            raise self._refused(where, exc) from exc
        except RecursionError as exc:  # boto3 follows a 301 that names no region, and the next one, and so on
            why = f"redirects without end ({self._variable('endpoint_url')})"
            raise StorageDeniedError(f"{where}: {why}") from exc
        except urllib3.exceptions.HTTPError as exc:  # an answer that breaks off: botocore lets it through
            raise StorageUnavailableError(f"{where}: {type(exc).__name__}") from exc
        except (BotoCoreError, Boto3Error) as exc:
            # An upload's own error holds the store's in its context.
            if isinstance(exc, S3UploadFailedError) and isinstance(exc.__context__, ClientError):
                raise self._refused(where, exc.__context__) from exc
            unreachable = isinstance(exc, EndpointConnectionError | ConnectTimeoutError)
            why = f"no answer ({self._variable('endpoint_url')})" if unreachable else str(exc)
            raise StorageUnavailableError(f"{where}: {why}") from exc

    def _refused(self, where: str, exc: ClientError) -> StorageError:
        code = str(exc.response.get("Error", {}).get("Code", "")) or "refused"
        message = f"{where}: {code}"
        if code in _MISSING:
            return ObjectNotFoundError(message)
        if code in _DENIED:
            why, setting = _DENIED[code]
            return StorageDeniedError(f"{message}: {why}" + (f" ({self._variable(setting)})" if setting else ""))
        if code in _PASSING or exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) >= 500:
            return StorageUnavailableError(message)
        return StorageError(message)

    def _named(self, key: str) -> str:
        return f"{key} in bucket {self.name!r}"

    def _variable(self, setting: str) -> str:
        """What whoever configured this bucket knows the setting as: an environment variable, or s3Config's field."""
        return str(type(self._settings).model_fields[setting].validation_alias)


def _require_length(answer: Mapping[str, object]) -> None:
    """Headers that broke off pass for a whole answer in http.client, and then any body for the whole object."""
    if "ContentLength" not in answer:
        raise HTTPClientError(error="the answer's headers broke off")


def _client(settings: BucketSettings, endpoint_url: str, config: Config) -> S3Client:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=settings.access_key_id,
        aws_secret_access_key=settings.secret_access_key.get_secret_value(),
        region_name=settings.region,
        config=_CLIENT_CONFIG.merge(config),
    )
