"""The web page in a real browser, on the real app with a real queue and bucket; the dispatcher plays the worker."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from PIL import Image
from playwright.async_api import Browser, Error, FilePayload, Locator, Route, expect

from contract.errors import ErrorCode, JobFailure
from contract.job import DEMO_MODEL, AspectRatio, JobInput, Resolution, parse_queued
from contract.lora import Lora
from contract.result import Progress, Stage
from contract.worker import WorkerReport, WorkerState
from handler.encode import Target, encode
from shim.access import OPEN_TO_ALL, Access, parse_api_keys
from shim.app import create_app
from shim.errors import ServerErrorCode
from shim.rewrite import Rewriter
from storage import layout
from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.browser import PATIENCE, PLAIN_HOST, PROMPT, Visit, visiting
from tests.support.chat_model import chat_model
from tests.support.full import full
from tests.support.http_server import serving
from tests.support.queues import Bench, result, sql_bench
from tests.support.s3_servers import new_bucket
from tools.demo_model.shapes import KINDS

KEY = "alices-key-0123456789"
FRAMES = 121
AXE = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()


@pytest.fixture(scope="module")
def bucket(s3_server: BucketSettings) -> Bucket:
    return Bucket(new_bucket(s3_server))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A video of five seconds, encoded as the worker does, with fewer pixels."""
    target = Target(
        tmp_path_factory.mktemp("video") / "video.mp4", Path("/dev/null"), Path("/dev/null"), 320, 180, FRAMES
    )
    shades = (np.full((1, 36, 64, 3), (2 * index, 90, 200), dtype=np.uint8) for index in range(FRAMES))
    encode(shades, target, lambda _: None)
    return target.video.read_bytes()


def poster(asked: JobInput) -> bytes:
    file = io.BytesIO()
    width, height = asked.size
    Image.new("RGB", (width // 40, height // 40), "teal").save(file, "JPEG")
    return file.getvalue()


@dataclass
class Site:
    """The server, and what its worker does."""

    bench: Bench
    bucket: Bucket
    address: str

    async def take(self) -> tuple[str, JobInput]:
        """The next task and its input; waits until there is one."""
        dispatcher = self.bench.dispatcher
        with anyio.fail_after(PATIENCE / 1000):
            changed = dispatcher.changed
            while (delivery := await dispatcher.take("w1")) is None:
                await changed.wait()
                changed = dispatcher.changed
        self.bench.later()
        return delivery.task_id, parse_queued(delivery.input).request

    async def progress(self, task_id: str, progress: int, stage: Stage) -> None:
        await self.bench.dispatcher.record_progress("w1", task_id, Progress(progress=progress, stage=stage))

    async def preview(self, task_id: str, progress: int, colour: str, size: tuple[int, int] = (32, 18)) -> None:
        file = io.BytesIO()
        Image.new("RGB", size, colour).save(file, "JPEG")
        report = Progress(progress=progress, stage=Stage.DENOISING).model_copy(update={"preview": file.getvalue()})
        await self.bench.dispatcher.record_progress("w1", task_id, report)

    async def finish(self, task_id: str, asked: JobInput, video: bytes) -> None:
        known = {"input": asked, "file_size": len(video), "sha256": hashlib.sha256(video).hexdigest()}
        output = result(task_id).model_copy(update=known)
        body = output.model_dump_json().encode()
        for content, key, kind in (
            (video, layout.video_key(task_id), "video/mp4"),
            (poster(asked), layout.poster_key(task_id), "image/jpeg"),
            (body, layout.manifest_key(task_id), "application/json"),
        ):
            await asyncio.to_thread(self.bucket.put_bytes, content, key, content_type=kind)
        assert await self.bench.dispatcher.complete("w1", task_id, output.model_dump(mode="json"))

    async def backlog(self) -> tuple[int, int]:
        """The numbers of waiting and running tasks."""
        seen = await self.bench.queue.summary()
        return seen.waiting, seen.running


@asynccontextmanager
async def running(
    directory: Path, bucket: Bucket, access: Access = OPEN_TO_ALL, rewriter: Rewriter | None = None, **worker: Any
) -> AsyncIterator[Site]:
    async with sql_bench(f"sqlite:///{directory}/queue.sqlite3", max_queue_size=2) as bench:
        await bench.worker(**worker)
        async with serving(create_app(bench.queue, bucket, access=access, rewriter=rewriter)) as address:
            yield Site(bench, bucket, address)


@pytest.fixture
async def site(tmp_path: Path, bucket: Bucket) -> AsyncIterator[Site]:
    async with running(tmp_path, bucket) as made:
        yield made


@pytest.fixture
async def visit(browser: Browser, site: Site) -> AsyncIterator[Visit]:
    async with visiting(browser, site.address) as made:
        yield made


async def plays(player: Locator) -> None:
    """Asserts that the player has loaded the whole video and plays it."""
    await expect(player).to_be_visible()
    await expect(player).to_have_js_property("readyState", 4)
    assert await player.evaluate("video => video.duration") == pytest.approx(FRAMES / 24, abs=0.05)
    assert await player.evaluate("video => [video.videoWidth, video.videoHeight]") == [320, 180]
    await player.evaluate("video => video.play()")
    await expect(player).not_to_have_js_property("currentTime", 0)


async def downloaded(visit: Visit) -> bytes:
    async with visit.page.expect_download() as started:
        await visit.card.get_by_role("link", name="Download").click()
    return (await (await started.value).path()).read_bytes()


# From the prompt to the video


async def test_a_prompt_becomes_a_video_that_plays_and_can_be_downloaded(
    site: Site, visit: Visit, video: bytes
) -> None:
    await visit.prompt.fill(f"  {PROMPT} ")
    await expect(visit.page.locator("#count")).to_have_text(f"{len(PROMPT)} / 500")
    await visit.page.get_by_label("Duration").fill("6")
    await visit.page.get_by_label("1080p").check()
    await visit.page.get_by_label("9:16").check()
    await visit.page.get_by_text("More").click()
    for label, value in (("Seed", "7"), ("Steps", "12"), ("Guidance", "2.5"), ("Negative prompt", "text")):
        await visit.page.get_by_label(label, exact=True).fill(value)
    await visit.click("Make video")
    await expect(visit.card).to_contain_text("In the queue, next to start")

    task_id, asked = await site.take()
    assert asked == JobInput.model_validate(
        {
            **{"prompt": PROMPT, "duration": 6, "resolution": "1080p", "aspect_ratio": "9:16", "seed": 7},
            **{"num_inference_steps": 12, "guidance_scale": 2.5, "negative_prompt": "text"},
        }
    )
    bar = visit.card.get_by_role("progressbar")
    for percent, stage, words in ((30, Stage.DENOISING, "Forming the video"), (80, Stage.DECODING, "Drawing")):
        await site.progress(task_id, percent, stage)
        await expect(bar).to_have_js_property("value", percent)
        await expect(visit.card.get_by_role("status").first).to_contain_text(words)
    await expect(visit.card).to_contain_text(re.compile(r"0:0\d · about \d+ (s|min) left"))

    await site.finish(task_id, asked, video)
    await plays(visit.card.locator("video"))
    await expect(bar).to_be_hidden()
    assert await downloaded(visit) == video


@pytest.mark.full
async def test_settings_can_be_used_again_and_an_ended_task_removed(site: Site, visit: Visit) -> None:
    await visit.page.get_by_text("More").click()
    await visit.page.get_by_label("Seed").fill("7")
    await visit.page.get_by_label("3:4").check()
    await visit.make()
    task_id, _ = await site.take()
    await site.bench.dispatcher.fail("w1", task_id, JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR))
    await expect(visit.card).to_contain_text("Out of memory (OOM_ERROR)")

    await visit.page.reload()
    await visit.choose("Use these settings again")
    await expect(visit.prompt).to_have_value(PROMPT)
    await expect(visit.page.get_by_label("Seed")).to_have_value("7")
    await expect(visit.page.get_by_label("3:4")).to_be_checked()
    await visit.choose("Remove from list")
    await expect(visit.page.get_by_text("Nothing here yet")).to_be_visible()
    await visit.page.reload()
    await expect(visit.page.locator(".card")).to_have_count(0)


async def test_a_running_task_can_be_cancelled(site: Site, visit: Visit) -> None:
    await visit.make()
    await site.take()
    await visit.click("Cancel")
    await expect(visit.card).to_contain_text("CANCELLED")
    assert await site.backlog() == (0, 0)


@pytest.mark.full
async def test_an_image_file_is_made_smaller_and_stored_before_the_request(
    site: Site, visit: Visit, bucket: Bucket
) -> None:
    await visit.page.get_by_text("More").click()
    picture = io.BytesIO()
    Image.new("RGBA", (4000, 3000), "teal").save(picture, "PNG")
    large = FilePayload(name="boat.png", mimeType="image/png", buffer=picture.getvalue())
    await visit.page.get_by_label("or a file").set_input_files(large)
    await expect(visit.page.get_by_label("First frame")).to_have_attribute("placeholder", "boat.png")
    await visit.page.reload()  # the stored image is still the first frame
    await visit.click("Remove")
    await visit.page.get_by_label("or a file").set_input_files(large)
    await visit.make()  # while the upload runs
    await expect(visit.card).to_contain_text("from an image")
    _, asked = await site.take()
    assert asked.upload_id is not None
    stored = Image.open(io.BytesIO(await asyncio.to_thread(bucket.get_bytes, layout.image_key(asked.upload_id))))
    assert (stored.format, stored.size) == ("JPEG", (2048, 1536))


@pytest.mark.full
async def test_a_file_that_is_no_picture_is_refused_and_no_task_is_made(site: Site, visit: Visit) -> None:
    await visit.page.get_by_text("More").click()
    text = FilePayload(name="boat.png", mimeType="image/png", buffer=b"\x89PNG" + bytes(1000))
    await visit.page.get_by_label("or a file").set_input_files(text)
    await expect(visit.page.locator("#image-error")).to_have_text(
        "image: boat.png is not a picture that this browser can read"
    )
    assert await site.backlog() == (0, 0)


# Errors of the server, and where the page shows them


async def test_an_error_is_shown_at_its_field_with_the_servers_message(site: Site, visit: Visit) -> None:
    visit.expected.append("status of 400")
    await visit.page.get_by_text("More").click()
    for label, value, words in (
        ("Prompt", "short", "prompt must be text of 10-500 characters after trimming; got 5"),
        ("Seed", "seven", "seed must be an integer"),
        ("Guidance", "99", "guidance_scale must be a number from 1 to 20"),
        ("First frame", "ftp://films.test/a.png", "image must be an http(s) URL"),
    ):
        await visit.prompt.fill(PROMPT)
        control = visit.page.get_by_label(label, exact=True)
        await control.fill(value)
        await visit.click("Make video")
        await expect(control).to_have_accessible_description(re.compile(re.escape(words)))
        await expect(control).to_have_attribute("aria-invalid", "true")
        await expect(control).to_be_focused()
        await expect(visit.page.locator(".error:not(:empty)")).to_have_count(1)
        await control.fill("")
    assert await site.backlog() == (0, 0)
    await visit.make()
    await expect(visit.card).to_be_visible()
    await expect(visit.page.locator(".error:not(:empty)")).to_have_count(0)


@pytest.mark.full
async def test_an_error_without_a_field_is_shown_above_the_button(site: Site, visit: Visit) -> None:
    visit.expected.append("status of 400")
    await visit.page.locator("#seed").evaluate("field => { field.name = 'sed'; field.value = '1'; }")
    await visit.make()
    await expect(visit.page.get_by_role("alert")).to_contain_text('unknown field "sed"')


async def test_after_a_full_queue_the_button_counts_down_and_works_again(site: Site, visit: Visit) -> None:
    visit.expected.append("status of 503")
    await visit.page.clock.install()
    await visit.page.reload()
    for count in (1, 2):
        await visit.make()
        await expect(visit.page.locator(".card")).to_have_count(count)
    await visit.make()
    await expect(visit.page.get_by_role("alert")).to_contain_text(re.compile(r"\d.*It can be sent again in 30 s\."))
    button = visit.page.get_by_role("button", name=re.compile(r"^Again in \d+ s"))
    await expect(button).to_have_attribute("aria-disabled", "true")
    await site.take()
    await visit.page.clock.run_for(31_000)
    await visit.click("Make video")
    await expect(visit.page.locator(".card")).to_have_count(3)


# Lost responses, and pages that are closed


async def test_a_task_goes_on_after_a_reload(site: Site, visit: Visit, video: bytes) -> None:
    await visit.make()
    await expect(visit.card).to_be_visible()
    task_id, asked = await site.take()
    await visit.page.reload()
    await site.progress(task_id, 55, Stage.DENOISING)
    await expect(visit.card.get_by_role("progressbar")).to_have_js_property("value", 55)

    await visit.page.close()
    await site.finish(task_id, asked, video)
    visit.page = await visit.context.new_page()
    await visit.page.goto(site.address)
    await expect(visit.page.locator(".card")).to_have_count(1)
    await plays(visit.card.locator("video"))


@pytest.mark.parametrize("how", [full("broken off"), "proxy"])
async def test_a_request_whose_response_was_lost_is_sent_again_and_makes_no_second_task(
    site: Site, visit: Visit, how: str
) -> None:
    visit.expected += ["ERR_FAILED", "status of 502"]
    lost = 0

    async def lose_the_first(route: Route) -> None:
        nonlocal lost
        if lost:
            await route.continue_()
            return
        lost += 1
        await route.fetch()  # the server handles the request, and its response is lost
        if how == "proxy":
            await route.fulfill(status=502, body="<h1>Bad Gateway</h1>")
        else:
            await route.abort()

    await visit.page.route("**/generate", lose_the_first)
    await visit.make()
    await expect(visit.card).to_contain_text("In the queue, next to start")
    assert lost == 1
    assert await site.backlog() == (1, 0)


async def test_the_page_waits_for_a_server_that_is_unavailable(site: Site, browser: Browser, video: bytes) -> None:
    async with visiting(browser, "about:blank") as visit:
        visit.expected += ["ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE"]
        async with serving(create_app(site.bench.queue, site.bucket)) as address:
            await visit.page.goto(address)
            await visit.make()
            await expect(visit.card).to_be_visible()
        task_id, asked = await site.take()
        await expect(visit.card).to_contain_text("The server can’t be reached. Trying again …")
        await visit.make("A second one, while nobody listens")
        await expect(visit.card).to_contain_text("Sending")
        await site.finish(task_id, asked, video)
        async with serving(create_app(site.bench.queue, site.bucket), port=int(address.rpartition(":")[2])):
            await expect(visit.page.locator(".card").last.locator("video")).to_be_visible()
            await expect(visit.card).to_contain_text("In the queue, next to start")
            assert await site.backlog() == (1, 0)
            await expect(visit.page.locator("#health")).to_have_text("Healthy")


async def test_a_page_reads_a_stream_and_asks_for_no_status_until_the_stream_ends(
    site: Site, visit: Visit, video: bytes
) -> None:
    asked: list[str] = []
    visit.page.on("request", lambda request: asked.append(request.url))
    await visit.make()
    task_id, job_input = await site.take()
    for percent in (20, 40, 60):
        await site.progress(task_id, percent, Stage.DENOISING)
        await expect(visit.card.get_by_role("progressbar")).to_have_js_property("value", percent)
    await site.finish(task_id, job_input, video)
    await plays(visit.card.locator("video"))
    assert [url for url in asked if "/status/" in url] == []
    assert len([url for url in asked if url.endswith("/events")]) == 1


@pytest.mark.full
async def test_a_page_polls_more_tasks_than_it_has_streams(site: Site, visit: Visit) -> None:
    """A browser opens few connections to a server, and the videos need some."""
    asked: list[str] = []
    visit.page.on("request", lambda request: asked.append(request.url))
    for count in (1, 2, 3):
        await visit.make(f"The boat number {count} on a street")
        await expect(visit.page.locator(".card")).to_have_count(count)
        await expect(visit.card).to_contain_text("next to start")
        delivery = await site.bench.dispatcher.take(f"w{count}")
        assert delivery is not None
        progress = Progress(progress=10 * count, stage=Stage.DENOISING)
        await site.bench.dispatcher.record_progress(f"w{count}", delivery.task_id, progress)
    for index, percent in enumerate((30, 20, 10)):
        bar = visit.page.locator(".card").nth(index).get_by_role("progressbar")
        await expect(bar).to_have_js_property("value", percent)
    assert len([url for url in asked if url.endswith("/events")]) == 2
    assert len({url for url in asked if "/status/" in url}) == 1


@pytest.mark.full
@pytest.mark.parametrize("how", ["refused", "held back"])
async def test_a_page_polls_if_there_is_no_stream(site: Site, visit: Visit, video: bytes, how: str) -> None:
    visit.expected += ["status of 405"]
    streams = 0

    async def no_stream(route: Route) -> None:
        nonlocal streams
        streams += 1
        if how == "refused":
            await route.fulfill(status=405, body="{}")
        # a proxy that collects the whole answer sends nothing until its end

    await visit.page.clock.install()
    await visit.page.route("**/events", no_stream)
    await visit.make()
    task_id, job_input = await site.take()
    await site.progress(task_id, 40, Stage.DENOISING)
    for _ in range(30):
        await visit.page.clock.run_for(1_000)
    await expect(visit.card.get_by_role("progressbar")).to_have_js_property("value", 40)
    await site.finish(task_id, job_input, video)
    await visit.page.clock.run_for(2_000)
    await expect(visit.card.locator("video")).to_be_visible()
    assert streams == 1, "it is not tried again"


@pytest.mark.full
async def test_a_hidden_page_polls_rarely_until_it_is_visible(site: Site, visit: Visit) -> None:
    await visit.make()
    await expect(visit.card).to_be_visible()
    await visit.page.evaluate(
        "Object.defineProperty(document, 'hidden', { get: () => window.away, configurable: true })"
    )
    await visit.page.evaluate("window.away = true; document.dispatchEvent(new Event('visibilitychange'))")
    async with visit.page.expect_response("**/status/*"):
        pass
    with pytest.raises(Error, match="Timeout"):
        async with visit.page.expect_request("**/status/*", timeout=2_500):
            pass
    async with visit.page.expect_request("**/events", timeout=2_500):
        await visit.page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")


# Keys


@pytest.mark.parametrize("remember", [False, full(True)])
async def test_the_page_asks_for_a_key_keeps_it_and_loads_the_video_with_it(
    tmp_path: Path, bucket: Bucket, browser: Browser, video: bytes, remember: bool
) -> None:
    async with (
        running(tmp_path, bucket, Access(parse_api_keys(KEY))) as site,
        visiting(browser, site.address) as visit,
    ):
        visit.expected.append("status of 401")
        dialog = visit.page.get_by_role("dialog", name="This server needs an API key")
        await visit.make()
        await dialog.get_by_label("API key").fill("not-the-key-0123456789")
        await visit.click("Go on")
        await expect(dialog).to_contain_text("The server does not accept this key")
        await dialog.get_by_label("API key").fill(KEY)
        await dialog.get_by_label("Remember").set_checked(remember)
        await visit.click("Go on")
        await expect(visit.card).to_be_visible()
        task_id, asked = await site.take()
        await site.finish(task_id, asked, video)
        player = visit.card.locator("video")
        await plays(player)
        assert str(await player.evaluate("video => video.currentSrc")).startswith("blob:")
        assert await downloaded(visit) == video

        await visit.page.reload()
        await plays(player)
        kept = await visit.page.evaluate("[sessionStorage, localStorage].map(store => store['hunyuan.key'] ?? null)")
        assert kept == ([None, KEY] if remember else [KEY, None])


@pytest.mark.full
async def test_a_user_without_a_key_is_asked_once_and_sees_the_error(
    tmp_path: Path, bucket: Bucket, browser: Browser
) -> None:
    async with (
        running(tmp_path, bucket, Access(parse_api_keys(KEY))) as site,
        visiting(browser, site.address) as visit,
    ):
        visit.expected.append("status of 401")
        await expect(visit.page.locator("#health")).to_have_text("Healthy")
        await visit.make()
        await visit.click("Not now")
        await expect(visit.page.get_by_role("alert").first).to_contain_text("an API key is needed")
        await visit.click("API key")
        await visit.page.get_by_role("dialog").get_by_label("API key").fill(KEY)
        await visit.page.keyboard.press("Enter")
        await visit.click("Make video")
        await expect(visit.card).to_be_visible()


# The header


@pytest.mark.full
async def test_the_header_says_why_no_model_is_loaded(site: Site, visit: Visit) -> None:
    visit.expected.append("status of 503")
    for state, words in (
        (WorkerState.LOADING, "Loading the model"),
        (WorkerState.FAILED, "The model failed to load"),
        (WorkerState.STOPPED, "No worker"),
    ):
        await site.bench.worker(state=state)
        await visit.page.reload()
        await expect(visit.page.locator("#health")).to_have_text(words)
    await visit.make()
    await expect(visit.page.get_by_role("alert")).to_contain_text("Model not loaded")
    await expect(visit.page.get_by_role("alert")).to_contain_text("It can be sent again in 10 s.")


@pytest.mark.full
async def test_the_page_warns_about_the_demo_model(site: Site, browser: Browser) -> None:
    await site.bench.dispatcher.report("w1", WorkerReport(state=WorkerState.READY, model=DEMO_MODEL))
    async with visiting(browser, site.address) as visit:
        await expect(visit.page.get_by_text("Demo model: coloured shapes over simple scenes")).to_be_visible()
        await expect(visit.page.get_by_role("list", name="The server")).to_contain_text("Model: demo")
        await visit.make()
        await site.take()
        await visit.page.reload()
        await expect(visit.page.locator("#queue")).to_have_text("0 waiting, 1 running")


@pytest.mark.full
async def test_an_example_of_the_demo_model_fills_the_prompt_by_keyboard_and_by_mouse(
    site: Site, browser: Browser
) -> None:
    await site.bench.dispatcher.report("w1", WorkerReport(state=WorkerState.READY, model=DEMO_MODEL))
    async with visiting(browser, site.address) as visit:
        visit.expected.append("status of 400")
        examples = visit.page.get_by_role("list", name="Prompts for the demo model").get_by_role("button")
        await expect(examples).to_have_count(5)
        await visit.make("short")
        await expect(visit.prompt).to_have_attribute("aria-invalid", "true")
        await visit.prompt.press("Tab")
        await expect(examples.first).to_be_focused()
        await visit.page.keyboard.press("Enter")
        await expect(visit.prompt).to_be_focused()
        await expect(visit.prompt).to_have_value(await examples.first.inner_text())
        await expect(visit.prompt).to_have_attribute("aria-invalid", "false")
        await examples.last.click()
        prompt = await examples.last.inner_text()
        await expect(visit.page.locator("#count")).to_have_text(f"{len(prompt)} / 500")
        await visit.page.keyboard.press("Control+Enter")
        _, asked = await site.take()
        assert asked.prompt == prompt
        for text in await examples.all_inner_texts():
            JobInput(prompt=text)


@pytest.mark.full
async def test_another_model_has_examples_of_its_own(visit: Visit) -> None:
    await visit.page.get_by_role("list", name="Prompts to begin with").get_by_role("button").nth(1).click()
    await expect(visit.prompt).to_have_value(re.compile("pine forest"))
    await expect(visit.page.locator("#examples")).to_be_hidden()
    await expect(visit.page.locator("#demo")).to_be_hidden()


@pytest.mark.full
async def test_a_hint_follows_the_prompt_while_it_is_typed(visit: Visit) -> None:
    for prompt, hint in (
        ("", ""),
        ("A dog", "5 characters to go."),
        ("y" * 502, "2 characters too long."),
        ("A fast-paced slow-motion video of a dog", "“fast-paced” and “slow-motion” contradict each other."),
        ("Privacy video please", "Say who or what is seen, what it does, and where."),
        (
            "A dog runs along the beach in the rain",
            "Name a style, too: “cinematic light”, “minimalist design”, “close-up”.",
        ),
        ("A dog runs along the beach in the rain, watercolour", ""),
        ("一只狗在沙滩上奔跑着追逐海浪", ""),
    ):
        await visit.prompt.fill(prompt)
        await expect(visit.page.locator("#prompt-hint")).to_have_text(hint)


@pytest.mark.full
async def test_the_hint_for_the_demo_model_names_the_shapes_that_it_draws(site: Site, browser: Browser) -> None:
    await site.bench.dispatcher.report("w1", WorkerReport(state=WorkerState.READY, model=DEMO_MODEL))
    async with visiting(browser, site.address) as visit:
        await expect(visit.page.locator("#demo")).to_be_visible()
        await visit.prompt.fill("A red car moves to the left")
        await expect(visit.page.locator("#prompt-hint")).to_have_text(re.compile(", ".join(KINDS)))
        await visit.prompt.fill("A red fish moves to the left")
        await expect(visit.page.locator("#prompt-hint")).to_be_empty()


@pytest.mark.full
async def test_the_form_offers_models_if_there_are_several(tmp_path: Path, bucket: Bucket, browser: Browser) -> None:
    models = ("HunyuanVideo-1.5", "HunyuanVideo-1.5-fast", "HunyuanVideo-1.5-quality")
    async with running(tmp_path, bucket, models=models) as site, visiting(browser, site.address) as visit:
        await visit.page.get_by_label("Model", exact=True).select_option("Quality")
        await visit.make()
        await expect(visit.card).to_contain_text("HunyuanVideo-1.5-quality")
        _, asked = await site.take()
        assert asked.model == "HunyuanVideo-1.5-quality"
        await site.bench.worker(models=models[:1])
        await visit.page.reload()
        await expect(visit.page.locator("#health")).to_have_text("Healthy")
        await expect(visit.page.get_by_label("Model", exact=True)).to_be_hidden()


@pytest.mark.full
async def test_the_form_offers_to_enhance_the_prompt_if_the_server_can(
    tmp_path: Path, bucket: Bucket, browser: Browser
) -> None:
    with chat_model() as chat:
        chat.answers.append("<prompt>A small boat of white paper drifts along a street.</prompt>")
        rewriter = Rewriter(chat.base_url, "a-chat-model")
        async with running(tmp_path, bucket, rewriter=rewriter) as site, visiting(browser, site.address) as visit:
            box = visit.page.get_by_label("Enhance prompt")
            await expect(box).to_have_accessible_description(re.compile("language model"))
            await box.check()
            await visit.make()
            _, asked = await site.take()
            assert asked.enhance_prompt
            await expect(visit.card).to_contain_text(PROMPT)
    assert len(chat.requests) == 1


@pytest.mark.full
async def test_the_form_hides_what_the_server_cannot_do(site: Site, visit: Visit) -> None:
    await expect(visit.page.locator("#health")).to_have_text("Healthy")
    await expect(visit.page.get_by_label("Enhance prompt")).to_be_hidden()
    await visit.make()
    _, asked = await site.take()
    assert not asked.enhance_prompt


# Accessibility, phones and plain http


async def tab_to(control: Locator) -> None:
    """Presses the tab key until the control has the focus, which the example prompts have before."""
    for _ in range(10):
        await control.page.keyboard.press("Tab")
        if await control.evaluate("control => control === document.activeElement"):
            return
    raise AssertionError(f"{control} never has the focus")


async def test_the_form_works_by_keyboard(site: Site, visit: Visit) -> None:
    await visit.prompt.focus()
    await visit.page.keyboard.type(PROMPT)
    await tab_to(visit.page.get_by_label("Duration"))
    await visit.page.keyboard.press("ArrowRight")  # 6 seconds
    await tab_to(visit.page.get_by_label("720p"))
    await visit.page.keyboard.press("ArrowRight")  # 1080p
    await visit.prompt.press("Control+Enter")
    await expect(visit.card).to_be_visible()
    _, asked = await site.take()
    assert (asked.prompt, asked.duration, asked.resolution) == (PROMPT, 6, "1080p")


@pytest.mark.full
async def test_every_control_has_a_name_for_screen_readers(site: Site, visit: Visit, video: bytes) -> None:
    await visit.page.get_by_text("More").click()
    await visit.make()
    await expect(visit.card).to_be_visible()
    task_id, asked = await site.take()
    await site.finish(task_id, asked, video)
    await expect(visit.card.locator("video")).to_be_visible()
    await visit.make("Another one, which still waits")
    await expect(visit.page.locator(".card")).to_have_count(2)
    session = await visit.context.new_cdp_session(visit.page)
    tree = (await session.send("Accessibility.getFullAXTree"))["nodes"]
    roles = {"textbox", "slider", "radio", "combobox", "button", "link", "progressbar", "dialog", "Video"}
    controls = [
        (node["role"]["value"], node["name"]["value"])
        for node in tree
        if not node["ignored"] and node["role"]["value"] in roles and "name" in node
    ]
    assert {name for role, name in controls if role == "textbox"} == {
        *("Prompt", "Negative prompt", "Seed", "Steps", "Guidance", "First frame")
    }
    assert {"slider", "radio", "button", "link", "progressbar", "Video"} <= {role for role, _ in controls}
    assert [role for role, name in controls if not name] == []


async def violations(visit: Visit) -> list[str]:
    """What axe-core finds on the page, of any level."""
    await visit.page.evaluate(AXE)
    found = (await visit.page.evaluate("axe.run(document, { resultTypes: ['violations'] })"))["violations"]
    return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]


@pytest.mark.parametrize(("scheme", "width"), [full("light", 1280), ("dark", 390)])
async def test_axe_finds_no_violation(site: Site, browser: Browser, video: bytes, scheme: Any, width: int) -> None:
    visiting_so = visiting(browser, site.address, viewport={"width": width, "height": 800}, color_scheme=scheme)
    async with visiting_so as visit:
        visit.expected.append("status of 400")
        assert await violations(visit) == []
        await completed(site, visit, video)
        await visit.choose("Copy link")
        await visit.make()
        await expect(visit.page.locator(".card")).to_have_count(2)
        task_id, _ = await site.take()
        failure = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)
        await site.bench.dispatcher.fail("w1", task_id, failure)
        await expect(visit.card).to_contain_text("OOM_ERROR")
        await visit.make("A video that is still being made")
        await expect(visit.card).to_contain_text("next to start")
        await visit.page.get_by_text("All unfinished videos").click()
        await expect(visit.page.locator("#unfinished-list li")).to_have_count(1)
        await visit.page.get_by_text("This request as code").click()
        await visit.page.locator("#more").get_by_text("More").click()
        await visit.make("short")
        await expect(visit.prompt).to_have_attribute("aria-invalid", "true")
        assert await violations(visit) == []
        await visit.page.locator("#key-dialog").evaluate("dialog => dialog.showModal()")
        assert await violations(visit) == []


@pytest.mark.parametrize("scheme", [full("light"), "dark"])
async def test_nothing_scrolls_sideways_on_a_phone(site: Site, browser: Browser, scheme: Any) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True}
    async with visiting(browser, site.address, **phone) as visit:
        await visit.page.get_by_text("More").click()
        await visit.make("x" * 300)
        await expect(visit.card).to_be_in_viewport()
        assert await visit.page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.full
async def test_the_page_works_over_plain_http_from_another_machine(site: Site, browser: Browser, video: bytes) -> None:
    async with visiting(browser, site.address.replace("127.0.0.1", PLAIN_HOST)) as visit:
        assert await visit.page.evaluate("[window.isSecureContext, typeof crypto.randomUUID]") == [False, "undefined"]
        await visit.make()
        await expect(visit.card).to_be_visible()
        task_id, asked = await site.take()
        await site.finish(task_id, asked, video)
        await visit.choose("Copy link")
        await expect(visit.card.get_by_role("button", name="Copied")).to_be_visible()
        await visit.prompt.fill("")
        await visit.prompt.press("Control+V")
        await expect(visit.prompt).to_have_value(f"http://{PLAIN_HOST}{site.address[16:]}/videos/{task_id}.mp4")


async def test_inline_scripts_and_styles_are_blocked(visit: Visit) -> None:
    visit.expected += ["TrustedScript", "Content Security Policy"]
    with pytest.raises(Error, match="TrustedScript"):
        await visit.page.evaluate("document.createElement('script').textContent = 'ran = 1'")
    async with visit.page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        await visit.page.evaluate("document.body.setAttribute('style', 'margin: 99px')")
    assert await visit.page.evaluate("getComputedStyle(document.body).marginTop") == "0px"


# The gallery: posters, previews, variations


async def add_to_status(visit: Visit, **fields: Any) -> None:
    """From now on the status of a completed task has these fields, too. `{id}` in a text is the task's id."""

    async def add(route: Route) -> None:
        status = await (await route.fetch()).json()
        if status["status"] == "completed":
            status |= {
                name: value.format(id=status["task_id"]) if isinstance(value, str) else value
                for name, value in fields.items()
            }
        await route.fulfill(json=status)

    await visit.page.route("**/status/*", add)


async def completed(site: Site, visit: Visit, video: bytes) -> str:
    """Makes a video with the form as it is; its task id."""
    await visit.make()
    await expect(visit.card).to_be_visible()
    task_id, asked = await site.take()
    await site.finish(task_id, asked, video)
    await expect(visit.card.locator("video")).to_be_visible()
    return task_id


@pytest.mark.full
async def test_a_video_shows_its_poster_and_plays_while_the_mouse_is_over_it(
    site: Site, visit: Visit, video: bytes
) -> None:
    await add_to_status(visit, poster_url=site.address + "/videos/{id}.jpg")
    picture = io.BytesIO()
    Image.new("RGB", (32, 18)).save(picture, "JPEG")
    await visit.page.route("**/videos/*.jpg", lambda route: route.fulfill(body=picture.getvalue()))
    task_id = await completed(site, visit, video)
    player = visit.card.locator("video")
    await expect(player).to_have_js_property("poster", f"{site.address}/videos/{task_id}.jpg")
    await expect(player).to_have_js_property("readyState", 4)
    await expect(player).to_have_js_property("paused", True)
    await player.hover()
    await expect(player).to_have_js_property("paused", False)
    await visit.page.mouse.move(0, 0)
    await expect(player).to_have_js_property("paused", True)
    await expect(player).to_have_js_property("currentTime", 0)


async def test_a_running_task_shows_its_latest_preview_and_nothing_moves(
    tmp_path: Path, bucket: Bucket, browser: Browser, video: bytes
) -> None:
    """With a key, which an <img> can't send."""
    async with (
        running(tmp_path, bucket, Access(parse_api_keys(KEY))) as site,
        visiting(browser, site.address) as visit,
    ):
        await visit.page.evaluate("key => { sessionStorage['hunyuan.key'] = key; }", KEY)
        await visit.page.emulate_media(reduced_motion="reduce")
        await visit.make()
        await expect(visit.card).to_be_visible()
        frame, image = visit.card.locator(".preview"), visit.card.locator(".preview img")
        await expect(frame).to_be_hidden()
        task_id, asked = await site.take()
        await site.progress(task_id, 2, Stage.DENOISING)
        await expect(frame).to_be_visible()
        place = await frame.bounding_box()
        for progress, colour, wanted in ((10, "blue", [0, 0, 254]), (20, "red", [254, 0, 0])):
            await site.preview(task_id, progress, colour, (9, 5))  # a shape that is not quite the video's
            await expect(image).to_have_js_property("complete", True)
            await becomes(lambda: shown_colour(image), wanted)
            assert await frame.bounding_box() == place
        preview = visit.card.get_by_role("img", name="Preview of the video as it forms")
        await expect(preview).to_have_css("opacity", "1")
        await site.finish(task_id, asked, video)
        await expect(frame).to_be_hidden()
        player = visit.card.locator("video")
        await expect(player).to_have_js_property("readyState", 4)
        assert await player.bounding_box() == pytest.approx(place, abs=1)


async def shown_colour(image: Locator) -> list[int]:
    """Red, green and blue of the middle of the picture; empty before it is loaded."""
    colour: list[int] = await image.evaluate(
        """image => {
            if (!image.naturalWidth) return [];
            const canvas = new OffscreenCanvas(1, 1).getContext("2d");
            canvas.drawImage(image, 0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        }"""
    )
    return colour


async def becomes(look: Callable[[], Awaitable[list[int]]], wanted: list[int]) -> None:
    """Waits until `look` returns about what is wanted."""
    seen: list[int] = []
    for _ in range(PATIENCE // 50):
        seen = await look()
        if seen and seen == pytest.approx(wanted, abs=2):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(seen)


@pytest.mark.full
async def test_a_variation_has_a_new_seed_or_a_new_prompt(site: Site, visit: Visit, video: bytes) -> None:
    await visit.page.get_by_text("More").click()
    await visit.page.get_by_label("Seed").fill("7")
    await completed(site, visit, video)
    await visit.page.get_by_label("Seed").fill("")
    await visit.prompt.fill("Something else that is being written")
    await visit.click("New seed")
    await expect(visit.page.locator(".card")).to_have_count(2)
    task_id, asked = await site.take()
    assert (asked.prompt, asked.seed) == (PROMPT, None)
    await expect(visit.prompt).to_have_value("Something else that is being written")

    await site.finish(task_id, asked, video)
    await expect(visit.card.locator("video")).to_be_visible()
    await visit.choose("Same seed, new prompt")
    await expect(visit.page.get_by_label("Seed")).to_have_value("1")
    await expect(visit.prompt).to_be_focused()
    await visit.page.keyboard.type("A paper plane over the same street")
    await visit.click("Make video")
    _, asked = await site.take()
    assert (asked.prompt, asked.seed) == ("A paper plane over the same street", 1)


@pytest.mark.full
async def test_a_failed_task_can_be_tried_again_with_its_seed(site: Site, visit: Visit) -> None:
    await visit.page.get_by_text("More").click()
    await visit.page.get_by_label("Seed").fill("7")
    await visit.make()
    task_id, first = await site.take()
    await site.bench.dispatcher.fail("w1", task_id, JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR))
    await expect(visit.card).to_contain_text("The GPU ran out of memory. Choose a shorter video or 720p.")
    await visit.click("Retry")
    await expect(visit.card).to_contain_text("next to start")
    again, second = await site.take()
    assert (again, second) == (task_id, first)
    await expect(visit.card).not_to_contain_text("OOM_ERROR")
    await visit.click("Cancel")
    await expect(visit.card).to_contain_text("This video was cancelled")
    await visit.click("Try again")  # a cancelled task can't be queued again, so this makes another one
    await expect(visit.page.locator(".card")).to_have_count(2)


@pytest.mark.full
async def test_a_retry_that_the_server_refuses_says_why(site: Site, visit: Visit) -> None:
    visit.expected.append("status of 409")
    await visit.make()
    task_id, _ = await site.take()
    await site.bench.dispatcher.fail("w1", task_id, JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR))
    refused = {"error": "the queue has deleted it", "error_code": "NOT_RETRYABLE"}
    await visit.page.route("**/retry", lambda route: route.fulfill(status=409, json=refused))
    await visit.click("Retry")
    await expect(visit.card).to_contain_text("This video can’t be tried again. Make it again instead.")
    await visit.click("Try again")
    await expect(visit.page.locator(".card")).to_have_count(2)


@pytest.mark.full
async def test_the_list_of_unfinished_videos_has_everyones_and_is_read_only_while_it_is_open(
    site: Site, visit: Visit
) -> None:
    asked: list[str] = []
    visit.page.on("request", lambda request: asked.append(request.url) if "/tasks?" in request.url else None)
    other = (await site.bench.queue.submit(JobInput(prompt=f"{PROMPT}, of somebody else"))).task_id
    await visit.make()
    await expect(visit.card).to_contain_text("In the queue, 1 ahead of it")
    assert asked == []
    await visit.page.get_by_text("All unfinished videos").click()
    rows = visit.page.locator("#unfinished-list li")
    await expect(rows).to_have_count(2)
    await expect(rows.first).to_contain_text("In the queue, next to start")
    await expect(rows.last).to_contain_text("In the queue, 1 ahead of it")
    await expect(rows.last).to_contain_text("yours")
    await expect(rows.first).not_to_contain_text("yours")
    task_id, _ = await site.take()
    assert task_id == other
    await site.progress(task_id, 40, Stage.DENOISING)
    await expect(rows.first).to_contain_text("Forming the video · 40 %")


@pytest.mark.full
async def test_a_portrait_video_fills_its_card_without_bars(site: Site, visit: Visit, tmp_path: Path) -> None:
    target = Target(tmp_path / "video.mp4", Path("/dev/null"), Path("/dev/null"), 180, 320, 25)
    encode((np.zeros((1, 320, 180, 3), dtype=np.uint8) for _ in range(25)), target, lambda _: None)
    await visit.page.get_by_label("9:16").check()
    await completed(site, visit, target.video.read_bytes())
    player = visit.card.locator("video")
    await expect(player).to_have_js_property("readyState", 4)
    assert await player.evaluate("video => video.clientWidth / video.clientHeight") == pytest.approx(9 / 16, rel=0.01)
    assert await player.evaluate("video => video.clientWidth - video.closest('.card').clientWidth") == 0


@pytest.mark.full
async def test_the_form_survives_a_reload(visit: Visit) -> None:
    await visit.prompt.fill(PROMPT)
    await visit.page.get_by_label("9:16").check()
    await visit.page.get_by_label("Duration").fill("8")
    await visit.page.get_by_text("More").click()
    await visit.page.get_by_label("Seed").fill("7")
    await visit.page.reload()
    await expect(visit.prompt).to_have_value(PROMPT)
    await expect(visit.page.get_by_label("9:16")).to_be_checked()
    await expect(visit.page.get_by_label("Duration")).to_have_value("8")
    await expect(visit.page.get_by_label("Seed")).to_have_value("7")
    await expect(visit.page.locator("#count")).to_have_text(f"{len(PROMPT)} / 500")


async def test_every_error_code_has_words_for_people(visit: Visit) -> None:
    words = await visit.page.evaluate("import('/static/words.js').then(({ WORDS }) => WORDS)")
    assert words.keys() == {*ErrorCode, *ServerErrorCode}


@pytest.mark.full
async def test_the_image_field_is_hidden_where_no_weights_take_an_image(site: Site, browser: Browser) -> None:
    await site.bench.worker(takes_images=False)
    async with visiting(browser, site.address) as visit:
        await expect(visit.page.locator("#health")).to_have_text("Healthy")
        await visit.page.get_by_text("More").click()
        await expect(visit.page.get_by_label("Seed")).to_be_visible()
        await expect(visit.page.get_by_label("First frame")).to_be_hidden()


@pytest.mark.full
async def test_adapters_are_on_the_form_if_the_workers_have_some(site: Site, browser: Browser, video: bytes) -> None:
    await site.bench.worker()
    async with visiting(browser, site.address) as visit:
        await expect(visit.page.locator("#health")).to_have_text("Healthy")
        await visit.page.get_by_text("More").click()
        await expect(visit.page.get_by_label("Seed")).to_be_visible()
        adapters = visit.page.get_by_label("Adapters")
        await expect(adapters).to_be_hidden()
        await site.bench.worker(loras=("film", "noir"))
        await visit.page.reload()
        await visit.page.get_by_text("More").click()
        await expect(adapters).to_have_accessible_description("NAME or NAME:SCALE, with commas between: film, noir")
        await adapters.fill("film:0.5, noir")
        await visit.make()
        task_id, asked = await site.take()
        assert asked.loras == (Lora(name="film", scale=0.5), Lora(name="noir"))
        await site.finish(task_id, asked, video)
        await visit.page.reload()
        await expect(adapters).to_have_value("film:0.5, noir")


# The request as code


@pytest.mark.parametrize("language", ["curl", full("Python"), full("Node")])
async def test_the_request_as_code_makes_the_same_task(
    site: Site, visit: Visit, video: bytes, tmp_path: Path, language: str
) -> None:
    prompt = 'It\'s a "paper" boat, 20 % of a $street\\n — 纸船'
    await visit.prompt.fill(prompt)
    await visit.page.get_by_text("More").click()
    await visit.page.get_by_label("Seed").fill("7")
    await visit.page.get_by_label("9:16").check()
    await visit.page.get_by_text("This request as code").click()
    await visit.page.get_by_role("button", name=language, exact=True).click()
    code = await visit.page.locator("#code-text").inner_text()
    if language == "curl":
        code = code.partition("\n\n")[0]
    program = tmp_path / {"curl": "video.sh", "Python": "video.py", "Node": "video.mjs"}[language]
    program.write_text(code)
    command = {"curl": "sh", "Python": sys.executable, "Node": "node"}[language]
    if shutil.which(command) is None:
        pytest.skip(f"needs {command}")
    async with anyio.create_task_group() as group:
        group.start_soon(partial(anyio.run_process, [command, str(program)], cwd=tmp_path))
        task_id, asked = await site.take()
        await site.finish(task_id, asked, video)
    assert asked == JobInput(
        prompt=prompt, duration=5, resolution=Resolution.P720, aspect_ratio=AspectRatio.TALL, seed=7
    )
    if language != "curl":
        assert (tmp_path / "video.mp4").read_bytes() == video


# Fields that only the schema has


async def test_a_new_field_of_the_schema_is_on_the_form_and_in_the_request(site: Site, browser: Browser) -> None:
    """No file of the page names these fields: POST /generate rejects them, so only the request shows them."""
    new_fields = {
        "motion": {"type": "integer", "minimum": 1, "maximum": 9, "default": 3, "title": "Motion"},
        "frame_rate": {"type": "string", "enum": ["24", "30"], "default": "24", "title": "Frame Rate"},
        "grain": {"anyOf": [{"type": "number"}, {"type": "null"}], "title": "Grain", "description": "Film grain."},
        "looped": {"anyOf": [{"type": "boolean"}, {"type": "null"}], "title": "Looped"},
    }
    async with visiting(browser, "about:blank") as visit:
        visit.expected.append("status of 400")

        async def add_fields(route: Route) -> None:
            body = await (await route.fetch()).text()
            schema = json.loads(body.removeprefix("export default ").rstrip(";\n"))
            schema["properties"] |= new_fields
            await route.fulfill(body=f"export default {json.dumps(schema)};", content_type="text/javascript")

        await visit.page.route("**/static/schema.js", add_fields)
        await visit.page.goto(site.address)
        await visit.page.get_by_label("Motion").fill("5")
        await visit.page.get_by_label("30", exact=True).check()
        await visit.page.get_by_text("More").click()
        grain = visit.page.get_by_label("Grain")
        await expect(grain).to_have_accessible_description("Film grain.")
        await grain.fill("0.5")
        await visit.page.get_by_label("Looped").select_option("true")
        async with visit.page.expect_request("**/generate") as sent:
            await visit.make()
        request = (await sent.value).post_data_json or {}
        assert {name: request[name] for name in new_fields} == {
            **{"motion": 5, "frame_rate": "30", "grain": 0.5, "looped": True}
        }
        await expect(visit.page.get_by_role("alert")).to_contain_text("unknown field")
