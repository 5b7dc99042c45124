"""The API's documentation at /docs in a real browser: Swagger UI from this server, under a strict content policy."""

from __future__ import annotations

from pathlib import Path

from playwright.async_api import Browser, Request, expect

from shim.access import Access, parse_api_keys
from shim.app import create_app
from storage.bucket import Bucket
from tests.support.browser import visiting
from tests.support.http_server import serving
from tests.support.queues import NOWHERE, sql_bench

KEY = "alices-key-0123456789"


async def test_a_reader_without_the_internet_reads_and_tries_the_api(tmp_path: Path, browser: Browser) -> None:
    """`visiting` fails for what the policy blocks. A request to another host would be in `hosts`."""
    hosts = set()

    def note(request: Request) -> None:
        if not request.url.startswith(("data:", "blob:")):
            hosts.add(request.url.split("/")[2])

    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench:
        await bench.worker()
        app = create_app(bench.queue, Bucket(NOWHERE), access=Access(parse_api_keys(KEY)))
        async with serving(app) as address, visiting(browser, "about:blank") as visit:
            visit.page.on("request", note)
            await visit.page.goto(f"{address}/docs")
            page = visit.page
            await page.get_by_role("button", name="Authorize").click()
            await page.get_by_label("auth-bearer-value").fill(KEY)
            await page.get_by_role("button", name="Apply credentials").first.click()
            await page.get_by_role("button", name="Close").first.click()
            await page.get_by_role("button", name="POST /generate", exact=False).first.click()
            await page.get_by_role("button", name="Try it out").click()
            body = page.locator("textarea.body-param__text")
            await body.fill('{"prompt": "A paper boat on a rainy street"}')
            await page.get_by_role("button", name="Execute").click()
            await expect(page.locator(".live-responses-table .response-col_status").last).to_contain_text("202")
            assert hosts == {address.removeprefix("http://")}
            assert (await bench.queue.summary()).waiting == 1
