"""The GPUs of this machine and their free memory, read from NVML without a CUDA context."""

import pynvml

from contract.worker import Gpu


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


def _gpu(index: int) -> Gpu:
    device = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(device)
    return Gpu(name=pynvml.nvmlDeviceGetName(device), memory_total=memory.total, memory_free=memory.free)
