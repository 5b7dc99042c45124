"""The host memory that a worker may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from handler import machine
from handler.machine import available_host_memory, first_lines


@pytest.mark.parametrize(
    ("written", "limit"), [("41000000000", 41_000_000_000), ("max", None), ("9223372036854771712", None), (None, None)]
)
def test_the_limit_of_the_control_group_counts_if_it_is_below_the_machines_memory(
    written: str | None, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "memory.max"
    if written is not None:
        file.write_text(f"{written}\n")
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (file,))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    counts = limit is not None and limit < memory
    assert available_host_memory() == (limit if counts else memory)
    stated = f"{limit / 1e9:.1f} GB" if limit is not None and counts else "none"
    assert next(first_lines()) == f"host memory {memory / 1e9:.1f} GB; limit of the container (cgroup) {stated}"


def test_the_owner_of_the_volume_is_named(tmp_path: Path) -> None:
    owner = f"belongs to user {os.geteuid()}, group {tmp_path.stat().st_gid}"
    assert list(first_lines(tmp_path))[1] == f"user {os.geteuid()} may write to {tmp_path}, which {owner}"
    absent = tmp_path / "volume"
    assert list(first_lines(absent))[1] == f"user {os.geteuid()}; there is no volume at {absent}"
