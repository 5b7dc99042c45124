"""Debian's Chromium, driven by playwright. It plays H.264; the Chromium that playwright itself offers does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, async_playwright, expect

CHROMIUM = shutil.which("chromium")
HOW_TO_GET_IT = "needs a browser: apt-get install --no-install-recommends chromium"
#: A name of this machine that is no `localhost` to the browser: over http its origin is not a secure context.
PLAIN_HOST = "films.test"
#: ms that a page gets to show what it must.
PATIENCE = 15_000

expect.set_options(timeout=PATIENCE)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """The browser, with no window."""
    arguments = [f"--host-resolver-rules=MAP {PLAIN_HOST} 127.0.0.1"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium has none for root
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            await browser.close()
