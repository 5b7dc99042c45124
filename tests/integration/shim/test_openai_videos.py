"""/v1/videos through OpenAI's own client and through LiteLLM, both unpatched; the dispatcher plays the worker."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from PIL import Image

from contract.errors import ErrorCode, JobFailure
from contract.job import AspectRatio, JobInput, QueuedInput, Resolution
from contract.result import Progress, Stage
from shim.access import Access, parse_api_keys
from shim.app import create_app
from storage import layout
from storage.bucket import Bucket
from tests.support.http_server import serving
from tests.support.queues import Bench, result, sql_bench
from tests.support.s3_servers import juicefs

KEY = "alices-key-0123456789"
PROMPT = "A red fish swims to the right over the sea"
VIDEO = bytes(range(256)) * 40
POSTER = b"\xff\xd8poster"
SHEET = b"\xff\xd8sheet"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with juicefs(tmp_path_factory.mktemp("juicefs")) as settings:
        yield Bucket(settings)


@dataclass
class Site:
    """The server, and what its worker does."""

    bench: Bench
    bucket: Bucket
    address: str
    client: AsyncOpenAI

    async def take(self) -> tuple[str, QueuedInput]:
        """The next task and its input."""
        async with asyncio.timeout(20):
            changed = self.bench.dispatcher.changed
            while (delivery := await self.bench.dispatcher.take("w1")) is None:
                await changed.wait()
                changed = self.bench.dispatcher.changed
        return delivery.task_id, QueuedInput.model_validate(delivery.input)

    async def finish(self, task_id: str, asked: QueuedInput, *, with_sheet: bool = True) -> None:
        known = {
            "input": asked.request,
            "remixed_from": asked.remixed_from,
            "sheet_key": layout.sheet_key(task_id, "0123456789ab") if with_sheet else None,
            **{"file_size": len(VIDEO), "sha256": hashlib.sha256(VIDEO).hexdigest(), "seed": 7},
        }
        output = result(task_id).model_copy(update=known)
        body = output.model_dump_json().encode()
        for content, key in (
            (VIDEO, output.video_key),
            (POSTER, output.poster_key),
            *([(SHEET, output.sheet_key)] if output.sheet_key is not None else []),
            (body, layout.manifest_key(task_id)),
        ):
            await asyncio.to_thread(self.bucket.put_bytes, content, key, content_type="video/mp4")
        assert await self.bench.dispatcher.complete("w1", task_id, output.model_dump(mode="json"))

    async def render_next(self) -> str:
        task_id, asked = await self.take()
        await self.finish(task_id, asked)
        return task_id


@pytest.fixture
async def site(tmp_path: Path, bucket: Bucket) -> AsyncIterator[Site]:
    access = Access(api_keys=parse_api_keys(f"alice:{KEY}"))
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3", max_queue_size=4) as bench:
        await bench.worker()
        async with (
            serving(create_app(bench.queue, bucket, access=access)) as address,
            AsyncOpenAI(api_key=KEY, base_url=f"{address}/v1", max_retries=0) as client,
        ):
            yield Site(bench, bucket, address, client)


#: OpenAI has shut down its own service, and its client says so.
pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]


async def test_create_and_poll_returns_a_video_whose_content_is_the_mp4(site: Site) -> None:
    rendering = asyncio.create_task(site.render_next())
    fields: Any = {"seconds": "6", "size": "1080x1920"}  # the client's types have OpenAI's own values only
    video = await site.client.videos.create_and_poll(
        prompt=PROMPT, model="HunyuanVideo-1.5", poll_interval_ms=50, **fields
    )
    assert await rendering == video.id
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.prompt, video.seconds, video.size) == (PROMPT, "6", "1080x1920")
    assert video.completed_at is not None
    assert video.created_at <= video.completed_at + 1
    assert (await site.client.videos.download_content(video.id)).content == VIDEO
    thumbnail = await site.client.videos.download_content(video.id, variant="thumbnail")
    assert thumbnail.content == POSTER
    assert thumbnail.response.headers["content-type"] == "image/jpeg"
    sheet = await site.client.videos.download_content(video.id, variant="spritesheet")
    assert (sheet.content, sheet.response.headers["content-type"]) == (SHEET, "image/jpeg")


async def test_a_waiting_a_running_and_a_failed_task_have_their_own_status(site: Site) -> None:
    made = await site.client.videos.create(prompt=PROMPT)
    assert (made.status, made.progress, made.size, made.seconds) == ("queued", 0, "1280x720", "5")
    assert (await site.client.videos.retrieve(made.id)).status == "queued"
    task_id, _ = await site.take()
    await site.bench.dispatcher.record_progress("w1", task_id, Progress(progress=40, stage=Stage.DENOISING))
    raw = await site.client.videos.with_raw_response.retrieve(made.id)
    running = raw.parse()
    assert (running.status, running.progress, running.prompt) == ("in_progress", 40, PROMPT)
    assert raw.headers["openai-poll-after-ms"] == "1000"
    failure = JobFailure(error="The GPU ran out of memory", error_code=ErrorCode.OOM_ERROR)
    await site.bench.dispatcher.fail("w1", task_id, failure)
    failed = await site.client.videos.poll(made.id)
    assert (failed.status, failed.error) == (
        "failed",
        openai.types.VideoCreateError(code="OOM_ERROR", message="The GPU ran out of memory"),
    )


async def test_a_deleted_video_is_gone_and_a_deleted_running_task_is_cancelled(site: Site) -> None:
    first = await site.client.videos.create(prompt=PROMPT)
    await site.render_next()
    assert (await site.client.videos.delete(first.id)).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        await site.client.videos.retrieve(first.id)
    assert caught.value.code == "VIDEO_DELETED"
    second = await site.client.videos.create(prompt=PROMPT)
    await site.take()
    await site.client.videos.delete(second.id)
    cancelled = await site.client.videos.poll(second.id)
    assert cancelled.status == "failed"
    assert cancelled.error is not None
    assert cancelled.error.code == "cancelled"


async def test_a_list_is_read_page_by_page_in_both_orders(site: Site) -> None:
    made = [(await site.client.videos.create(prompt=f"{PROMPT}, number {index}")).id for index in range(3)]
    assert [video.id async for video in site.client.videos.list(limit=2)] == made[::-1]
    assert [video.id async for video in site.client.videos.list(limit=1, order="asc")] == made
    page = await site.client.videos.list(limit=2)
    assert (page.has_more, page.data[0].prompt) == (True, f"{PROMPT}, number 2")
    with pytest.raises(openai.BadRequestError) as caught:
        await site.client.videos.list(limit=1000)
    assert caught.value.code == "INVALID_REQUEST"


async def test_a_remix_keeps_settings_and_seed_and_changes_the_prompt(site: Site) -> None:
    square: Any = "960x960"
    made = await site.client.videos.create(prompt=PROMPT, seconds="8", size=square)
    await site.render_next()
    remix = await site.client.videos.remix(made.id, prompt="A blue fish swims to the left over the sea")
    assert remix.remixed_from_video_id == made.id
    task_id, asked = await site.take()
    assert asked.request == JobInput(
        prompt="A blue fish swims to the left over the sea",
        duration=8,
        resolution=Resolution.P720,
        aspect_ratio=AspectRatio.SQUARE,
        seed=7,
    )
    assert (await site.client.videos.retrieve(remix.id)).remixed_from_video_id == made.id
    await site.finish(task_id, asked)
    assert (await site.client.videos.retrieve(remix.id)).remixed_from_video_id == made.id
    assert [video.remixed_from_video_id async for video in site.client.videos.list()] == [made.id, None]


async def test_a_sprite_sheet_is_cached_and_guarded_as_the_video_is(site: Site) -> None:
    made = await site.client.videos.create(prompt=PROMPT)
    await site.render_next()
    url = f"{site.address}/v1/videos/{made.id}/content?variant=spritesheet"
    async with httpx.AsyncClient(headers={"X-API-Key": KEY}) as http:
        whole = await http.get(url)
        assert whole.headers["cache-control"] == "private, no-cache"
        again = await http.get(url, headers={"If-None-Match": whole.headers["etag"]})
        poster = await http.get(f"{site.address}/videos/{made.id}.jpg")
    assert (again.status_code, again.content) == (304, b"")
    assert poster.headers["etag"] != whole.headers["etag"]
    async with httpx.AsyncClient() as stranger:
        assert (await stranger.get(url)).status_code == 401
    await site.client.videos.delete(made.id)
    with pytest.raises(openai.NotFoundError, match="was deleted"):
        await site.client.videos.download_content(made.id, variant="spritesheet")


async def test_a_video_of_an_earlier_release_has_no_sprite_sheet(site: Site) -> None:
    made = await site.client.videos.create(prompt=PROMPT)
    await site.finish(*await site.take(), with_sheet=False)
    with pytest.raises(openai.NotFoundError, match="an earlier release rendered it"):
        await site.client.videos.download_content(made.id, variant="spritesheet")


async def test_a_remix_with_an_idempotency_key_is_one_video(site: Site) -> None:
    made = await site.client.videos.create(prompt=PROMPT)
    await site.render_next()
    remixes = [
        await site.client.videos.remix(made.id, prompt=f"{PROMPT} again", extra_headers={"Idempotency-Key": "once"})
        for _ in range(2)
    ]
    assert remixes[0].id == remixes[1].id
    assert (await site.bench.queue.summary()).waiting == 1


async def test_fields_of_the_documented_api_pass_through_a_form_and_through_json(site: Site) -> None:
    await site.client.videos.create(prompt=PROMPT, extra_body={"seed": 5, "guidance_scale": 2.5})
    first, asked = await site.take()
    assert (asked.seed, asked.guidance_scale) == (5, 2.5)
    await site.finish(first, asked)
    body = {"prompt": PROMPT, "seconds": 7, "seed": 6, "negative_prompt": "12"}
    async with httpx.AsyncClient(headers={"X-API-Key": KEY}) as http:
        answer = await http.post(f"{site.address}/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    _, asked = await site.take()
    assert (asked.seed, asked.duration, asked.negative_prompt) == (6, 7, "12")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": "short"}, "INVALID_PROMPT", "prompt"),
        ({"size": "640x480"}, "INVALID_RESOLUTION", "size"),
        ({"seconds": "4"}, "INVALID_DURATION", "seconds"),
        ({"seconds": "long"}, "INVALID_DURATION", "seconds"),
        ({"model": "sora-2"}, "INVALID_MODEL", "model"),
        ({"extra_body": {"lora": {"path": "x"}}}, "INVALID_REQUEST", None),
    ],
)
async def test_a_wrong_field_is_a_bad_request_that_names_it(
    site: Site, fields: dict[str, object], code: str, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await site.client.videos.create(**{"prompt": PROMPT, **fields})  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.param, caught.value.type) == (code, param, "invalid_request_error")
    assert (await site.bench.queue.summary()).waiting == 0


async def test_a_reference_image_is_stored_for_the_worker(site: Site) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "PNG")
    await site.client.videos.create(prompt=PROMPT, input_reference=("red.png", file.getvalue(), "image/png"))
    _, asked = await site.take()
    assert asked.upload_id is not None
    assert asked.image == f"upload:{asked.upload_id}"
    with pytest.raises(openai.BadRequestError, match="no JPEG, PNG or WebP"):
        await site.client.videos.create(prompt=PROMPT, input_reference=("red.png", b"not an image", "image/png"))


async def test_errors_have_the_clients_own_classes(site: Site) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await site.client.videos.retrieve("no-such-video")
    assert (missing.value.code, missing.value.status_code) == ("TASK_NOT_FOUND", 404)
    with pytest.raises(openai.AuthenticationError):
        await site.client.with_options(api_key="wrong").videos.list()
    made = await site.client.videos.create(prompt=PROMPT)
    with pytest.raises(openai.NotFoundError) as early:
        await site.client.videos.download_content(made.id)
    assert early.value.code == "VIDEO_NOT_READY"


async def test_a_full_queue_is_retried_and_no_retry_becomes_a_second_video(site: Site) -> None:
    for index in range(4):
        await site.client.videos.create(prompt=f"{PROMPT}, number {index}")
    with pytest.raises(openai.InternalServerError) as full:
        await site.client.videos.create(prompt=PROMPT)
    assert (full.value.code, full.value.response.headers["retry-after"]) == ("QUEUE_FULL", "30")
    again = await site.client.videos.create(
        prompt=f"{PROMPT}, number 3", extra_headers={"x-stainless-retry-count": "1"}
    )
    listed = [video.id async for video in site.client.videos.list()]
    assert len(listed) == 4
    assert again.id == listed[0]


async def test_models_are_those_that_the_workers_render(site: Site) -> None:
    names = [model.id async for model in site.client.models.list()]
    assert names == ["HunyuanVideo-1.5"]
    assert (await site.client.models.retrieve(names[0])).owned_by == "tencent"
    with pytest.raises(openai.NotFoundError):
        await site.client.models.retrieve("sora-2")


@pytest.mark.full
async def test_litellm_makes_and_downloads_a_video(site: Site) -> None:
    import litellm  # takes four seconds, which the other processes of a run need not spend

    where = {"api_base": f"{site.address}/v1", "api_key": KEY, "custom_llm_provider": "openai"}
    made = await litellm.avideo_generation(prompt=PROMPT, model="HunyuanVideo-1.5", seconds="5", **where)
    await site.render_next()
    status = await litellm.avideo_status(video_id=made.id, **where)
    assert status.status == "completed"
    assert await litellm.avideo_content(video_id=made.id, **where) == VIDEO
