"""PyTorch's memory allocators, threads and sockets, set up before PyTorch is imported, which reads these variables."""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Final

#: Segments that grow fragment less over videos of many sizes. Pinned blocks above 1 MB get their exact size: otherwise
#: PyTorch rounds each up to a power of two, and a streamed profile takes a third more host memory.
#: Source: https://docs.pytorch.org/docs/stable/notes/cuda.html (Optimizing memory usage).
CONFIGURATION: Final = "expandable_segments:True,pinned_max_round_threshold_mb:1"
_VARIABLE: Final = "PYTORCH_ALLOC_CONF"
#: The release that CONFIGURATION was checked with; an older one may stop at a key that it does not know.
_FROM: Final = (2, 13)


def configure_allocator() -> None:
    """Sets PYTORCH_ALLOC_CONF, unless the operator has set it. Call before the first import of torch."""
    try:
        release = tuple(int(number) for number in version("torch").split("+")[0].split(".")[:2])
    except PackageNotFoundError:
        return
    if release >= _FROM:
        os.environ.setdefault(_VARIABLE, CONFIGURATION)


def configure_threads() -> None:
    """Sets OMP_WAIT_POLICY, unless the operator has set it. Call before the first import of torch.

    A thread of OpenMP that waits for another one then sleeps. By default it spins for milliseconds: if other programs
    need the cores, the demo model's transformer takes seven times the CPU time.
    Source: https://gcc.gnu.org/onlinedocs/libgomp/OMP_005fWAIT_005fPOLICY.html.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def configure_sockets() -> None:
    """Makes the ranks of a render connect on the loopback interface only, unless the operator has set another one.

    Sources: https://docs.pytorch.org/docs/stable/distributed.html (GLOO_SOCKET_IFNAME),
    https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html (NCCL_SOCKET_IFNAME).
    """
    if sys.platform == "linux":
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
