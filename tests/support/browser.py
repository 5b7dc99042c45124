"""Debian's Chromium, driven by playwright. It plays H.264; the Chromium that playwright itself offers does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, async_playwright, expect

CHROMIUM = shutil.which("chromium")
HOW_TO_GET_IT = "needs a browser: apt-get install --no-install-recommends chromium"
PROMPT = "A paper boat on a rainy street at night"
#: A name of this machine other than `localhost`: over http its origin is not a secure context.
PLAIN_HOST = "films.test"
#: ms until the page must show what a test expects.
PATIENCE = 15_000

expect.set_options(timeout=PATIENCE)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A headless browser."""
    arguments = [f"--host-resolver-rules=MAP {PLAIN_HOST} 127.0.0.1"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium cannot sandbox root
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            await browser.close()


@dataclass
class Visit:
    """A browser with one open page. Only what the test expects may be on its console."""

    context: BrowserContext
    page: Page
    #: Parts of the browser's own messages about error responses.
    expected: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)

    def hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.console.append(message.text)

    def unexpected(self) -> list[str]:
        return [text for text in self.console if not any(known in text for known in self.expected)]

    @property
    def prompt(self) -> Locator:
        return self.page.get_by_label("Prompt", exact=True)

    @property
    def card(self) -> Locator:
        """The newest card."""
        return self.page.locator(".card").first

    async def click(self, name: str) -> None:
        await self.page.get_by_role("button", name=name, exact=True).first.click()

    async def choose(self, name: str) -> None:
        """Clicks an option of the newest card."""
        if await self.card.locator("details").get_attribute("open") is None:
            await self.card.get_by_text("Options").click()
        await self.card.get_by_role("button", name=name, exact=True).click()

    async def make(self, prompt: str = PROMPT) -> None:
        await self.prompt.fill(prompt)
        await self.click("Make video")


@asynccontextmanager
async def visiting(browser: Browser, address: str, **options: Any) -> AsyncIterator[Visit]:
    """Fails at the end if the console has errors or warnings, including violations of the content policy."""
    context = await browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    visit = Visit(context, await context.new_page())
    context.on("console", visit.hear)
    context.on("weberror", lambda error: visit.console.append(str(error.error)))
    await visit.page.goto(address)
    yield visit
    await context.close()
    assert visit.unexpected() == []
