"""One bucket on any S3-compatible server: MinIO, AWS, R2, RunPod's network volumes, the embedded gateway.

Only this module imports boto3. Every method blocks, is thread-safe (one boto3 client serves many threads) and raises
one of `storage.errors`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

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
    ObjectExistsError,
    ObjectNotFoundError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from storage.file_system import sync_file_system
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

# Files below 100 MB are sent as one PutObject, as RunPod's network volumes prefer; larger files in parts. Both in the
# calling thread: the interpreter's exit waits for boto3's own threads, even if nobody waits for the upload any more.
_TRANSFER_CONFIG: Final = TransferConfig(
    multipart_threshold=100_000_000, multipart_chunksize=32_000_000, use_threads=False
)

#: Error codes that persist until a setting is corrected: the reason, and the field of BucketSettings to correct.
#: Source: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html. A HEAD answers with the status alone.
_DENIED: Final[Mapping[str, tuple[str, str | None]]] = {
    "403": ("the S3 server refuses access", "access_key_id"),
    "AccessDenied": ("the access key lacks the permission", "access_key_id"),
    "InvalidAccessKeyId": ("the S3 server does not know the access key", "access_key_id"),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", "secret_access_key"),
    "NoSuchBucket": ("the bucket does not exist", "name"),
    "InvalidBucketName": ("the bucket's name is invalid", "name"),
    "AuthorizationHeaderMalformed": ("the region in the signature is wrong", "region"),
    "PermanentRedirect": ("the bucket is in another region, or at another address", "region"),
    "301": ("the bucket is in another region, or at another address", "region"),
    "RequestTimeTooSkewed": ("the clocks of this machine and of the S3 server differ too much: set the clock", None),
}
_MISSING: Final = {"404", "NoSuchKey", "NotFound"}
#: Answers to a conditional write: the key has an object (412), or another request is writing one (409).
#: Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html.
_EXISTS: Final = {"PreconditionFailed", "412", "ConditionalRequestConflict"}
#: Source: MinIO's and SeaweedFS' error codes, and https://www.rfc-editor.org/rfc/rfc4918#section-11.5 (507).
_FULL: Final = {"XMinioStorageFull", "InsufficientStorage", "QuotaExceeded", "507"}
#: Bytes. With less than that, a gateway over local files accepts no video and names no reason.
_FULL_DISK: Final = 16 << 20
#: Error codes with a status below 500 that a retry may resolve.
_TRANSIENT: Final = {"RequestTimeout", "IncompleteBody", "BadDigest", "OperationAborted", "TooManyRequests", "429"}


log = logging.getLogger(__name__)


class _NotImplementedError(StorageUnavailableError):
    """The store answered 501: it does not know an option of the request."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object in a listing. `modified` is the S3 server's time of its upload."""

    key: str
    modified: datetime


class Bucket:
    """Objects of one bucket, by key.

    A request is sent up to `attempts` times, some seconds apart, if the server is unavailable or busy. It fails after
    `timeout` seconds without a byte of the answer. It runs inside `observe(operation)`, which can measure its duration
    and its errors. `sync` receives the directory of an embedded bucket, see `Bucket.sync`.
    """

    def __init__(
        self,
        settings: BucketSettings,
        *,
        timeout: float = 30,
        attempts: int = 4,
        observe: Callable[[str], AbstractContextManager[object]] = nullcontext,
        sync: Callable[[Path], None] = sync_file_system,
    ) -> None:
        self.name = settings.name
        self._settings = settings
        self._observe = observe
        self._sync = sync
        retries = Config(read_timeout=timeout, retries={"mode": "standard", "max_attempts": attempts})
        self._client = _client(settings, str(settings.endpoint_url), retries)
        public = settings.public_endpoint_url
        self._public_client = _client(settings, str(public), retries) if public else self._client

    def check(self) -> None:
        """Check that the bucket exists and that the keys may read it.

        Raises:
            StorageDeniedError: a setting, which the text names, or the clock is wrong.
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
                with self._requesting("list_objects", what):  # the answer to a HEAD has no body with the reason
                    self._client.list_objects_v2(Bucket=self.name, MaxKeys=1)
            except ObjectNotFoundError as exc:
                raise StorageDeniedError(f"{exc}: this is no S3 server ({self._variable('endpoint_url')})") from exc

    def create(self) -> None:
        """Create the bucket unless it exists."""
        try:
            self.check()
        except StorageDeniedError:
            with self._requesting("create_bucket", f"bucket {self.name!r}"):
                self._client.create_bucket(Bucket=self.name)

    def put_file(
        self, path: Path, key: str, *, content_type: str, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Upload the file at `path`. The object becomes visible when it is complete.

        `on_bytes` gets the number of bytes that were sent since its last call.
        """
        with self._requesting("put_object", self._named(key)):
            self._client.upload_file(
                str(path),
                self.name,
                key,
                ExtraArgs={"ContentType": content_type},
                Callback=on_bytes,
                Config=_TRANSFER_CONFIG,
            )

    def put_bytes(self, body: bytes, key: str, *, content_type: str, only_if_absent: bool = False) -> None:
        """Write a small object.

        With `only_if_absent` it replaces no object, on a store that has conditional writes. Others overwrite, some
        without an error, so read the object back afterwards.

        Raises:
            ObjectExistsError: `only_if_absent`, and the key has an object, or another request is writing one.
        """
        if only_if_absent:
            try:
                self._put_bytes(body, key, ContentType=content_type, IfNoneMatch="*")
            except _NotImplementedError:
                log.debug("%s: the store has no conditional writes", self._named(key))
            else:
                return
        self._put_bytes(body, key, ContentType=content_type)

    def _put_bytes(self, body: bytes, key: str, **options: Any) -> None:
        with self._requesting("put_object", self._named(key)):
            self._client.put_object(Bucket=self.name, Key=key, Body=body, **options)

    def get_bytes(self, key: str) -> bytes:
        """Read a small object.

        Raises:
            ObjectNotFoundError: the object does not exist.
        """
        with self._requesting("get_object", self._named(key)):
            answer = self._client.get_object(Bucket=self.name, Key=key)
            with closing(answer["Body"]) as body:
                _require_length(answer)
                return body.read()

    def sync(self) -> None:
        """Return when everything that the embedded bucket has accepted is on its disk. Does nothing for other buckets.

        The embedded bucket answers a PUT before its data is on the disk; a power cut after that would lose the object.
        """
        directory = self._settings.sync_directory
        if directory is None:
            return
        try:
            self._sync(directory)
        except OSError as exc:
            raise StorageUnavailableError(
                f"cannot sync {directory} of bucket {self.name!r} ({self._variable('sync_directory')}): {exc.strerror}"
            ) from exc

    def delete(self, key: str) -> None:
        """Delete an object. Deleting one that does not exist succeeds."""
        with self._requesting("delete_object", self._named(key)):
            self._client.delete_object(Bucket=self.name, Key=key)

    def list_objects(self, prefix: str, *, start_after: str = "", limit: int = 1000) -> list[ObjectInfo]:
        """The first objects whose keys begin with `prefix` and follow `start_after`, in the order of their keys.

        At most `limit`, and never more than 1000. An empty list is the end. SeaweedFS lists `a/` before `a.json`; each
        object still comes once.
        """
        with self._requesting("list_objects", self._named(f"{prefix}*")):
            answer = self._client.list_objects_v2(
                Bucket=self.name, Prefix=prefix, StartAfter=start_after, MaxKeys=min(limit, 1000)
            )
        return [ObjectInfo(item["Key"], item["LastModified"]) for item in answer.get("Contents", [])]

    def list_keys(self, prefix: str, *, start_after: str = "", limit: int = 1000) -> list[str]:
        """The keys of `list_objects`."""
        return [item.key for item in self.list_objects(prefix, start_after=start_after, limit=limit)]

    def presign(
        self, key: str, *, method: Literal["GET", "HEAD"] = "GET", expires_in: int | None = None, public: bool = True
    ) -> str:
        """A URL that reads the object without credentials for `expires_in` seconds. Sends no request.

        With `public`, the URL has the address for clients (`BUCKET_PUBLIC_ENDPOINT_URL`), otherwise the internal one.
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
        """Translate boto3's errors into ours. The text names the object, never a signature."""
        where = f"{what} at {self._settings.endpoint_url}"
        try:
            yield
        except ClientError as exc:
            raise self._refused(where, exc) from exc
        except urllib3.exceptions.HTTPError as exc:  # botocore does not translate a truncated answer
            raise StorageUnavailableError(f"{where}: {type(exc).__name__}") from exc
        except (BotoCoreError, Boto3Error, RecursionError) as exc:
            # boto3 follows every 301 that names no region, until Python stops it. botocore may wrap the RecursionError.
            if "recursion depth exceeded" in str(exc):
                why = f"the server redirects endlessly ({self._variable('endpoint_url')})"
                raise StorageDeniedError(f"{where}: {why}") from exc
            # The S3 server's error is the context of an upload's error.
            if isinstance(exc, S3UploadFailedError) and isinstance(exc.__context__, ClientError):
                raise self._refused(where, exc.__context__) from exc
            unreachable = isinstance(exc, EndpointConnectionError | ConnectTimeoutError)
            why = f"no answer ({self._variable('endpoint_url')})" if unreachable else str(exc)
            raise StorageUnavailableError(f"{where}: {why}") from exc

    def _refused(self, where: str, exc: ClientError) -> StorageError:
        code = str(exc.response.get("Error", {}).get("Code", "")) or "refused"
        message = f"{where}: {code}"
        status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        if code in _MISSING:
            return ObjectNotFoundError(message)
        if code in _EXISTS:
            return ObjectExistsError(message)
        if status == 501:
            return _NotImplementedError(message)
        if code in _DENIED:
            why, setting = _DENIED[code]
            return StorageDeniedError(f"{message}: {why}" + (f" ({self._variable(setting)})" if setting else ""))
        if code in _FULL or status == 507 or (status >= 500 and self._is_local_disk_full()):
            return StorageFullError(f"{message}: the disk of the S3 server is full: free space on it")
        if code in _TRANSIENT or status >= 500:
            return StorageUnavailableError(message)
        return StorageError(message)

    def _is_local_disk_full(self) -> bool:
        """Whether the disk of the embedded bucket is full; False for other buckets."""
        directory = self._settings.sync_directory
        return directory is not None and shutil.disk_usage(directory).free < _FULL_DISK

    def _named(self, key: str) -> str:
        return f"{key} in bucket {self.name!r}"

    def _variable(self, setting: str) -> str:
        """The name under which the setting was configured: an environment variable, or a field of s3Config."""
        return str(type(self._settings).model_fields[setting].validation_alias)


def _require_length(answer: Mapping[str, object]) -> None:
    """Reject truncated headers. http.client accepts them, and would take any body for the whole object."""
    if "ContentLength" not in answer:
        raise HTTPClientError(error="the answer's headers are truncated")


def _client(settings: BucketSettings, endpoint_url: str, config: Config) -> S3Client:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=settings.access_key_id,
        aws_secret_access_key=settings.secret_access_key.get_secret_value(),
        region_name=settings.region,
        config=_CLIENT_CONFIG.merge(config),
    )
