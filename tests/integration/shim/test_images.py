"""POST /images: images that videos start from, stored in a real S3 server."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from PIL import Image

from contract.errors import ErrorCode
from contract.job import UPLOAD_PREFIX
from hunyuan import AsyncClient
from shim.access import Access, parse_api_keys
from shim.app import create_app
from shim.errors import ServerErrorCode
from storage import layout
from storage.bucket import Bucket
from storage.images import GRACE, LIFETIME, Images
from tests.support.http_server import serving
from tests.support.queues import Bench, sql_bench
from tests.support.s3_servers import juicefs

ALICE = "alices-key-0123456789"
PROMPT = "A paper boat on a rainy street at night"


def picture(kind: str, size: tuple[int, int] = (320, 180)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with juicefs(tmp_path_factory.mktemp("juicefs")) as settings:
        yield Bucket(settings)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as made:
        await made.worker()
        yield made


@pytest.fixture
async def http(bench: Bench, bucket: Bucket) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serving(create_app(bench.queue, bucket)) as address,
        httpx.AsyncClient(base_url=address, timeout=60) as made,
    ):
        yield made


async def upload(http: httpx.AsyncClient, body: bytes, media_type: str = "image/png") -> httpx.Response:
    return await http.post("/images", content=body, headers={"Content-Type": media_type})


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    return response.status_code, response.json()["error_code"], response.json()["error"]


async def test_an_uploaded_image_is_stored_for_a_day_and_a_task_can_start_from_it(
    http: httpx.AsyncClient, bench: Bench, bucket: Bucket
) -> None:
    body = picture("PNG")
    response = await upload(http, body, "image/jpeg")  # a wrong guess of the client
    assert response.status_code == 201
    left = datetime.fromisoformat(response.json()["expires_at"]) - datetime.now(UTC)
    assert left.total_seconds() == pytest.approx(LIFETIME, abs=60)
    image = response.json()["image"]
    accepted = await http.post("/generate", json={"prompt": PROMPT, "image": image})
    assert accepted.status_code == 202
    delivery = await bench.dispatcher.take("w1")
    assert delivery is not None
    assert delivery.input["image"] == image
    assert Images(bucket).get(image.removeprefix(UPLOAD_PREFIX)) == body


async def test_a_client_that_repeats_its_request_and_its_upload_gets_the_same_task(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    path = tmp_path / "large.png"
    Image.effect_noise((300, 300), 100).save(path)
    async with AsyncClient(str(http.base_url)) as client:
        tasks = [await client.generate(PROMPT, image=path, idempotency_key="order 1") for _ in range(2)]
    assert tasks[0].task_id == tasks[1].task_id


async def test_two_uploads_of_one_image_have_ids_that_cannot_be_guessed(http: httpx.AsyncClient) -> None:
    ids = {(await upload(http, picture("PNG"))).json()["image"].partition("-")[2] for _ in range(2)}
    assert len(ids) == 2
    assert {len(random) for random in ids} == {43}


@pytest.mark.parametrize(
    ("body", "media_type", "words"),
    [
        (b"", "image/png", "no JPEG, PNG or WebP"),
        (picture("PNG")[:20], "image/png", "no JPEG, PNG or WebP"),
        (picture("GIF"), "image/gif", "no JPEG, PNG or WebP"),
        (b"<svg/>", "image/svg+xml", "no JPEG, PNG or WebP"),
        (picture("PNG"), "text/plain", "Content-Type must be"),
        (picture("PNG", (10_000, 5_001)), "image/png", "10000 x 5001 pixels are more than 50 megapixels"),
    ],
)
async def test_what_is_no_image_is_refused(http: httpx.AsyncClient, body: bytes, media_type: str, words: str) -> None:
    status, code, error = error_of(await upload(http, body, media_type))
    assert (status, code) == (400, ErrorCode.INVALID_REQUEST)
    assert words in error


async def test_an_image_of_more_than_20_mib_is_refused(http: httpx.AsyncClient) -> None:
    body = picture("PNG")
    assert (await upload(http, body + bytes(20 * 1024**2 - len(body)))).status_code == 201
    status, code, _ = error_of(await upload(http, body + bytes(20 * 1024**2 - len(body) + 1)))
    assert (status, code) == (413, ServerErrorCode.REQUEST_TOO_LARGE)


@pytest.mark.parametrize("age", [0, LIFETIME + 1])
async def test_an_image_that_expired_or_was_never_stored_is_refused_at_submit(
    http: httpx.AsyncClient, bucket: Bucket, age: int
) -> None:
    now = datetime.now(UTC).timestamp()
    image_id, _ = Images(bucket, now=lambda: now - age).put(picture("PNG"), content_type="image/png")
    if age == 0:
        image_id = image_id[:-1] + ("A" if image_id[-1] != "A" else "B")  # somebody's guess
    response = await http.post("/generate", json={"prompt": PROMPT, "image": UPLOAD_PREFIX + image_id})
    status, code, error = error_of(response)
    assert (status, code) == (400, ErrorCode.INVALID_REQUEST)
    assert error.startswith("image: this uploaded image has expired or was never stored")


@pytest.mark.parametrize("image", ["upload:", "upload:1-x", "upload:0000000000-../../videos/x.json"])
async def test_an_upload_id_of_another_form_is_refused(http: httpx.AsyncClient, image: str) -> None:
    status, code, _ = error_of(await http.post("/generate", json={"prompt": PROMPT, "image": image}))
    assert (status, code) == (400, ErrorCode.INVALID_REQUEST)


async def test_an_upload_needs_a_key_and_has_a_rate_limit_of_its_own(bench: Bench, bucket: Bucket) -> None:
    app = create_app(bench.queue, bucket, access=Access(parse_api_keys(ALICE), rate_limit=1))
    async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
        assert error_of(await upload(http, picture("PNG")))[:2] == (401, ServerErrorCode.UNAUTHORIZED)
        http.headers["Authorization"] = f"Bearer {ALICE}"
        image = (await upload(http, picture("PNG"))).json()["image"]
        assert (await http.post("/generate", json={"prompt": PROMPT, "image": image})).status_code == 202
        assert error_of(await upload(http, picture("PNG")))[:2] == (429, ServerErrorCode.RATE_LIMITED)


def test_expired_images_are_deleted_after_their_grace_and_nothing_else_is(bucket: Bucket) -> None:
    now = 1_900_000_000.0
    images = Images(bucket, now=lambda: now)
    other_keys = (f"{layout.IMAGES}0-mine.png", layout.video_key("t1"))
    for key in other_keys:
        bucket.put_bytes(b"mine", key, content_type="image/png")
    old, _ = Images(bucket, now=lambda: now - LIFETIME - GRACE - 1).put(b"old", content_type="image/png")
    waiting, _ = Images(bucket, now=lambda: now - LIFETIME - GRACE + 1).put(b"waiting", content_type="image/png")
    assert not images.delete_expired()
    assert images.get(old) is None
    assert images.get(waiting) == b"waiting"
    for key in other_keys:
        assert bucket.get_bytes(key) == b"mine"
