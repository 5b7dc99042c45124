"""The GPU benchmark runs end to end with small models on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import main


@pytest.mark.full
def test_the_benchmark_measures_passes_stages_and_the_stock_pipeline(tmp_path: Path) -> None:
    wanted = ("--profiles", "fast", "--resolutions", "1080p", "--durations", "5", "--steps", "1")
    main(["--tiny", "--stock", *wanted, "--output", str(tmp_path)])
    (result,) = tmp_path.glob("*-tiny-*.json")
    measured = json.loads(result.read_text())
    assert measured["matmul_tflops"] > 0
    (cell,) = measured["cells"]
    assert cell["problem"] == ""
    assert (cell["profile"], cell["resolution"], cell["duration"]) == ("fast", "1080p", 5)
    assert [(each["width"], each["height"]) for each in cell["passes"]] == [(40, 24), (56, 32), (88, 48)]
    for each in cell["passes"]:
        assert each["seconds"] > 0
        assert each["stock_seconds"] > 0
        assert each["share_of_peak"] == pytest.approx(each["tflops"] / measured["matmul_tflops"])
    assert not cell["compiled"], "a CPU compiles nothing"
    assert set(cell["stages"]) == {"encoding_prompt", "denoising", "upscaling", "decoding"}
    assert cell["steps_timed"] == "1 of 4"
    assert "| fast | 1080p 5 s |" in next(tmp_path.glob("*.md")).read_text()


def test_a_dry_run_counts_at_the_real_size_and_computes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dry-run", "--profiles", "fast", "--resolutions", "720p", "--durations", "5"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| fast | 720p 5 s |")]
    counted, planned, operations = (float(cell) for cell in row.split("|")[3:6])
    assert 0 < counted <= planned
    assert operations > 0.13, "a block at 480p and one at 720p"


def test_without_a_gpu_the_benchmark_names_the_tiny_option() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--tiny"):
            main([])
