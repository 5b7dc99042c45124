"""PyTorch's allocators and threads are set up before PyTorch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from handler.allocator import CONFIGURATION

SCRIPT = """
import os, sys
from handler.allocator import configure_allocator
configure_allocator()
assert "torch" not in sys.modules
import torch
print(os.environ["PYTORCH_ALLOC_CONF"])
"""


def configured(**environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


@pytest.mark.full
def test_pytorch_accepts_the_configuration_and_the_operators_own_stays() -> None:
    assert configured() == CONFIGURATION
    assert configured(PYTORCH_ALLOC_CONF="expandable_segments:False") == "expandable_segments:False"


THREADS = """
import ctypes, sys
from handler.allocator import configure_threads
configure_threads()
ctypes.CDLL(sys.argv[1])
"""


@pytest.mark.parametrize(("operators", "sleeps"), [({}, True), ({"OMP_WAIT_POLICY": "ACTIVE"}, False)])
def test_openmps_threads_sleep_while_they_wait_unless_the_operator_wants_otherwise(
    operators: dict[str, str], *, sleeps: bool
) -> None:
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    (openmp,) = Path(torch.origin).parent.glob("lib/libgomp*")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    run = subprocess.run(
        [sys.executable, "-c", THREADS, str(openmp)],
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE", **operators},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("GOMP_SPINCOUNT = '0'" in run.stderr) is sleeps
