"""Which GPUs `hunyuan serve` gives to each of its workers."""

from __future__ import annotations

import pytest

from contract.worker import Gpu
from shim.host import local_worker
from shim.host.local_worker import model_environment
from shim.settings import ShimSettings


@pytest.mark.parametrize(
    ("workers", "gpus_per_job", "gpus", "expected"),
    [
        (1, 1, 4, [None]),  # it takes the first
        (1, 2, 4, [None]),
        (2, 1, 1, [None, None]),  # they share it
        (3, 1, 2, ["0", "1", "0"]),
        (2, 2, 4, ["0,1", "2,3"]),
    ],
)
def test_several_workers_share_the_gpus_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, workers: int, gpus_per_job: int, gpus: int, expected: list[str | None]
) -> None:
    monkeypatch.setattr(local_worker, "local_gpus", lambda: [Gpu(name="H100", memory_total=1, memory_free=1)] * gpus)
    settings = ShimSettings(workers=workers, gpus_per_job=gpus_per_job)
    given = [model_environment(settings, index).get("CUDA_VISIBLE_DEVICES") for index in range(workers)]
    assert given == expected
