"""The GPUs of this machine and their free memory, read from NVML without a CUDA context."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

import pynvml

from contract.worker import Gpu

#: Seconds for which figures count as current.
_CURRENT: Final = 1.0
#: Seconds that a caller waits for new figures. A driver that hangs must not make a health check hang.
_WAIT: Final = 0.5


def local_gpus() -> list[Gpu]:
    """Every GPU that NVML lists, with its memory now; empty if there is no driver.

    Source: NVML API reference, nvmlDeviceGetMemoryInfo.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


class LocalGpus:
    """The GPUs for callers that ask often: `read_gpus` runs at most once a second, in one thread."""

    def __init__(self, read_gpus: Callable[[], list[Gpu]] = local_gpus) -> None:
        self._read_gpus = read_gpus
        self._gpus: list[Gpu] = []
        self._read_at = float("-inf")
        self._reading: asyncio.Task[list[Gpu]] | None = None

    async def read(self) -> list[Gpu]:
        """The GPUs and their memory a second ago at most; the figures before, while the driver does not answer."""
        if time.monotonic() - self._read_at >= _CURRENT:
            if self._reading is None:
                self._reading = asyncio.create_task(asyncio.to_thread(self._read_gpus))
                self._reading.add_done_callback(self._store)
            await asyncio.wait([self._reading], timeout=_WAIT)
        return self._gpus

    def _store(self, reading: asyncio.Task[list[Gpu]]) -> None:
        self._reading = None
        if not reading.cancelled():
            self._gpus, self._read_at = reading.result(), time.monotonic()


def _gpu(index: int) -> Gpu:
    device = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(device)
    return Gpu(name=pynvml.nvmlDeviceGetName(device), memory_total=memory.total, memory_free=memory.free)
