"""The imports of a worker's start are free of garbage collections."""

from __future__ import annotations

import gc

import pytest

from contract.imports import without_collections


def test_nothing_is_collected_in_the_block_and_what_it_made_is_left_out_afterwards() -> None:
    begun: list[str] = []

    def note(phase: str, _: object) -> None:
        begun.append(phase)

    gc.callbacks.append(note)
    try:
        with without_collections():
            made = [[index] for index in range(100_000)]
        seen, frozen = list(begun), gc.get_freeze_count()
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
    assert seen == []
    assert frozen > len(made)
    assert gc.isenabled()


def test_an_error_in_the_block_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), without_collections():
        raise ImportError("no such library")
    gc.unfreeze()
    assert gc.isenabled()
