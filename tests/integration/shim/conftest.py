"""The browser of the tests that look at pages."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser

from tests.support.browser import CHROMIUM, HOW_TO_GET_IT, chromium


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(HOW_TO_GET_IT)
    async with chromium() as made:
        yield made
