"""`make picture`: docs/demo.png, frames of the demo model, and docs/page.png, the page of a server with it.

The page has one video completed and one running.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.async_api import expect

from tests.support.browser import CHROMIUM, HOW_TO_GET_IT, chromium
from tests.support.mp4 import decoded
from tests.support.service import RENDER_SECONDS, Service, running_service

PROMPTS = (
    "A red heart moves to the right over the sea",
    "A yellow star rises slowly in the night sky",
)
SIZE = (1280, 900)
FRAMES = (*PROMPTS, "A large blue ring moves to the left over the desert")
SEED = 3


def take_frames(service: Service, to: Path) -> None:
    """A frame of the middle of each of three videos, with its prompt below."""
    width, height, text, gap = 426, 240, 30, 8
    picture = Image.new("RGB", (3 * width + 2 * gap, height + text), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for index, prompt in enumerate(FRAMES):
        task = service.generate(prompt=prompt, seed=SEED)
        assert service.finished(task)["status"] == "completed"
        video = service.directory / f"{index}.mp4"
        video.write_bytes(service.http.get(f"/videos/{task}.mp4", follow_redirects=True).content)
        frames = decoded(video, width, height)
        left = index * (width + gap)
        picture.paste(Image.fromarray(frames[len(frames) // 2]), (left, 0))
        draw.text((left, height + 6), prompt, fill="black", font=font)
    picture.save(to, optimize=True)


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
    parser.add_argument("directory", type=Path)
    docs = parser.parse_args().directory
    if CHROMIUM is None:
        sys.exit(HOW_TO_GET_IT)
    with tempfile.TemporaryDirectory() as directory, running_service(Path(directory)) as service:
        take_frames(service, docs / "demo.png")
        asyncio.run(take_picture(service.address, docs / "page.png"))


if __name__ == "__main__":
    main()
