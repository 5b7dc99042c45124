"""GPU figures for health checks: read rarely, and never waited for long."""

from __future__ import annotations

import asyncio
import threading
import time

from contract.worker import Gpu
from shim.api.gpu import LocalGpus

GPU = Gpu(name="H100", memory_total=80, memory_free=40)


async def test_many_callers_at_once_cost_one_read_and_the_figures_last_a_second() -> None:
    reads: list[float] = []

    def read() -> list[Gpu]:
        reads.append(time.monotonic())
        return [GPU]

    gpus = LocalGpus(read)
    assert await asyncio.gather(*(gpus.read() for _ in range(20))) == [[GPU]] * 20
    assert len(reads) == 1
    deadline = time.monotonic() + 10
    while len(reads) == 1 and time.monotonic() < deadline:
        await gpus.read()
        await asyncio.sleep(0.02)
    assert reads[1] - reads[0] >= 1


async def test_a_driver_that_hangs_delays_a_caller_by_half_a_second() -> None:
    answer = threading.Event()

    def read() -> list[Gpu]:
        answer.wait(30)
        return [GPU]

    gpus = LocalGpus(read)
    try:
        asked = time.monotonic()
        assert await gpus.read() == []
        assert time.monotonic() - asked < 5
    finally:
        answer.set()
    deadline = time.monotonic() + 10
    while await gpus.read() == []:
        assert time.monotonic() < deadline
