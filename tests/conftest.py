"""Fixtures every room's tests share."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run beside each other already: torch with a thread for each core would only get in its own way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
