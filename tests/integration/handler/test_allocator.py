"""PyTorch's allocators are set up before PyTorch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

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


def test_pytorch_accepts_the_configuration_and_the_operators_own_stays() -> None:
    assert configured() == CONFIGURATION
    assert configured(PYTORCH_ALLOC_CONF="expandable_segments:False") == "expandable_segments:False"
