"""One suite for `Bucket` on four S3 servers.

SeaweedFS passes all of it but the order of keys, and its key may create no bucket; the embedded gateway all but the
conditional write. rclone checks signatures, but neither the expiry nor the ranges of presigned
URLs; moto checks neither. Tests of these are skipped there.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from pydantic import HttpUrl, SecretStr

from storage.bucket import Bucket
from storage.errors import ObjectExistsError, ObjectNotFoundError, StorageDeniedError, StorageUnavailableError
from storage.settings import BucketSettings, JobBucketSettings
from tests.support.full import full
from tests.support.s3_servers import S3_SERVERS, behind

BODY = bytes(range(256)) * 4096


@pytest.fixture(scope="module", params=[name if name in {"juicefs", "moto"} else full(name) for name in S3_SERVERS])
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketSettings]:
    with S3_SERVERS[request.param](tmp_path_factory.mktemp(request.param)) as running:
        yield running


@pytest.fixture
def checks_signatures(request: pytest.FixtureRequest, settings: BucketSettings) -> None:
    if "moto" in request.node.name:
        pytest.skip("moto accepts any signature")


@pytest.fixture
def checks_expiry(request: pytest.FixtureRequest, settings: BucketSettings) -> None:
    if not {"juicefs", "seaweedfs"} & set(re.split(r"[\W_]+", request.node.name)):
        pytest.skip("this server accepts expired URLs and ignores Range")


@pytest.fixture(scope="module")
def bucket(settings: BucketSettings) -> Bucket:
    return Bucket(settings)


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    return f"videos/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}.mp4"


@pytest.fixture
def stored(bucket: Bucket, key: str, tmp_path: Path) -> str:
    path = tmp_path / "video.mp4"
    path.write_bytes(BODY)
    bucket.put_file(path, key, content_type="video/mp4")
    return key


def test_a_file_is_read_back_unchanged(bucket: Bucket, stored: str) -> None:
    assert bucket.get_bytes(stored) == BODY
    headers = httpx.head(bucket.presign(stored, method="HEAD")).headers
    assert headers["content-length"] == str(len(BODY))
    assert headers["content-type"] == "video/mp4"
    assert headers["etag"]


def test_a_small_object_can_be_written_again(bucket: Bucket, key: str) -> None:
    bucket.put_bytes(b"{}", key, content_type="application/json")
    bucket.put_bytes(b'{"a": 1}', key, content_type="application/json")
    assert bucket.get_bytes(key) == b'{"a": 1}'


def test_a_large_file_is_uploaded_in_parts_and_read_back_unchanged(bucket: Bucket, key: str, tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    with path.open("wb") as file:
        for _ in range(101):
            file.write(BODY[:1_000_000])
    bucket.put_file(path, key, content_type="video/mp4")
    received = hashlib.sha256()
    with httpx.stream("GET", bucket.presign(key)) as response:
        for chunk in response.iter_bytes():
            received.update(chunk)
    assert received.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    bucket.delete(key)


def test_a_missing_object_is_not_found(bucket: Bucket, key: str) -> None:
    with pytest.raises(ObjectNotFoundError, match=re.escape(key)):
        bucket.get_bytes(key)


def test_a_deleted_object_is_not_found_and_can_be_deleted_again(bucket: Bucket, stored: str) -> None:
    bucket.delete(stored)
    bucket.delete(stored)
    with pytest.raises(ObjectNotFoundError):
        bucket.get_bytes(stored)


def test_a_presigned_url_reads_without_credentials(bucket: Bucket, stored: str) -> None:
    url = bucket.presign(stored, expires_in=60)
    assert httpx.get(url).content == BODY
    assert httpx.head(bucket.presign(stored, method="HEAD")).headers["content-length"] == str(len(BODY))


def test_a_conditional_write_replaces_nothing_where_the_server_has_conditional_writes(
    bucket: Bucket, key: str, request: pytest.FixtureRequest
) -> None:
    """moto and SeaweedFS do, as S3 and MinIO do; the embedded gateway and rclone ignore the condition."""
    options = {"content_type": "text/plain", "only_if_absent": True}
    bucket.put_bytes(b"first", key, **options)  # type: ignore[arg-type]
    assert bucket.get_bytes(key) == b"first"
    if "moto" in request.node.name or "seaweedfs" in request.node.name:
        with pytest.raises(ObjectExistsError):
            bucket.put_bytes(b"second", key, **options)  # type: ignore[arg-type]
        assert bucket.get_bytes(key) == b"first"
    else:
        bucket.put_bytes(b"second", key, **options)  # type: ignore[arg-type]
        assert bucket.get_bytes(key) == b"second"


@pytest.mark.parametrize(("status", "code"), [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict")])
def test_an_answer_that_the_key_is_taken_is_its_own_error(
    settings: BucketSettings, key: str, status: int, code: str
) -> None:
    with behind(settings) as proxy:
        bucket = Bucket(settings.model_copy(update={"endpoint_url": HttpUrl(proxy.url)}))
        proxy.answer(status, code, times=1, method="PUT")
        with pytest.raises(ObjectExistsError):
            bucket.put_bytes(b"x", key, content_type="text/plain", only_if_absent=True)
        assert proxy.hits[code] == 1


def test_a_server_that_does_not_know_conditional_writes_gets_a_plain_one(settings: BucketSettings, key: str) -> None:
    with behind(settings) as proxy:
        bucket = Bucket(settings.model_copy(update={"endpoint_url": HttpUrl(proxy.url)}))
        proxy.answer(501, "NotImplemented", times=1, method="PUT")
        bucket.put_bytes(b"x", key, content_type="text/plain", only_if_absent=True)
        assert bucket.get_bytes(key) == b"x"


def test_keys_are_listed_page_by_page_in_their_order(bucket: Bucket, request: pytest.FixtureRequest) -> None:
    names = [f"listed/task-{number}/{name}.mp4" for number in range(3) for name in "ab"]
    for name in (*names, "listed/task-0.json", "listing"):
        bucket.put_bytes(b"x", name, content_type="text/plain")
    found: list[str] = []
    while page := bucket.list_keys("listed/", start_after=found[-1] if found else "", limit=3):
        assert len(page) <= 3
        found += page
    assert sorted(found) == sorted([*names, "listed/task-0.json"]), "each object once"
    if "seaweedfs" not in request.node.name:  # it lists the folder task-0 before the object task-0.json
        assert found == sorted(found)
    assert bucket.list_keys("listed/task-1/") == names[2:4]
    modified = bucket.list_objects("listed/task-1/")[0].modified
    assert abs((datetime.now(UTC) - modified).total_seconds()) < 60


@pytest.mark.usefixtures("checks_expiry")
def test_a_presigned_url_reads_a_range(bucket: Bucket, stored: str) -> None:
    url = bucket.presign(stored, expires_in=60)
    for start, end in [(0, None), (0, 0), (10, 19), (100, 199), (len(BODY) - 10, None), (65_536, 131_071)]:
        part = httpx.get(url, headers={"Range": f"bytes={start}-{'' if end is None else end}"})
        assert part.status_code == 206
        assert part.content == BODY[start : None if end is None else end + 1]


@pytest.mark.usefixtures("checks_signatures")
def test_a_presigned_url_reads_no_other_object(bucket: Bucket, stored: str) -> None:
    url = bucket.presign(stored, expires_in=60)
    assert httpx.get(url.replace(stored, "videos/other.mp4")).status_code == 403
    assert httpx.get(url[:-4] + "0000").status_code == 403
    assert httpx.get(url.partition("?")[0]).status_code in (400, 401, 403)


@pytest.mark.usefixtures("checks_expiry")
def test_a_presigned_url_expires(bucket: Bucket, stored: str) -> None:
    url = bucket.presign(stored, expires_in=1)
    deadline = time.monotonic() + 10
    while httpx.get(url).status_code != 403:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_presigned_url_has_the_address_for_clients(settings: BucketSettings, stored: str) -> None:
    public = settings.model_copy(update={"public_endpoint_url": HttpUrl("https://videos.example.com")})
    bucket = Bucket(public)
    assert bucket.presign(stored).startswith(f"https://videos.example.com/{settings.name}/{stored}?")
    assert httpx.get(bucket.presign(stored, public=False)).status_code == 200


@pytest.mark.usefixtures("checks_signatures")
def test_wrong_keys_are_denied_and_never_shown(settings: BucketSettings, stored: str) -> None:
    secret = "not-the-secret-key"
    wrong = Bucket(settings.model_copy(update={"secret_access_key": SecretStr(secret)}))
    for attempt in (lambda: wrong.get_bytes(stored), wrong.check):
        with pytest.raises(StorageDeniedError) as caught:
            attempt()
        assert secret not in str(caught.value)


def test_a_bucket_that_does_not_exist_is_denied_by_name(settings: BucketSettings) -> None:
    missing = Bucket(settings.model_copy(update={"name": "no-such-bucket"}))
    with pytest.raises(StorageDeniedError, match="no-such-bucket"):
        missing.check()
    with pytest.raises(StorageDeniedError, match="no-such-bucket"):
        missing.put_bytes(b"", "a", content_type="text/plain")


def test_creating_a_bucket_again_succeeds(settings: BucketSettings, request: pytest.FixtureRequest) -> None:
    bucket = Bucket(settings.model_copy(update={"name": "created-here"}))
    if "seaweedfs" in request.node.name:  # the key of this server is scoped to its bucket
        with pytest.raises(StorageDeniedError, match="BUCKET_ACCESS_KEY_ID"):
            bucket.create()
        return
    bucket.create()
    bucket.create()
    bucket.check()


def test_a_server_that_does_not_listen_is_unavailable(settings: BucketSettings) -> None:
    away = Bucket(settings.model_copy(update={"endpoint_url": HttpUrl("http://127.0.0.1:9")}))
    with pytest.raises(StorageUnavailableError):
        away.check()


def test_a_bucket_of_an_s3_config_works(settings: BucketSettings) -> None:
    own = JobBucketSettings.model_validate(
        {
            "endpointUrl": str(settings.endpoint_url),
            "accessId": settings.access_key_id,
            "accessSecret": settings.secret_access_key.get_secret_value(),
            "bucketName": settings.name,
        }
    )
    Bucket(own).check()
