"""`make picture`: docs/page.png, the page of a server with the demo model, one video completed and one running."""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.async_api import expect

from tests.support.browser import CHROMIUM, HOW_TO_GET_IT, chromium
from tests.support.service import RENDER_SECONDS, running_service

PROMPTS = (
    "A red fish swims to the right over the sea",
    "A yellow star spins in the starry night sky",
)
SIZE = (1280, 900)


async def take_picture(address: str, to: Path) -> None:
    width, height = SIZE
    async with chromium() as browser:
        page = await browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        await page.goto(address)
        for prompt in PROMPTS:
            await page.get_by_label("Prompt", exact=True).fill(prompt)
            await page.get_by_role("button", name="Make video").click()
            await expect(page.locator(".card", has_text=prompt)).to_be_visible()
        player = page.locator(".card", has_text=PROMPTS[0]).locator("video")
        await expect(player).to_have_js_property("readyState", 4, timeout=RENDER_SECONDS * 1000)
        bar = page.locator(".card", has_text=PROMPTS[1]).get_by_role("progressbar")
        await page.wait_for_function("bar => bar.value >= 40", arg=await bar.element_handle(), polling=50)
        await page.mouse.move(0, 0)
        await page.evaluate("scrollTo(0, 0)")
        picture = await page.screenshot(full_page=True)
    Image.open(io.BytesIO(picture)).convert("RGB").save(to, optimize=True)  # the same pixels in fewer bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("to", type=Path)
    to = parser.parse_args().to
    if CHROMIUM is None:
        sys.exit(HOW_TO_GET_IT)
    with tempfile.TemporaryDirectory() as directory, running_service(Path(directory)) as service:
        asyncio.run(take_picture(service.address, to))


if __name__ == "__main__":
    main()
