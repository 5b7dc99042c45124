"""The host memory that a worker may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from handler.video_model import placement
from handler.video_model.placement import available_host_memory, rounded_bytes_of


@pytest.mark.parametrize(
    ("written", "limit"), [("41000000000", 41_000_000_000), ("max", None), ("9223372036854771712", None), (None, None)]
)
def test_the_limit_of_the_control_group_counts_if_it_is_below_the_machines_memory(
    written: str | None, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "memory.max"
    if written is not None:
        file.write_text(f"{written}\n")
    monkeypatch.setattr(placement, "CGROUP_LIMITS", (file,))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_host_memory() == min(machine, limit or machine)


def test_pinned_blocks_are_rounded_to_powers_of_two() -> None:
    assert rounded_bytes_of(torch.nn.Linear(3, 5, bias=False)) == 64, "60 bytes"
