"""A directory with several checkpoints decides which models are offered; they share text encoders and VAE."""

from __future__ import annotations

import logging
import shutil
from itertools import islice
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline
from PIL import Image
from pydantic import ValidationError

from benchmarks import random_model
from contract.errors import ErrorCode
from contract.job import JobInput, Profile, Resolution
from contract.result import Stage
from handler.settings import Approximation, WorkerSettings
from handler.video_model import loader
from handler.video_model.approximations import Fp8Linear, approximate
from handler.video_model.attention import NATIVE
from handler.video_model.base import Frames, ModelLoadError, ModelOutOfMemoryError, RenderCancelledError
from handler.video_model.catalog import ROUTES
from handler.video_model.checkpoints import read_checkpoints
from handler.video_model.cost import GPUS, Speed
from handler.video_model.generate import PipelineModel
from handler.video_model.loader import load_model
from handler.video_model.memory import SMALLEST, Budget, Part, Placement, PlacementPlan, Weights
from handler.video_model.placement import _placements, bytes_of, place_all
from handler.worker import Job, JobError, Worker
from storage.bucket import Bucket
from tests.support.queues import NOWHERE
from tests.support.small_models import (
    image_family,
    image_pipeline,
    single,
    sr_transformer,
    upsampler_720p,
    upsampler_1080p,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small checkpoints of the balanced profile in the published layout, and the transformer of the fast one."""
    directory = tmp_path_factory.mktemp("weights")
    pipeline = random_model.build_pipeline()
    pipeline.save_pretrained(directory / "HunyuanVideo-1.5-Diffusers-480p_t2v_distilled")
    pipeline.transformer.save_pretrained(directory / "480p_t2v_4step" / "transformer")
    for name, upsampler in (("720p", upsampler_720p()), ("1080p", upsampler_1080p())):
        sr_transformer().save_pretrained(directory / f"{name}_sr_distilled" / "transformer")
        upsampler.save_pretrained(directory / f"{name}_sr_distilled" / "upsampler")
    (directory / "notes").mkdir()
    return directory


def load(directory: Path, profile: Profile | None = None) -> PipelineModel:
    model = load_model(WorkerSettings(model_path=str(directory), profile=profile))
    assert isinstance(model, PipelineModel)
    return model


def test_the_checkpoints_present_decide_what_is_offered_and_the_fastest_is_the_default(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="handler")
    model = load(weights)
    assert model.models == ["HunyuanVideo-1.5", *(f"HunyuanVideo-1.5-{name}" for name in ("turbo", "fast", "balanced"))]
    assert model.name == "HunyuanVideo-1.5-turbo"
    for resolution in Resolution:
        assert model.parts.routes["HunyuanVideo-1.5", resolution] == ROUTES[Profile.TURBO, resolution]
        assert model.parts.routes["HunyuanVideo-1.5-balanced", resolution] == ROUTES[Profile.BALANCED, resolution]
    assert model.caption(JobInput(prompt="A paper boat on a rainy street")) is None
    assert "profile quality: missing 720p_t2v" in caplog.text
    assert "download" in caplog.text


@pytest.mark.parametrize(
    ("profile", "setting", "asked"),
    [(None, None, None), (None, False, False), (Profile.FAST, None, False), (Profile.FAST, True, True)],
)
def test_profile_turbo_alone_takes_8_bit_attention_unasked(
    weights: Path, monkeypatch: pytest.MonkeyPatch, profile: Profile | None, setting: bool | None, asked: bool | None
) -> None:
    calls: list[bool | None] = []

    def choose(_: str, *, flash: bool, sage: bool | None) -> str:
        calls.append(sage)
        return NATIVE if flash else ""

    monkeypatch.setattr(loader, "choose_backend", choose)
    load_model(WorkerSettings(model_path=str(weights), profile=profile, enable_sage_attn=setting))
    assert calls == [asked]


def test_the_worker_knows_the_speed_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    h100 = GPUS["H100"]
    assert loader._speed(WorkerSettings(), "cuda", NATIVE) == Speed.of(h100)
    assert loader._speed(WorkerSettings(gpu_share=0.4), "cuda", "sage") == Speed.of(h100, share=0.4, eight_bit=True)
    assert loader._speed(WorkerSettings(), "cpu", NATIVE) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert loader._speed(WorkerSettings(), "cuda", NATIVE) is None


def test_a_profile_can_be_preferred_and_a_missing_one_is_named(weights: Path) -> None:
    model = load(weights, Profile.BALANCED)
    assert model.name == "HunyuanVideo-1.5-balanced"
    assert model.parts.routes["HunyuanVideo-1.5", Resolution.P720].base == "480p_t2v_distilled"
    with pytest.raises(ModelLoadError, match="HUNYUAN_PROFILE: quality lacks 720p_t2v"):
        load(weights, Profile.QUALITY)


def test_text_encoders_and_vae_are_loaded_once_and_each_base_has_its_own_settings(weights: Path) -> None:
    model = load(weights)
    fast, balanced = (model.parts.bases[name] for name in ("480p_t2v_4step", "480p_t2v_distilled"))
    for part in ("text_encoder", "text_encoder_2", "vae", "tokenizer"):
        assert getattr(fast.pipeline, part) is getattr(balanced.pipeline, part)
    assert fast.pipeline.transformer is not balanced.pipeline.transformer
    assert (fast.pipeline.scheduler.shift, balanced.pipeline.scheduler.shift) == (9.0, 5.0)
    assert (fast.pipeline.guider.guidance_scale, balanced.pipeline.guider.guidance_scale) == (1.0, 1.0)
    assert [
        model.parts.upscalers[name].stage.sampling.num_inference_steps for name in sorted(model.parts.upscalers)
    ] == [8, 6]


def test_image_weights_are_used_if_present(weights: Path, tmp_path: Path) -> None:
    """Only one of two profiles has its image-to-video base: both use it."""
    assert not load(weights).takes_images
    shutil.copytree(weights, tmp_path / "weights")
    image_pipeline().save_pretrained(tmp_path / "weights" / "480p_i2v_distilled")
    model = load(tmp_path / "weights")
    assert model.takes_images
    for name in ("HunyuanVideo-1.5-fast", "HunyuanVideo-1.5-balanced"):
        route = model.parts.image_routes[name, Resolution.P1080]
        assert route.checkpoints == ("480p_i2v_distilled", "720p_sr_distilled", "1080p_sr_distilled")
    base = model.parts.bases["480p_i2v_distilled"].pipeline
    assert isinstance(base, HunyuanVideo15ImageToVideoPipeline)
    assert base.text_encoder is model.parts.bases["480p_t2v_4step"].pipeline.text_encoder
    assert (base.scheduler.shift, base.vision_num_semantic_tokens) == (5.0, 729)


@pytest.mark.parametrize(
    ("model", "fields", "says"),
    [
        ("HunyuanVideo-1.5", {"guidance_scale": 6.0}, "guidance_scale must be 1 "),
        ("HunyuanVideo-1.5", {"num_inference_steps": 8}, "num_inference_steps must be 4 "),
        ("HunyuanVideo-1.5-balanced", {"num_inference_steps": 20}, "num_inference_steps must be 50 "),
    ],
)
def test_a_request_that_a_distilled_base_can_not_render_fails_before_the_render(
    weights: Path, model: str, fields: dict[str, float], says: str
) -> None:
    loaded = load(weights)
    told: list[object] = []
    job = Job("task-1", {"prompt": "A paper boat on a rainy street", "model": model, **fields})
    with pytest.raises(JobError, match=says) as caught:
        Worker(loaded, Bucket(NOWHERE), version="1").run(job, told.append, Event())
    assert caught.value.failure.error_code is ErrorCode.INVALID_REQUEST
    assert told == []


def test_what_the_checkpoints_fix_is_the_same_for_every_resolution(weights: Path) -> None:
    limits = {(limit.model, limit.from_image): limit for limit in load(weights).limits}
    assert len(limits) == len(load(weights).limits) == 4
    for model in ("HunyuanVideo-1.5", "HunyuanVideo-1.5-turbo", "HunyuanVideo-1.5-fast"):
        assert limits[model, False].num_inference_steps == 4
    assert limits["HunyuanVideo-1.5-balanced", False].num_inference_steps == 50
    assert {limit.guidance_scale for limit in limits.values()} == {1.0}


def test_the_vae_has_more_precise_numbers_than_the_transformers(weights: Path) -> None:
    """bfloat16 has 8 bits for a number and float16 11. The source decodes in float16."""
    one = weights / "HunyuanVideo-1.5-Diffusers-480p_t2v_distilled"
    for path in (weights, one):
        parts = read_checkpoints(WorkerSettings(model_path=str(path)), torch.bfloat16)
        assert parts.shared.vae.dtype is torch.float16
        assert {transformer.dtype for transformer in parts.transformers} == {torch.bfloat16}
        assert parts.shared.text_encoder.dtype is torch.bfloat16


def test_float16_decodes_closer_to_float32_than_bfloat16() -> None:
    latents = torch.randn(1, 8, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    decoded = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        vae = random_model.build_pipeline().vae.to(dtype)
        with torch.no_grad():
            decoded[dtype] = vae.decode(latents.to(dtype)).sample.float()
    errors = {dtype: float((video - decoded[torch.float32]).norm()) for dtype, video in decoded.items()}
    assert errors[torch.float16] < 0.3 * errors[torch.bfloat16]


def test_without_super_resolution_the_one_base_serves_alone(weights: Path, tmp_path: Path) -> None:
    name = "HunyuanVideo-1.5-Diffusers-480p_t2v_distilled"
    shutil.copytree(weights / name, tmp_path / name)
    model = load(tmp_path)
    assert model.models == ["HunyuanVideo-1.5"]
    assert model.name == name


def test_a_checkpoint_that_is_cut_short_is_named(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    (path,) = (tmp_path / "weights" / "1080p_sr_distilled" / "upsampler").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelLoadError, match="HUNYUAN_MODEL_PATH"):
        load(tmp_path / "weights")


@pytest.mark.full
def test_a_streamed_model_renders_what_a_resident_one_does() -> None:
    """A CPU has no device to stream to, but every hook runs."""
    job = JobInput(prompt="A paper boat on a rainy street", duration=5, resolution=Resolution.P720)
    image = Image.new("RGB", (112, 64), (200, 80, 20))
    videos = []
    for placement in Placement:
        model = image_family()
        place_all(_placements(model.parts, PlacementPlan(placement, placement, placement, 256)), torch.device("cpu"))
        chunks = model.render(job, seed=1, on_progress=lambda *_: None, cancelled=Event(), image=image)
        videos.append(np.concatenate(list(chunks)))
    resident, streamed = videos
    assert np.array_equal(resident, streamed)


def test_every_streamed_part_runs_through_its_own_forward_which_has_the_hooks() -> None:
    """diffusers' hook that copies the next layer ahead sits on the forward pass of the module that was given to it."""
    model = image_family()
    streamed = [
        module for module, placement, _ in _placements(model.parts, SMALLEST) if placement is Placement.STREAMED
    ]
    ran: set[torch.nn.Module] = set()
    for module in streamed:
        module.register_forward_pre_hook(lambda module, _: ran.add(module))
    job = JobInput(prompt='A shop sign that says "OPEN"', duration=5, resolution=Resolution.P720)
    image = Image.new("RGB", (112, 64), (200, 80, 20))
    chunks = model.render(job, seed=1, on_progress=lambda *_: None, cancelled=Event(), image=image)
    assert sum(len(chunk) for chunk in islice(chunks, 2)) == 5
    assert [type(module).__name__ for module in streamed if module not in ran] == []


class Meeting(torch.nn.Linear):
    """Moves only while the other one moves."""

    def __init__(self, barrier: Barrier) -> None:
        super().__init__(2, 2)
        self.barrier = barrier

    def _apply(self, fn: Any, recurse: bool = True) -> Meeting:
        self.barrier.wait(timeout=20)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def test_parts_are_read_and_placed_at_the_same_time() -> None:
    barrier = Barrier(2)
    modules = [Meeting(barrier), Meeting(barrier)]
    place_all([(module, Placement.RESIDENT, "leaf_level") for module in modules], torch.device("meta"))
    assert [module.weight.device.type for module in modules] == ["meta", "meta"]


def test_an_error_while_placing_a_part_is_raised() -> None:
    class Full(torch.nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Full:
            raise torch.OutOfMemoryError("CUDA out of memory")

    modules = [torch.nn.Linear(2, 2), Full(2, 2)]
    with pytest.raises(torch.OutOfMemoryError):
        place_all([(module, Placement.RESIDENT, "leaf_level") for module in modules], torch.device("cpu"))


def test_only_what_videos_from_text_use_is_loaded(weights: Path) -> None:
    """The model has no vision tower, no language model head and no VAE encoder, which only images need."""
    model = load(weights)
    for base in model.parts.bases.values():
        components = base.pipeline.components
        assert "image_encoder" not in components
        assert components["vae"].encoder is None
        assert type(components["text_encoder"]).__name__ == "Qwen2_5_VLTextModel"
        assert type(components["text_encoder_2"]).__name__ == "T5EncoderModel"
        for encoder in (components["text_encoder"], components["text_encoder_2"]):
            names = {part for name, _ in encoder.named_parameters() for part in name.split(".")}
            assert not names & {"lm_head", "visual", "vision_tower", "decoder"}
    pipelines = [base.pipeline for base in model.parts.bases.values()]
    for name in ("text_encoder", "text_encoder_2", "vae"):
        assert len({id(getattr(pipeline, name)) for pipeline in pipelines}) == 1, "one for all"


BOAT = JobInput(prompt="A paper boat on a rainy street", duration=5)


def latents(model: PipelineModel) -> torch.Tensor:
    return model._latents(BOAT, None, 1, lambda *_: None, Event())


def video(model: PipelineModel) -> Frames:
    return np.concatenate(list(model.render(BOAT, seed=1, on_progress=lambda *_: None, cancelled=Event())))


@pytest.fixture(scope="module")
def exact() -> Frames:
    return video(single(steps=4))


@pytest.mark.full
@pytest.mark.parametrize(
    "approximation", [Approximation.FP8_WEIGHTS, Approximation.FIRST_BLOCK_CACHE, Approximation.TAYLORSEER]
)
def test_an_approximation_changes_the_numbers_a_little_and_the_same_each_time(
    approximation: Approximation, exact: Frames
) -> None:
    model = single(steps=4)
    transformers = model.parts.transformers
    # With this threshold each step but the first reuses the output of the step before.
    approximate(transformers, {approximation}, many_steps=transformers, cache_threshold=10.0)
    first, second = latents(model), latents(model)
    assert torch.equal(first, second), "the second video starts from a clean cache"
    assert 0 < np.abs(exact.astype(int) - video(model)).mean() < 30


@pytest.mark.parametrize("cache", [Approximation.FIRST_BLOCK_CACHE, Approximation.TAYLORSEER])
def test_requested_approximations_are_applied_and_named(cache: Approximation, tmp_path: Path) -> None:
    checkpoint = tmp_path / "Tiny-480p_t2v"  # takes 50 steps, by its name
    random_model.build_pipeline().save_pretrained(checkpoint)
    model = load_model(WorkerSettings(model_path=str(checkpoint), approximations=(Approximation.FP8_WEIGHTS, cache)))
    assert isinstance(model, PipelineModel)
    assert tuple(model.approximations) == ("fp8-weights", cache)
    (base,) = model.parts.bases.values()
    assert base.pipeline.transformer.is_cache_enabled
    weight = base.pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    assert weight.dtype is torch.float8_e4m3fn


@pytest.mark.parametrize(("guidance_scale", "passes"), [(1.0, 1), (6.0, 2)])
def test_taylorseer_computes_the_first_steps_and_then_one_of_five_for_each_pass_of_a_step(
    guidance_scale: float, passes: int
) -> None:
    pipeline = random_model.build_pipeline()
    pipeline.guider = pipeline.guider.new(guidance_scale=guidance_scale)
    model = single(pipeline, steps=10)
    approximate([pipeline.transformer], {Approximation.TAYLORSEER}, many_steps=[pipeline.transformer])
    computed: list[int] = []
    pipeline.transformer.transformer_blocks[1].attn.to_q.register_forward_pre_hook(lambda *_: computed.append(1))
    cancelled = Event()

    def stop_in_between(stage: Stage, done: float) -> None:
        if done >= 0.5:
            cancelled.set()

    with pytest.raises(RenderCancelledError):
        list(model.render(BOAT, seed=1, on_progress=stop_in_between, cancelled=cancelled))
    computed.clear()
    latents(model)
    assert len(computed) == passes * len([0, 1, 2, 4, 9]), "and not where the cancelled one left off"


def test_steps_are_cached_only_where_there_are_many(weights: Path) -> None:
    settings = WorkerSettings(model_path=str(weights), approximations=(Approximation.TAYLORSEER,))
    model = load_model(settings)
    assert isinstance(model, PipelineModel)
    cached = {name: base.pipeline.transformer.is_cache_enabled for name, base in model.parts.bases.items()}
    assert cached == {"480p_t2v_4step": False, "480p_t2v_distilled": True}


def test_magcache_applies_to_the_undistilled_image_base_and_to_nothing_else(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    image_pipeline().save_pretrained(tmp_path / "weights" / "480p_i2v")
    with caplog.at_level(logging.WARNING, logger="handler"):
        model = load_model(
            WorkerSettings(model_path=str(tmp_path / "weights"), approximations=(Approximation.MAGCACHE,))
        )
    assert isinstance(model, PipelineModel)
    assert model.parts.image_routes["HunyuanVideo-1.5-balanced", Resolution.P720].base == "480p_i2v"
    assert list(model.approximations) == ["magcache"]
    assert "every step of 480p_t2v_4step, 480p_t2v_distilled is computed" in caplog.text
    hooked = {name: _hooks(base.pipeline.transformer) for name, base in model.parts.bases.items()}
    assert [name for name, hooks in hooked.items() if hooks] == ["480p_i2v"]


@pytest.mark.parametrize("other", [Approximation.TAYLORSEER, Approximation.MAGCACHE, Approximation.TEACACHE])
def test_the_step_caches_exclude_each_other(other: Approximation) -> None:
    with pytest.raises(ValidationError, match="name one of them"):
        WorkerSettings(approximations=(Approximation.FIRST_BLOCK_CACHE, other))


def test_weights_in_8_bits_take_half_and_err_by_little() -> None:
    """The weights are as small as a transformer's: without scales, most of them round to zero."""
    linear = torch.nn.Linear(512, 2048, dtype=torch.bfloat16)
    torch.nn.init.normal_(linear.weight, std=0.002)
    x = torch.randn(4, 512, dtype=torch.bfloat16)
    quantised = Fp8Linear(linear)
    with torch.no_grad():
        exact, ours = linear(x) - linear.bias, quantised(x) - linear.bias
        unscaled = torch.nn.functional.linear(x, linear.weight.to(torch.float8_e4m3fn).to(x.dtype))
    assert sum(p.numel() * p.element_size() for p in quantised.parameters()) < 0.51 * 2 * linear.weight.numel()
    assert (ours - exact).norm() < 0.04 * exact.norm()
    assert (unscaled - exact).norm() > 4 * (ours - exact).norm()


def test_the_planner_counts_what_8_bits_leave() -> None:
    whole, half = (
        random_model.build_pipeline().transformer.bfloat16(),
        random_model.build_pipeline().transformer.bfloat16(),
    )
    approximate([half], {Approximation.FP8_WEIGHTS})
    small, large = (bytes_of(transformer.transformer_blocks) for transformer in (half, whole))
    assert small < 0.6 * large, "the blocks of this small model have many biases and scales for their size"


def test_approximations_are_read_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUNYUAN_APPROXIMATIONS", "fp8-weights, first-block-cache")
    assert WorkerSettings().approximations == (Approximation.FP8_WEIGHTS, Approximation.FIRST_BLOCK_CACHE)
    monkeypatch.setenv("HUNYUAN_APPROXIMATIONS", "faster")
    with pytest.raises(ValidationError, match="HUNYUAN_APPROXIMATIONS"):
        WorkerSettings()


def test_a_job_that_can_not_fit_fails_at_once() -> None:
    weights = Weights(text_encoders=Part(1), transformers=Part(1), vae_decoder=Part(1))
    model = PipelineModel(single().parts, memory=Budget(10**9, weights, SMALLEST))
    told: list[object] = []
    job = JobInput(prompt="A paper boat on a rainy street", duration=10)
    with pytest.raises(ModelOutOfMemoryError, match="GB of GPU memory"):
        list(model.render(job, seed=1, on_progress=lambda *seen: told.append(seen), cancelled=Event()))
    assert told == [], "before anything was rendered"


def _hooks(transformer: torch.nn.Module) -> list[str]:
    """Of the transformer and its blocks. A registry alone says nothing: `cache_context` makes one, too."""
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    return [name for registry in registries if registry is not None for name in registry.hooks]
