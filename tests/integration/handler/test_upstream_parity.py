"""Numbers of the source that the model must keep: sizes, schedules, precision, prompts, the image condition.

The source is https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5 at commit 60783e7, whose code cannot be copied. Each
test compares with a second, straight-line implementation, with diffusers' stock class, or with values that the source's
own code gave.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5.image_processor import generate_crop_size_list
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts
from PIL import Image

from benchmarks import random_model
from contract.job import AspectRatio, JobInput, Resolution
from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.video_model.catalog import CHECKPOINTS, Checkpoint, Route, Sampling, trained_size
from handler.video_model.checkpoints import single_parts
from handler.video_model.generate import PipelineModel
from handler.video_model.parts import Base, Parts
from tests.support.small_models import image_pipeline

PROMPT = "A paper boat on a rainy street"
IMAGE_URL = "https://example.com/x.png"
SHIFT = 9.0
STEPS = 6
SYSTEM_MESSAGE_SHA256 = "547f3e99c78b2d9b0786a721b726d41be95ee2f52ebf90db55f381b1511c3905"

#: Shift, guidance scale and steps of each checkpoint: the README's table "Optimal Inference Configurations", with 12 of
#: its "8 or 12" steps, as in hyvideo/commons/__init__.py; for the four-step base, LightX2V's example
#: (https://github.com/ModelTC/LightX2V, examples/hunyuan_video/hunyuan_t2v_distill.py).
PUBLISHED = {
    "480p_t2v": (5, 6, 50),
    "480p_i2v": (5, 6, 50),
    "720p_t2v": (9, 6, 50),
    "720p_i2v": (7, 6, 50),
    "480p_t2v_distilled": (5, 1, 50),
    "480p_i2v_distilled": (5, 1, 50),
    "480p_i2v_step_distilled": (7, 1, 12),
    "720p_t2v_distilled": (9, 1, 50),
    "720p_i2v_distilled": (7, 1, 50),
    "720p_sr_distilled": (2, 1, 6),
    "1080p_sr_distilled": (2, 1, 8),
    "480p_t2v_4step": (9, 1, 4),
}


def test_shift_guidance_and_steps_are_the_published_ones() -> None:
    ours = {name: checkpoint.sampling for name, checkpoint in CHECKPOINTS.items()}
    numbers = {name: (each.shift, each.guidance_scale, each.num_inference_steps) for name, each in ours.items()}
    assert numbers == PUBLISHED


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_noise_levels_of_each_checkpoint_are_the_sources(name: str) -> None:
    """Its scheduler shifts `linspace(1, 0, steps + 1)`. The shift of the checkpoint decides, not that of a file."""
    shift, _, steps = PUBLISHED[name]
    linear = torch.linspace(1, 0, steps + 1)
    expected = shift * linear / (1 + (shift - 1) * linear)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_shift(CHECKPOINTS[name].sampling.shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    assert torch.allclose(scheduler.sigmas, expected, atol=1e-6)
    assert torch.allclose(scheduler.timesteps, 1000 * expected[:-1], atol=1e-3)
    assert scheduler.timesteps.dtype is torch.float32


def test_the_four_step_base_has_lightx2vs_step_list() -> None:
    """LightX2V shifts a schedule of 1000 steps and takes the entries 1000 - x for x in [1000, 750, 500, 250]."""
    sampling = CHECKPOINTS["480p_t2v_4step"].sampling
    assert sampling.shift is not None
    thousand = torch.linspace(1, 0, 1001)[:-1]
    shifted = sampling.shift * thousand / (1 + (sampling.shift - 1) * thousand)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=sampling.shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, sampling.num_inference_steps + 1)[:-1])
    assert torch.allclose(scheduler.timesteps, 1000 * shifted[[0, 250, 500, 750]], atol=1e-3)
    assert [round(float(timestep)) for timestep in scheduler.timesteps] == [1000, 964, 900, 750]


@pytest.mark.parametrize("base_size", [640, 960, 1440])
@pytest.mark.parametrize("aspect_ratio", [*AspectRatio, "21:9", "5:4", "2:3", "1000:667"])
def test_the_size_is_the_nearest_of_those_that_the_models_were_trained_on(base_size: int, aspect_ratio: str) -> None:
    """The source takes the first of the smallest distances between ratios; diffusers has the same list of sizes."""
    width, height = (int(side) for side in aspect_ratio.split(":"))
    buckets = generate_crop_size_list(base_size, 16)
    ratios = np.array([round(high / wide, 5) for wide, high in buckets])
    assert trained_size(base_size, width, height) == buckets[int(np.abs(ratios - height / width).argmin())]


def test_portrait_720p_is_720x1280() -> None:
    assert trained_size(960, 9, 16) == (720, 1280)
    assert trained_size(1440, 3, 4) == (1232, 1648)


def image_model(pipeline: HunyuanVideo15ImageToVideoPipeline, base_size: int = 48, steps: int = 2) -> PipelineModel:
    """A model of one image-to-video base, with and without an image."""
    routes = {("HunyuanVideo-1.5", resolution): Route("base") for resolution in Resolution}
    base = Base(Checkpoint("base", base_size, Sampling(steps, guidance_scale=1.0)), pipeline)
    return PipelineModel(Parts("image", {"base": base}, routes, image_routes=routes))


def picture(width: int, height: int) -> Image.Image:
    gradient = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return Image.fromarray(np.roll(gradient, 7, axis=1).astype(np.uint8))


def test_a_video_from_an_image_has_the_size_of_one_from_text() -> None:
    """diffusers' image pipeline chooses its own size: 72x120 here, as 720x1264 at real size."""
    model = image_model(image_pipeline(), base_size=96, steps=1)
    job_input = JobInput(prompt=PROMPT, duration=5, resolution=Resolution.P720, aspect_ratio="9:16", image=IMAGE_URL)
    latents = model._latents(job_input, picture(180, 320), 7, lambda *_: None, Event())
    assert latents.shape[-2:] == (128 // 8, 72 // 8)


class ExactTime(torch.nn.Module):
    """The source's embedding of a timestep: sinusoid in float32, then two layers in the dtype of the weights."""

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.layers = [embed.timestep_embedder] + ([embed.timestep_embedder_r] if embed.use_meanflow else [])

    def forward(self, timestep: torch.Tensor, timestep_r: torch.Tensor | None = None) -> torch.Tensor:
        total: torch.Tensor | None = None
        for layers, each in zip(self.layers, (timestep, timestep_r), strict=False):
            assert each is not None
            angles = each.float()[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
            sinusoid = torch.cat([angles.cos(), angles.sin()], dim=1).to(layers.linear_1.weight.dtype)
            embedded = layers.linear_2(torch.nn.functional.silu(layers.linear_1(sinusoid)))
            total = embedded if total is None else total + embedded
        assert total is not None
        return total


def in_16_bits() -> HunyuanVideo15Pipeline:
    pipeline = random_model.build_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.bfloat16()
    return pipeline


def states_of(pipeline: HunyuanVideo15Pipeline, text: str) -> dict[str, torch.Tensor]:
    names = ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_2", "encoder_attention_mask_2")
    with torch.no_grad():
        states = pipeline.encode_prompt(prompt=text, dtype=pipeline.transformer.dtype)
    return dict(zip(names, states, strict=True))


@torch.no_grad()
def sampled(velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The source's loop: latents and timesteps in float32, a velocity for (latents, timestep), plain Euler steps."""
    noise = torch.randn(1, 8, 31, 4, 7, generator=torch.Generator().manual_seed(7), dtype=torch.bfloat16)
    latents = noise.float()
    linear = torch.linspace(1, 0, STEPS + 1)
    sigmas = SHIFT * linear / (1 + (SHIFT - 1) * linear)
    for step in range(STEPS):
        moved = velocity(latents, 1000 * sigmas[step].reshape(1)).float()
        latents = latents + (sigmas[step + 1] - sigmas[step]) * moved
    return latents


def ours_in_16_bits(guidance_scale: float) -> torch.Tensor:
    pipeline = in_16_bits()
    use_mask_free_attention(pipeline.transformer, NATIVE)
    model = PipelineModel(single_parts(Checkpoint("demo", 48, Sampling(STEPS, SHIFT, guidance_scale)), pipeline))
    job_input = JobInput(prompt=PROMPT, duration=5, negative_prompt="blurry")
    scaled = model._latents(job_input, None, 7, lambda *_: None, Event())
    return scaled * float(pipeline.vae.config.scaling_factor)


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_16_bits_are_only_inside_the_transformer(guidance_scale: float) -> None:
    """Compares with the source's loop around the same transformer, whose time embedding is exact, too."""
    pipeline = in_16_bits()
    use_mask_free_attention(pipeline.transformer, NATIVE)
    pipeline.transformer.time_embed = ExactTime(pipeline.transformer.time_embed)
    positive, negative = states_of(pipeline, PROMPT), states_of(pipeline, "blurry")

    def velocity(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        joint = torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[:, :1])], dim=1).bfloat16()
        nothing = torch.zeros(1, 0, 16, dtype=torch.bfloat16)
        with_text, without = (
            pipeline.transformer(joint, timestep, **states, image_embeds=nothing, return_dict=False)[0].float()
            for states in (positive, negative)
        )
        guided: torch.Tensor = without + guidance_scale * (with_text - without)
        return guided

    found, expected = ours_in_16_bits(guidance_scale), sampled(velocity)
    assert found.dtype is torch.float32
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.full
def test_16_bits_cost_less_than_in_the_stock_loop() -> None:
    """The distance to latents of a float32 model, from the same noise. diffusers rounds latents and timesteps."""

    def stock(pipeline: HunyuanVideo15Pipeline) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler.set_shift(SHIFT)
        pipeline.guider = pipeline.guider.new(guidance_scale=1.0)
        noise = torch.randn(1, 8, 31, 4, 7, generator=torch.Generator().manual_seed(7), dtype=torch.bfloat16)
        latents: torch.Tensor = pipeline(
            prompt=PROMPT, height=32, width=56, latents=noise, num_inference_steps=STEPS, output_type="latent"
        ).frames
        return latents.float()

    exact, rounded, ours = stock(random_model.build_pipeline()), stock(in_16_bits()), ours_in_16_bits(1.0)
    assert (ours - exact).norm() < 0.5 * (rounded - exact).norm()


@pytest.mark.full
def test_no_two_of_fifty_steps_share_a_timestep() -> None:
    """In bfloat16, four of the 50 timesteps of 720p_t2v equal another one."""
    pipeline = in_16_bits()
    model = PipelineModel(single_parts(Checkpoint("demo", 48, Sampling(50, 9.0, 1.0)), pipeline))
    seen: list[float] = []
    pipeline.transformer.time_embed.time_proj.register_forward_pre_hook(lambda _, given: seen.extend(given[0].tolist()))
    model._latents(JobInput(prompt=PROMPT, duration=5), None, 7, lambda *_: None, Event())
    linear = torch.linspace(1, 0, 51)[:-1]
    assert seen == pytest.approx((9000 * linear / (1 + 8 * linear)).tolist(), abs=1e-3)
    assert len(set(torch.tensor(seen, dtype=torch.bfloat16).tolist())) < len(set(seen)) == 50


@pytest.mark.full
def test_a_step_distilled_base_gets_each_timestep_with_the_next_one_exactly() -> None:
    """The step-distilled image base is a meanflow model: it takes the timestep that a step leads to, too."""
    pipeline = image_pipeline()
    numbers = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    transformer = type(pipeline.transformer)(**numbers | {"use_meanflow": True}).eval()
    pipeline.register_modules(transformer=transformer.bfloat16())
    model = image_model(pipeline, steps=12)
    seen: dict[str, list[float]] = {"time_proj": [], "time_proj_r": []}
    for name, timesteps in seen.items():
        projection = getattr(transformer.time_embed, name)
        projection.register_forward_pre_hook(lambda _, given, into=timesteps: into.extend(given[0].tolist()))
    job_input = JobInput(prompt=PROMPT, duration=5, resolution=Resolution.P720, image=IMAGE_URL)
    model._latents(job_input, picture(1280, 720), 7, lambda *_: None, Event())
    expected = (1000 * torch.linspace(1, 0, 13)).tolist()
    assert seen["time_proj"] == pytest.approx(expected[:-1], abs=1e-3)
    assert seen["time_proj_r"] == pytest.approx(expected[1:], abs=1e-3)


def test_the_image_is_encoded_in_one_piece() -> None:
    """Decoding stays tiled. A tile of an image differs from the same place in the whole."""
    pipeline = image_pipeline()
    pipeline.vae.enable_tiling(32, 32, 4, 4)
    model = image_model(pipeline, base_size=96, steps=1)
    conditions: list[torch.Tensor] = []

    def note(_: torch.nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        conditions.append(named["hidden_states"][:, 8:16, :1])

    pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    job_input = JobInput(prompt=PROMPT, duration=5, resolution=Resolution.P720, image=IMAGE_URL)
    model._latents(job_input, picture(1280, 720), 7, lambda *_: None, Event())
    assert pipeline.vae.use_tiling

    pixels = pipeline.video_processor.preprocess(
        pipeline.video_processor.resize(picture(1280, 720), height=72, width=128, resize_mode="crop")
    )
    encoded = {}
    for tiling in (True, False):
        pipeline.vae.use_tiling = tiling
        with torch.no_grad():
            mode = pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
        encoded[tiling] = mode * pipeline.vae.config.scaling_factor
    assert torch.allclose(conditions[0], encoded[False], atol=1e-6)
    assert (encoded[True] - encoded[False]).norm() > 0.01 * encoded[False].norm(), "tiles would be seen here"


def test_quoted_words_of_a_negative_prompt_do_not_reach_byt5() -> None:
    """ByT5 encodes the words that the video is to show. The source gives it an empty text beside every negative one."""
    pipeline = random_model.build_pipeline()
    model = PipelineModel(single_parts(Checkpoint("demo", 48, Sampling(1, guidance_scale=6.0)), pipeline))
    passes: list[dict[str, torch.Tensor]] = []

    def note(_: torch.nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        passes.append(named)

    pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    text = 'a sign that says "CLOSED"'
    job_input = JobInput(prompt='A shop sign that says "OPEN"', duration=5, negative_prompt=text)
    model._latents(job_input, None, 7, lambda *_: None, Event())
    positive, negative = passes
    assert positive["encoder_attention_mask_2"].sum() > 0
    assert negative["encoder_attention_mask_2"].sum() == 0
    assert negative["encoder_hidden_states_2"].abs().sum() == 0
    assert torch.equal(negative["encoder_hidden_states"], states_of(pipeline, text)["encoder_hidden_states"])
    assert model._encode(text)["prompt_embeds_mask_2"].sum() > 0, "the same words as a prompt are shown"


def test_the_text_encoders_get_what_the_source_gives_them() -> None:
    """The sum is that of the source's system message (PROMPT_TEMPLATE in hyvideo/models/text_encoders/__init__.py)."""
    for pipeline in (random_model.build_pipeline(), image_pipeline()):
        built = type(pipeline)(**pipeline.components)  # the small pipelines have numbers of their own
        assert hashlib.sha256(built.system_message.encode()).hexdigest() == SYSTEM_MESSAGE_SHA256
        assert built.prompt_template_encode_start_idx == 108
        assert built.tokenizer_max_length == 1000
        assert built.tokenizer_2_max_length == 256


def test_a_prompts_states_are_the_third_last_ones_without_the_system_message() -> None:
    """The source's way by hand: chat template, padding on the right, 2 layers skipped, the first tokens cropped."""
    pipeline = random_model.build_pipeline()
    model = PipelineModel(single_parts(random_model.CHECKPOINT, pipeline))
    prompt = 'A sign that says "OPEN" beside “closed”'
    found = model._encode(prompt)

    system = f"<|im_start|>system\n{pipeline.system_message}<|im_end|>\n"
    chat = f"{system}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant"
    crop = pipeline.prompt_template_encode_start_idx
    length = crop + pipeline.tokenizer_max_length
    tokens = pipeline.tokenizer(chat, return_tensors="pt", padding="max_length", max_length=length)
    glyphs = pipeline.tokenizer_2(
        'Text "OPEN". Text "closed". ', return_tensors="pt", padding="max_length", max_length=256
    )
    with torch.no_grad():
        states = pipeline.text_encoder(**tokens, output_hidden_states=True).hidden_states[-3][:, crop:]
        words = pipeline.text_encoder_2(glyphs.input_ids, attention_mask=glyphs.attention_mask.float())[0]
    valid, shown = tokens.attention_mask[:, crop:], glyphs.attention_mask
    assert torch.equal(found["prompt_embeds_mask"].long(), valid)
    assert torch.equal(found["prompt_embeds_mask_2"].long(), shown)
    assert torch.allclose(found["prompt_embeds"][valid.bool()], states[valid.bool()], atol=1e-5)
    assert torch.allclose(found["prompt_embeds_2"][shown.bool()], words[shown.bool()], atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "formatted"),
    [
        ('A sign "OPEN" and “closed”, then "OPEN"', 'Text "OPEN". Text "closed". '),
        ('One word: "x"', 'Text "x". '),
        ("No words", None),
    ],
)
def test_the_quoted_words_are_formatted_as_the_source_does(prompt: str, formatted: str | None) -> None:
    """The formatted texts are what its MultilingualPromptFormat returns for these words without a style."""
    assert extract_glyph_texts(prompt) == formatted
