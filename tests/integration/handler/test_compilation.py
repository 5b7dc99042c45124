"""Compiled blocks give the same numbers, one compilation serves all sizes, and a compiler is not required."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from diffusers import HunyuanVideo15Transformer3DModel
from torch._dynamo.utils import counters

from benchmarks import random_model
from contract.job import JobInput
from handler.settings import Approximation, WorkerSettings
from handler.video_model.approximations import approximate
from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.video_model.compilation import compile_blocks
from handler.video_model.loader import load_model
from handler.video_model.memory import Placement
from handler.video_model.placement import place
from tests.support.small_models import sr_transformer

#: Frames, height and width of latents: less than one chunk of tokens, several chunks, and exactly one.
SIZES = [(4, 5, 6), (7, 9, 16), (31, 9, 16), (5, 10, 10)]
CHUNK = 500
#: Several chunks, and more frames than a window of super-resolution.
LONG = (12, 7, 8)


def transformers() -> list[HunyuanVideo15Transformer3DModel]:
    """A base model and a super-resolution stage, with blocks of the same width."""
    made = [random_model.build_pipeline().transformer, sr_transformer()]
    for transformer in made:
        use_mask_free_attention(transformer, NATIVE, chunk=CHUNK)
    return made


def video(transformer: HunyuanVideo15Transformer3DModel, size: tuple[int, int, int], text: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(text)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    arguments: dict[str, Any] = {
        "hidden_states": noise(transformer.config.in_channels, *size),
        "timestep": torch.tensor([300.0]),
        "timestep_r": torch.tensor([200.0]) if transformer.config.use_meanflow else None,
        "encoder_hidden_states": noise(text + 4, 32),
        "encoder_attention_mask": (torch.arange(text + 4) < text)[None],
        "encoder_hidden_states_2": noise(20, 16),
        "encoder_attention_mask_2": torch.zeros(1, 20),
        "image_embeds": torch.zeros(1, 0, 16),
    }
    with torch.no_grad(), transformer.cache_context("test"):
        result: torch.Tensor = transformer(**arguments).sample
    return result


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # PyTorch's own use of it
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_compute_the_same_at_every_size_and_are_kept_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    """`aot_eager` makes the same graphs for the same sizes; only inductor compiles them to kernels, for a minute."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # `compile_blocks` sets it; this restores it after the test
    made = transformers()
    with torch._inductor.config.patch(compile_threads=1):  # without a pool of processes that import torch
        assert compile_blocks(made, tmp_path, backend)
    assert any((tmp_path / "torchinductor").rglob("*.so")) is (backend == "inductor")
    assert "HUNYUAN_COMPILE" not in caplog.text
    assert counters["stats"]["unique_graphs"] == 4, "before and after attention, for latent and for text tokens"
    for transformer, plain in zip(made, transformers(), strict=True):
        for text, size in enumerate(SIZES, start=6):
            with torch.compiler.set_stance("fail_on_recompile"):
                compiled = video(transformer, size, text)
            assert torch.allclose(compiled, video(plain, size, text), atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.full
@pytest.mark.parametrize("approximation", Approximation)
def test_compilation_works_with_each_approximation(approximation: Approximation) -> None:
    results = []
    for compiled in (False, True):
        base, upscaler = transformers()
        approximate(
            [base, upscaler], {approximation}, many_steps=[base], bases={"480p_i2v": base}, upscalers=[upscaler]
        )
        if compiled:
            assert compile_blocks([base, upscaler], backend="aot_eager")
        with torch.compiler.set_stance("fail_on_recompile"):
            results.append([video(each, size, 9) for each in (base, upscaler) for size in [LONG] * 5])
    for plain, compiled_one in zip(*results, strict=True):
        assert torch.allclose(plain, compiled_one, atol=1e-5)


@pytest.mark.full
def test_compilation_works_with_streamed_blocks() -> None:
    (base, _), (plain, _) = transformers(), transformers()
    place(base, Placement.STREAMED, "block_level", torch.device("cpu"))
    assert compile_blocks([base], backend="aot_eager")
    assert torch.allclose(video(base, SIZES[1], 9), video(plain, SIZES[1], 9), atol=1e-5)


def test_on_a_cpu_nothing_is_compiled_unless_asked_for() -> None:
    assert set(load_model(WorkerSettings(model_path="demo")).load_seconds) == {
        "checkpoints",
        "placement",
        "warm-up",
    }
    assert counters["stats"]["unique_graphs"] == 0


#: Runs in its own process, because PyTorch looks for a compiler and for its cache only once.
SCRIPT = """
import json, logging, threading
from contract.job import (JobInput)
from handler.settings import WorkerSettings
from handler.video_model.loader import load_model

logging.basicConfig(format="%(levelname)s %(message)s")
model = load_model(WorkerSettings(model_path="demo"))
job = JobInput.model_validate_json({job!r})
chunks = model.render(job, seed=1, on_progress=lambda *_: None, cancelled=threading.Event())
print(json.dumps({{"frames": sum(len(chunk) for chunk in chunks), "seconds": dict(model.load_seconds)}}))
"""


@pytest.mark.full
def test_without_a_compiler_the_worker_warns_once_and_renders(tmp_path: Path) -> None:
    job = JobInput(prompt="A paper boat", duration=5, num_inference_steps=1).model_dump_json()
    own = {"HUNYUAN_COMPILE": "true", "HUNYUAN_CACHE_DIR": str(tmp_path), "CXX": "/no/such/compiler"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")} | own
    script = SCRIPT.format(job=job)
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["frames"] == 121
    assert told["seconds"]["compilation"] > 0
    warnings = [line for line in run.stderr.splitlines() if line.startswith("WARNING HUNYUAN_COMPILE")]
    assert len(warnings) == 1, run.stderr
    assert (tmp_path / "torchinductor").is_dir(), "HUNYUAN_CACHE_DIR is used"
