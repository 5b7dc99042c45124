"""MagCache and TeaCache skip the steps that their published numbers say, and add the last computed change."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideo15Pipeline

from benchmarks import random_model
from contract.job import JobInput
from contract.result import Stage
from handler.settings import Approximation, WorkerSettings
from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.video_model.base import RenderCancelledError
from handler.video_model.catalog import CHECKPOINTS, Checkpoint, Sampling
from handler.video_model.checkpoints import single_parts
from handler.video_model.generate import PipelineModel
from handler.video_model.loader import load_model
from handler.video_model.step_cache import MAGCACHE, TEACACHE, MagCache, Rule, TeaCache, cache_steps

JOB = JobInput(prompt="A paper boat on a rainy street", duration=5)


def model(rule: Rule | None, steps: int, guidance_scale: float = 6.0) -> tuple[PipelineModel, HunyuanVideo15Pipeline]:
    """The demo model at 56x32, and its pipeline."""
    pipeline = random_model.build_pipeline()
    use_mask_free_attention(pipeline.transformer, NATIVE)
    if rule is not None:
        cache_steps(pipeline.transformer, rule)
    sampling = Sampling(steps, shift=5.0, guidance_scale=guidance_scale)
    return PipelineModel(single_parts(Checkpoint("demo", 48, sampling), pipeline)), pipeline


def latents(rendering: PipelineModel) -> torch.Tensor:
    return rendering._latents(JOB, None, 7, lambda *_: None, Event())


def computed_passes(pipeline: HunyuanVideo15Pipeline) -> list[int]:
    """Grows by the number of each pass whose second block is computed."""
    computed: list[int] = []
    passes: list[int] = []

    def began(*_: Any) -> None:
        passes.append(1)

    pipeline.transformer.register_forward_pre_hook(began)
    pipeline.transformer.transformer_blocks[1].attn.to_q.register_forward_pre_hook(
        lambda *_: computed.append(len(passes) - 1)
    )
    return computed


def magcache_steps(ratios: np.ndarray[Any, Any], threshold: float, longest: int, kept: int) -> list[int]:
    """The steps that MagCache computes, in a plain transcript of its method."""
    computed = []
    product, error, skipped = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        if step >= kept:
            product, skipped = product * ratio, skipped + 1
            error += abs(1 - product)
            if error < threshold and skipped <= longest:
                continue
            product, error, skipped = 1.0, 0.0, 0
        computed.append(step)
    return computed


def test_magcache_computes_the_steps_that_the_published_ratios_say() -> None:
    rule = MAGCACHE["480p_i2v"]
    assert isinstance(rule, MagCache)
    expected = [
        sorted(2 * step + negative for step in magcache_steps(np.array(rule.ratios[negative]), 0.24, 6, 10))
        for negative in (0, 1)
    ]
    rendering, pipeline = model(rule, steps=50)
    computed = computed_passes(pipeline)
    latents(rendering)
    assert computed == sorted(expected[0] + expected[1])
    assert len(computed) == 2 * 17, "of 2 x 50 passes"


def test_with_other_steps_magcache_takes_the_nearest_ratios() -> None:
    rule = MAGCACHE["480p_i2v"]
    assert isinstance(rule, MagCache)
    nearest = np.array(rule.ratios[0])[[round(step * 49 / 19) for step in range(20)]]
    rendering, pipeline = model(rule, steps=20, guidance_scale=1.0)
    computed = computed_passes(pipeline)
    latents(rendering)
    assert computed == magcache_steps(nearest, 0.24, 6, 4)


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_teacache_computes_a_step_when_its_polynomial_has_added_up(guidance_scale: float) -> None:
    """A plain transcript of its method over the inputs of the first block, for each kind of pass alone."""
    rule = TeaCache((2.0, 1.0, 0.01), threshold=0.5)
    kinds, steps = (2 if guidance_scale > 1 else 1), 12
    rendering, pipeline = model(rule, steps, guidance_scale)
    block: Any = pipeline.transformer.transformer_blocks[0]
    inputs: list[torch.Tensor] = []

    def note(_: torch.nn.Module, given: tuple[Any, ...]) -> None:
        inputs.append(block.norm1(given[0], emb=given[2])[0])

    block.register_forward_pre_hook(note)
    computed = computed_passes(pipeline)
    latents(rendering)
    expected = []
    for kind in range(kinds):
        error, seen = 0.0, inputs[kind::kinds]
        for step in range(steps):
            if 0 < step < steps - 1:
                distance = float((seen[step] - seen[step - 1]).abs().mean() / seen[step - 1].abs().mean())
                error += 2 * distance**2 + distance + 0.01
                if error < 0.5:
                    continue
            error = 0.0
            expected.append(kinds * step + kind)
    assert computed == sorted(expected)
    assert kinds * 2 < len(computed) < kinds * steps, "some steps are skipped"


def test_a_skipped_step_adds_the_change_of_the_last_computed_one() -> None:
    """Compares with a loop that holds the tokens' change in its own hands."""
    rule = MagCache(([1.0] * 50, [1.0] * 50), threshold=1.0, longest=1, kept=0.0)  # every other step
    rendering, _ = model(rule, steps=4, guidance_scale=1.0)
    found = latents(rendering)

    plain, pipeline = model(None, steps=4, guidance_scale=1.0)
    blocks = pipeline.transformer.transformer_blocks
    forwards = [block.forward for block in blocks]
    kept: dict[str, Any] = {"step": 0}

    def all_blocks(states: torch.Tensor, text: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        before = states
        if kept["step"] % 2 == 0:
            for forward in forwards:
                states, text = forward(states, text, *rest)
            kept["change"] = states - before
        kept["step"] += 1
        return before + kept["change"], text

    blocks[0].forward = all_blocks
    for block in blocks[1:]:
        block.forward = lambda states, text, *_: (states, text)
    assert torch.allclose(found, latents(plain), atol=1e-5)
    assert kept["step"] == 4


def test_a_rule_that_never_skips_is_exact_and_each_video_starts_anew() -> None:
    exact = latents(model(None, steps=6)[0])
    assert torch.equal(latents(model(TeaCache((0.0, 1.0), threshold=0.5), steps=6)[0]), exact)

    rendering, pipeline = model(MAGCACHE["480p_i2v"], steps=10)
    first = latents(rendering)
    cancelled = Event()

    def stop(stage: Stage, done: float) -> None:
        if stage is Stage.DENOISING and done >= 0.5:
            cancelled.set()

    with pytest.raises(RenderCancelledError):
        list(rendering.render(JOB, seed=7, on_progress=stop, cancelled=cancelled))
    computed = computed_passes(pipeline)
    assert torch.equal(latents(rendering), first)
    assert computed[:2] == [0, 1], "nothing is left of the cancelled video"


def test_published_numbers_are_for_checkpoints_that_are_not_distilled() -> None:
    for published in (MAGCACHE, TEACACHE):
        for name in published:
            assert CHECKPOINTS[name].sampling.num_inference_steps == 50
            assert not CHECKPOINTS[name].sampling.fixed
    rule = MAGCACHE["480p_i2v"]
    assert isinstance(rule, MagCache)
    assert [len(ratios) for ratios in rule.ratios] == [50, 50]


@pytest.mark.parametrize(
    ("name", "cache", "in_use"),
    [
        ("Tiny-480p_t2v", Approximation.TEACACHE, True),
        ("Tiny-480p_t2v", Approximation.MAGCACHE, False),
        ("Tiny-480p_t2v_distilled", Approximation.TEACACHE, False),
    ],
)
def test_a_cache_without_published_numbers_is_logged_and_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, cache: Approximation, in_use: bool
) -> None:
    random_model.build_pipeline().save_pretrained(tmp_path / name)
    with caplog.at_level(logging.WARNING, logger="handler"):
        loaded = load_model(WorkerSettings(model_path=str(tmp_path / name), approximations=(cache,)))
    assert list(loaded.approximations) == ([cache] if in_use else [])
    assert (f"HUNYUAN_APPROXIMATIONS: {cache} has published numbers for" in caplog.text) is not in_use
