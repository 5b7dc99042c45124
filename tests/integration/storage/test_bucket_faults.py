"""`Bucket` with a server that fails, refuses or is busy: a real S3 server behind a proxy that injects faults."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import HttpUrl, SecretStr

from storage.bucket import Bucket
from storage.errors import StorageDeniedError, StorageError, StorageFullError, StorageUnavailableError
from storage.settings import BucketSettings, JobBucketSettings
from tests.support.fault_proxy import FaultProxy
from tests.support.s3_servers import behind, new_bucket

KEY = "videos/task-1.mp4"
BODY = bytes(range(256)) * 1024


@pytest.fixture(scope="module")
def server(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@pytest.fixture(scope="module")
def only_proxy(server: BucketSettings) -> Iterator[FaultProxy]:
    with behind(server) as made:
        yield made


@pytest.fixture
def proxy(only_proxy: FaultProxy) -> Iterator[FaultProxy]:
    only_proxy.hits.clear()
    only_proxy.requests.clear()
    yield only_proxy
    only_proxy.heal()


@pytest.fixture(scope="module")
def settings(server: BucketSettings, only_proxy: FaultProxy) -> BucketSettings:
    return server.model_copy(update={"endpoint_url": HttpUrl(only_proxy.url)})


@pytest.fixture(scope="module")
def bucket(settings: BucketSettings) -> Bucket:
    """A bucket without retries."""
    return Bucket(settings, attempts=1)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "video.mp4"
    path.write_bytes(BODY)
    return path


OPERATIONS: dict[str, Callable[[Bucket, Path], object]] = {
    "check": lambda bucket, _: bucket.check(),
    "put_file": lambda bucket, video: bucket.put_file(video, KEY, content_type="video/mp4"),
    "put_bytes": lambda bucket, _: bucket.put_bytes(BODY, KEY, content_type="video/mp4"),
    "get_bytes": lambda bucket, _: bucket.get_bytes(KEY),
    "delete": lambda bucket, _: bucket.delete(KEY),
}


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest, bucket: Bucket, video: Path) -> Callable[[Bucket], object]:
    bucket.put_file(video, KEY, content_type="video/mp4")
    operate = OPERATIONS[request.param]
    return lambda bucket: operate(bucket, video)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"access_key_id": "nobody"}, r"InvalidAccessKeyId: .* \(BUCKET_ACCESS_KEY_ID\)$"),
        (
            {"secret_access_key": SecretStr("not-the-secret")},
            r"SignatureDoesNotMatch: .* \(BUCKET_SECRET_ACCESS_KEY\)$",
        ),
        ({"name": "no-such-bucket"}, r"NoSuchBucket: .* \(BUCKET_NAME\)$"),
    ],
)
def test_a_wrong_setting_is_named_by_every_operation(
    server: BucketSettings, operation: Callable[[Bucket], object], change: dict[str, object], says: str
) -> None:
    with pytest.raises(StorageDeniedError, match=says) as caught:
        operation(Bucket(server.model_copy(update=change)))
    assert "\n" not in str(caught.value)
    assert "not-the-secret" not in str(caught.value)


def test_a_wrong_field_of_an_s3_config_is_named(server: BucketSettings) -> None:
    own = JobBucketSettings.model_validate(
        {"endpointUrl": str(server.endpoint_url), "accessId": server.access_key_id, "accessSecret": "wrong"}
    )
    with pytest.raises(StorageDeniedError, match=r"\(accessSecret\)$"):
        Bucket(own).check()


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (403, "RequestTimeTooSkewed", "set the clock"),
        (400, "AuthorizationHeaderMalformed", "BUCKET_REGION"),
        (403, "AccessDenied", "BUCKET_ACCESS_KEY_ID"),
    ],
)
def test_errors_of_other_s3_servers_are_translated(
    bucket: Bucket, proxy: FaultProxy, status: int, code: str, says: str
) -> None:
    proxy.answer(status, code, times=100)
    with pytest.raises(StorageDeniedError, match=f"{code}: .*{says}"):
        bucket.check()


@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "SlowDown"), (500, "InternalError"), (507, "XMinioStorageFull"), (400, "RequestTimeout")],
)
def test_a_server_that_is_busy_or_full_is_unavailable(
    bucket: Bucket, proxy: FaultProxy, operation: Callable[[Bucket], object], status: int, code: str
) -> None:
    proxy.answer(status, code, times=10)
    with pytest.raises(StorageUnavailableError, match=rf"{code}|{status}"):
        operation(bucket)
    proxy.heal()
    operation(bucket)


@pytest.mark.parametrize(("status", "code"), [(507, "XMinioStorageFull"), (507, "InsufficientStorage")])
def test_a_full_server_is_named(bucket: Bucket, proxy: FaultProxy, status: int, code: str) -> None:
    proxy.answer(status, code, times=10)
    with pytest.raises(StorageFullError, match="the disk of the S3 server is full"):
        bucket.put_bytes(b"1", KEY, content_type="video/mp4")


def test_one_busy_answer_is_retried(settings: BucketSettings, proxy: FaultProxy, video: Path) -> None:
    proxy.answer(503, "SlowDown", times=1)
    Bucket(settings).put_file(video, KEY, content_type="video/mp4")
    assert proxy.hits["SlowDown"] == 1


def test_a_server_that_redirects_endlessly_is_denied(bucket: Bucket, proxy: FaultProxy) -> None:
    """A server that redirects HTTP to HTTPS does so; boto3 follows until Python stops it."""
    proxy.answer(301, "MovedPermanently", times=10_000)
    with pytest.raises(StorageDeniedError, match="BUCKET_ENDPOINT_URL"):
        bucket.check()


def test_an_address_without_a_server_is_named(bucket: Bucket, proxy: FaultProxy) -> None:
    with proxy.broken(refuse=True):
        with pytest.raises(StorageUnavailableError, match=r"no answer \(BUCKET_ENDPOINT_URL\)") as caught:
            bucket.check()
        assert proxy.url in str(caught.value)


@pytest.mark.parametrize(
    "faults", [{"refuse": True}, {"reset_up_after": 100}, {"reset_down_after": 0}, {"truncate_after": 5}]
)
def test_a_broken_connection_is_unavailable(
    bucket: Bucket, proxy: FaultProxy, operation: Callable[[Bucket], object], faults: dict[str, object]
) -> None:
    with proxy.broken(**faults), pytest.raises(StorageUnavailableError):
        operation(bucket)
    operation(bucket)


@pytest.mark.parametrize("fault", ["reset_down_after", "truncate_after"])
@pytest.mark.parametrize("where", [50, 200, len(BODY) // 2], ids=["status line", "headers", "body"])
def test_a_truncated_answer_is_an_error(bucket: Bucket, proxy: FaultProxy, video: Path, fault: str, where: int) -> None:
    bucket.put_file(video, KEY, content_type="video/mp4")
    with proxy.broken(**{fault: where}), pytest.raises(StorageUnavailableError, match=re.escape(KEY)):
        bucket.get_bytes(KEY)


def test_a_truncated_error_answer_is_one_of_our_errors(bucket: Bucket, proxy: FaultProxy) -> None:
    for limit in range(0, 1000, 25):
        with proxy.broken(reset_down_after=limit), pytest.raises(StorageError):
            bucket.get_bytes("videos/no-such-task.json")


def test_a_stalled_server_times_out(settings: BucketSettings, proxy: FaultProxy) -> None:
    bucket = Bucket(settings, timeout=0.3, attempts=2)
    started = time.monotonic()
    with proxy.broken(stall=True), pytest.raises(StorageUnavailableError):
        bucket.check()
    assert time.monotonic() - started < 5


def test_an_upload_in_parts_that_fails_leaves_no_parts(bucket: Bucket, proxy: FaultProxy, tmp_path: Path) -> None:
    """boto3 aborts the upload. Parts that stay are invisible and cost money."""
    path = tmp_path / "large.mp4"
    with path.open("wb") as file:
        for _ in range(101):
            file.write(os.urandom(1_000_000))
    proxy.answer(503, "SlowDown", times=100, method="PUT", target="partNumber=2")
    with pytest.raises(StorageUnavailableError, match="SlowDown"):
        bucket.put_file(path, KEY, content_type="video/mp4")
    assert any(request.startswith("DELETE") and "uploadId=" in request for request in proxy.requests)
    uploads = bucket._client.list_multipart_uploads(Bucket=bucket.name, Prefix=KEY)
    assert uploads.get("Uploads", []) == []


def test_every_error_is_one_of_ours(bucket: Bucket, proxy: FaultProxy) -> None:
    proxy.answer(418, "ImATeapot", times=1)
    with pytest.raises(StorageError, match="ImATeapot"):
        bucket.get_bytes(KEY)


#: Uploads the file at argv[2] to the server at argv[1], and ends its main thread meanwhile.
ABANDONED = """
import sys, threading
from pathlib import Path
from storage.bucket import Bucket
from storage.settings import JobBucketSettings

settings = JobBucketSettings(endpointUrl=sys.argv[1], accessId="key", accessSecret="secret", bucketName="videos")
upload = lambda: Bucket(settings).put_file(Path(sys.argv[2]), "key", content_type="video/mp4")
threading.Thread(target=upload, daemon=True).start()
sys.stdin.readline()
"""


def test_a_process_ends_although_an_upload_waits_for_a_server_that_does_not_answer(video: Path) -> None:
    """A worker abandons the upload of a cancelled job; its exit must not wait for four attempts of 30 s."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-c", ABANDONED, url, str(video)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                assert connection.recv(4) == b"PUT "
                assert process.stdin is not None
                process.stdin.close()
                try:
                    assert process.wait(10) == 0
                finally:
                    process.kill()
