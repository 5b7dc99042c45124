"""Super-resolution equals a plain transcript of its source, and loads from the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.pipelines.hunyuan_video1_5.image_processor import generate_crop_size_list
from safetensors.torch import save_file
from torch import nn

from benchmarks import random_model
from contract.job import AspectRatio, JobInput, Resolution, num_frames
from contract.result import Progress, Stage
from handler.video_model.attention import (
    NATIVE,
    FullAttention,
    WindowAttention,
    use_mask_free_attention,
    use_window_attention,
)
from handler.video_model.base import RenderCancelledError
from handler.video_model.catalog import trained_size
from handler.video_model.generate import PipelineModel
from handler.video_model.super_resolution import stage_arguments
from handler.video_model.upsamplers import SRTo720pUpsampler, SRTo1080pUpsampler, load_upsampler
from handler.worker import Job, Worker
from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.full import full
from tests.support.mp4 import probe
from tests.support.s3_servers import new_bucket
from tests.support.small_models import LATENTS, family, sr_transformer, stage, upsampler_720p, upsampler_1080p

State = dict[str, torch.Tensor]
PROMPT = "A paper boat on a rainy street"


def causal_conv(x: torch.Tensor, weights: State, name: str) -> torch.Tensor:
    """A 3x3x3 convolution, padded by replication, in time with past frames only."""
    padded = torch.cat([x[:, :, :1]] * 2 + [x], dim=2)
    padded = torch.cat([padded[..., :1, :], padded, padded[..., -1:, :]], dim=3)
    padded = torch.cat([padded[..., :1], padded, padded[..., -1:]], dim=4)
    return F.conv3d(padded, weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"])


def rms_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    normed: torch.Tensor = x / x.pow(2).sum(dim=1, keepdim=True).sqrt()
    scaled: torch.Tensor = normed * x.shape[1] ** 0.5 * gamma
    return scaled


def straight_720p(x: torch.Tensor, weights: State, num_blocks: int) -> torch.Tensor:
    hidden = causal_conv(x, weights, "in_conv")
    for index in range(num_blocks):
        inner = hidden
        for layer in (0, 2, 4):
            inner = causal_conv(inner, weights, f"blocks.{index}.block.{layer}")
            if layer < 4:
                inner = inner * torch.sigmoid(inner)
        hidden = hidden + inner
    return causal_conv(hidden, weights, "out_conv") + x


def straight_1080p(x: torch.Tensor, weights: State, levels: int, blocks: int) -> torch.Tensor:
    hidden = causal_conv(x, weights, "conv_in")
    hidden = hidden + x.repeat_interleave(hidden.shape[1] // x.shape[1], dim=1)
    for level in range(levels):
        for block in range(blocks):
            prefix = f"up.{level}.block.{block}"
            inner = rms_norm(hidden, weights[f"{prefix}.norm1.gamma"])
            inner = causal_conv(inner * torch.sigmoid(inner), weights, f"{prefix}.conv1")
            inner = rms_norm(inner, weights[f"{prefix}.norm2.gamma"])
            inner = causal_conv(inner * torch.sigmoid(inner), weights, f"{prefix}.conv2")
            if f"{prefix}.nin_shortcut.weight" in weights:
                shortcut = weights[f"{prefix}.nin_shortcut.weight"], weights[f"{prefix}.nin_shortcut.bias"]
                hidden = F.conv3d(hidden, *shortcut)
            hidden = hidden + inner
    hidden = rms_norm(hidden, weights["norm_out.gamma"])
    return causal_conv(hidden * torch.sigmoid(hidden), weights, "conv_out")


@pytest.mark.parametrize("kind", ["720p", "1080p"])
def test_the_upsamplers_compute_what_the_source_computes(kind: str) -> None:
    upsampler: nn.Module = upsampler_720p() if kind == "720p" else upsampler_1080p()
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(1, LATENTS, 5, 6, 7)
        weights = upsampler.state_dict()
        expected = straight_720p(x, weights, 2) if kind == "720p" else straight_1080p(x, weights, levels=2, blocks=2)
        assert torch.allclose(upsampler(x), expected, atol=1e-4)


def test_parameters_have_the_published_names() -> None:
    assert set(upsampler_720p().state_dict()) == {
        f"{name}.conv.{kind}"
        for name in ("in_conv", "out_conv", *(f"blocks.{i}.block.{j}" for i in range(2) for j in (0, 2, 4)))
        for kind in ("weight", "bias")
    }
    names = set(upsampler_1080p().state_dict())
    assert {"conv_in.conv.weight", "norm_out.gamma", "conv_out.conv.bias", "up.1.block.0.nin_shortcut.weight"} <= names
    assert {
        f"up.0.block.1.{part}" for part in ("norm1.gamma", "conv1.conv.weight", "norm2.gamma", "conv2.conv.bias")
    } <= names


@pytest.mark.parametrize("kind", ["720p", "1080p"])
def test_an_upsampler_loads_strictly_from_the_published_layout(tmp_path: Path, kind: str) -> None:
    upsampler = upsampler_720p(3) if kind == "720p" else upsampler_1080p(3)
    upsampler.save_pretrained(tmp_path)
    loaded = load_upsampler(tmp_path)
    assert type(loaded) is (SRTo720pUpsampler if kind == "720p" else SRTo1080pUpsampler)
    x = torch.randn(1, LATENTS, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(loaded(x), upsampler(x))
    state = upsampler.state_dict()
    state.pop(next(iter(state)))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_upsampler(tmp_path)


@pytest.mark.parametrize("kind", ["720p", "1080p"])
def test_the_parameters_tell_which_upsampler_it_is_and_not_the_name_of_its_class(tmp_path: Path, kind: str) -> None:
    """LightX2V and FastVideo name the classes differently, and add entries of their own."""
    upsampler = upsampler_720p(3) if kind == "720p" else upsampler_1080p(3)
    upsampler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for named in ({"_class_name": "SRUpsampler"}, {"_class_name": "SRTo720pUpsampler", "prefix": "Hunyuan"}, {}):
        own = {key: value for key, value in config.items() if key != "_class_name"}
        (tmp_path / "config.json").write_text(json.dumps(own | named))
        assert load_upsampler(tmp_path).state_dict().keys() == upsampler.state_dict().keys()


def test_an_upsampler_is_built_from_its_configuration_and_not_from_constants(tmp_path: Path) -> None:
    built = SRTo720pUpsampler(4, 4, hidden_channels=12, num_blocks=3)
    built.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_channels"] == 12
    assert set(load_upsampler(tmp_path).state_dict()) == set(built.state_dict())


@pytest.mark.parametrize("steps", [6, 8])
@pytest.mark.parametrize("prompt", [full(PROMPT), 'A shop sign that says "OPEN"'])
def test_the_stage_computes_what_the_source_computes(steps: int, prompt: str) -> None:
    """Repeats the source step by step, with the stock attention and its masks."""
    pipeline = random_model.build_pipeline()
    pipeline.tokenizer_max_length = 200
    names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
    with torch.no_grad():
        states = dict(zip(names, pipeline.encode_prompt(prompt=prompt), strict=True))
    latents = torch.randn(1, LATENTS, 4, 5, 8, generator=torch.Generator().manual_seed(1))
    upsampler, transformer = upsampler_720p(), sr_transformer()

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        current = torch.randn(1, LATENTS, 4, 9, 14, generator=generator)
        frames = [F.interpolate(latents[:, :, t], size=(9, 14), mode="bilinear", align_corners=False) for t in range(4)]
        low = 0.3 * upsampler(torch.stack(frames, dim=2))
        low = low + 0.7 * torch.randn(1, LATENTS, 4, 9, 14, generator=generator)
        zeros, ones = torch.zeros(1, 1, 4, 9, 14), torch.ones(1, 1, 4, 9, 14)
        linear = torch.linspace(1, 0, steps + 1)
        sigmas = 2 * linear / (1 + linear)  # shift 2
        guided = 0
        for step in range(steps):
            time = 1000 * sigmas[step]
            with_low = bool(time >= 700)
            guided += with_low
            parts = [current, torch.zeros_like(low), zeros]
            parts += [low, ones] if with_low else [torch.zeros_like(low), zeros]
            velocity = transformer(
                torch.cat(parts, dim=1),
                time.reshape(1),
                states["prompt_embeds"],
                states["prompt_embeds_mask"],
                timestep_r=1000 * sigmas[step + 1].reshape(1),
                encoder_hidden_states_2=states["prompt_embeds_2"],
                encoder_attention_mask_2=states["prompt_embeds_mask_2"],
                image_embeds=torch.zeros(1, 729, 16),
                return_dict=False,
            )[0]
            current = current + (sigmas[step + 1] - sigmas[step]) * velocity
    assert guided == steps // 2, "half of the steps see the low resolution"

    ours = stage(upsampler, steps)
    use_mask_free_attention(ours.transformer, NATIVE)
    seen: list[int] = []
    result = ours(latents, (9, 14), stage_arguments(states), torch.Generator().manual_seed(5), lambda: seen.append(1))
    assert (result - current).abs().max() < 1e-4
    assert len(seen) == steps


def test_a_stage_in_16_bits_keeps_latents_and_timesteps_in_float32() -> None:
    prompt = {
        "encoder_hidden_states": torch.randn(1, 12, 32, dtype=torch.bfloat16),
        "encoder_attention_mask": torch.ones(1, 12),
        "encoder_hidden_states_2": torch.zeros(1, 4, 16, dtype=torch.bfloat16),
        "encoder_attention_mask_2": torch.zeros(1, 4),
    }
    ours = stage(upsampler_720p(), 6)
    ours.transformer.bfloat16()
    use_mask_free_attention(ours.transformer, NATIVE)
    times: list[float] = []
    ours.transformer.time_embed.time_proj.register_forward_pre_hook(lambda _, given: times.append(float(given[0])))
    latents = torch.randn(1, LATENTS, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    result = ours(latents, (9, 14), prompt, torch.Generator().manual_seed(5), lambda: None)
    assert result.dtype == torch.float32
    linear = torch.linspace(1, 0, 7)[:-1]
    assert times == pytest.approx((2000 * linear / (1 + linear)).tolist(), abs=1e-3)  # bfloat16 is up to 2 off


def upscaled(radius: int | None, frames: int = 9) -> torch.Tensor:
    """The output of a stage, with attention to `radius` frames or to all."""
    ours = stage(upsampler_720p(), 2)
    use_mask_free_attention(ours.transformer, NATIVE)
    if radius is not None:
        use_window_attention(ours.transformer, radius)
    prompt = {
        "prompt_embeds": torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(2)),
        "prompt_embeds_mask": torch.ones(1, 12),
        "prompt_embeds_2": torch.zeros(1, 4, 16),
        "prompt_embeds_mask_2": torch.zeros(1, 4),
    }
    latents = torch.randn(1, LATENTS, frames, 3, 4, generator=torch.Generator().manual_seed(1))
    return ours(latents, (6, 8), stage_arguments(prompt), torch.Generator().manual_seed(5), lambda: None)


def test_a_window_as_long_as_the_video_is_exact_and_a_shorter_one_nearly_so() -> None:
    exact = upscaled(None)
    for radius in (4, 30):
        assert torch.equal(upscaled(radius), exact)
    errors = [(upscaled(radius) - exact).abs().mean() for radius in (0, 1, 3)]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < exact.abs().mean()


def test_a_window_has_the_frames_around_its_own_and_all_text() -> None:
    """Compares with a masked kernel, which window attention replaces."""
    frames, size, text, radius = 7, 5, 3, 1
    tokens = frames * size + text
    query, key, value = (torch.randn(1, tokens, 2, 8) for _ in range(3))
    window = WindowAttention(FullAttention(NATIVE), radius)
    window.note_frames(torch.nn.Identity(), (), {"hidden_states": torch.empty(1, 1, frames, 1, size)})
    frame = torch.arange(frames * size) // size
    centre = frame.clamp(radius, frames - 1 - radius)
    allowed = torch.ones(tokens, tokens, dtype=torch.bool)
    allowed[: frames * size, : frames * size] = (centre[:, None] - frame[None, :]).abs() <= radius
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))  # heads first
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)
    assert torch.allclose(window(query, key, value, text=text), expected, atol=1e-5)


@pytest.mark.parametrize("frames", [20, 40])
def test_a_window_reads_as_many_keys_for_a_frame_however_long_the_video_is(frames: int) -> None:
    read: list[int] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, text: int) -> torch.Tensor:
        read.append(query.shape[1] * key.shape[1])
        return FullAttention(NATIVE)(query, key, value, text=text)

    size, text, radius = 6, 2, 3
    window = WindowAttention(attend, radius)
    window.note_frames(torch.nn.Identity(), (), {"hidden_states": torch.empty(1, 1, frames, 2, 3)})
    joint = torch.randn(1, frames * size + text, 2, 8)
    window(joint, joint, joint, text=text)
    assert read == [size * (7 * size + text)] * frames + [text * (frames * size + text)]


@pytest.mark.parametrize(
    ("base_size", "aspect_ratio", "size"),
    [
        (640, "16:9", (848, 480)),
        (960, "16:9", (1280, 720)),
        (1440, "16:9", (1904, 1072)),
        (640, "9:16", (480, 848)),
        (960, "9:16", (720, 1280)),
        (1440, "9:16", (1072, 1904)),
        (640, "1:1", (640, 640)),
        (960, "1:1", (960, 960)),
        (1440, "1:1", (1440, 1440)),
        (640, "4:3", (720, 544)),
        (960, "3:4", (832, 1104)),
    ],
)
def test_sizes_are_those_that_the_models_were_trained_on(
    base_size: int, aspect_ratio: str, size: tuple[int, int]
) -> None:
    """diffusers has the same list of sizes to choose from."""
    width, height = (int(side) for side in aspect_ratio.split(":"))
    assert trained_size(base_size, width, height) == size
    assert size in generate_crop_size_list(base_size, 16)


@pytest.mark.parametrize("resolution", [full(Resolution.P720), Resolution.P1080])
@pytest.mark.parametrize("aspect_ratio", [full(AspectRatio.WIDE), AspectRatio.TALL])
def test_a_family_renders_through_its_stages_with_one_rising_progress(
    resolution: Resolution, aspect_ratio: AspectRatio
) -> None:
    told: list[tuple[Stage, float]] = []
    job = JobInput(prompt=PROMPT, duration=5, resolution=resolution, aspect_ratio=aspect_ratio)
    chunks = list(
        family().render(job, seed=1, on_progress=lambda stage, done: told.append((stage, done)), cancelled=Event())
    )
    width, height = (88, 48) if resolution is Resolution.P720 else (144, 80)
    size = (height, width) if aspect_ratio is AspectRatio.WIDE else (width, height)
    assert {chunk.shape[1:3] for chunk in chunks} == {size}
    assert sum(len(chunk) for chunk in chunks) == num_frames(5)
    stages = list(dict.fromkeys(stage for stage, _ in told))
    assert stages == [Stage.ENCODING_PROMPT, Stage.DENOISING, Stage.UPSCALING, Stage.DECODING]
    work = [done for stage, done in told if stage in (Stage.DENOISING, Stage.UPSCALING)]
    assert work == sorted(work)
    assert work[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("at", [Stage.ENCODING_PROMPT, Stage.DENOISING, Stage.UPSCALING, Stage.DECODING])
def test_a_render_is_cancelled_within_one_step_of_each_stage(at: Stage) -> None:
    model, cancelled = family(), Event()
    told: list[tuple[Stage, float]] = []

    def on_progress(stage: Stage, done: float) -> None:
        assert not cancelled.is_set(), f"went on to {stage} after it was cancelled in {at}"
        told.append((stage, done))
        if stage is at:
            cancelled.set()

    job = JobInput(prompt=PROMPT, duration=5, resolution=Resolution.P1080)
    with pytest.raises(RenderCancelledError):
        list(model.render(job, seed=1, on_progress=on_progress, cancelled=cancelled))
    assert told[-1][0] is at


@pytest.fixture(scope="module")
def bucket(s3_server: BucketSettings) -> Bucket:
    return Bucket(new_bucket(s3_server))


@pytest.fixture(scope="module")
def small_family() -> PipelineModel:
    return family()


@pytest.mark.full
@pytest.mark.parametrize("duration", range(5, 11))
@pytest.mark.parametrize("resolution", Resolution)
def test_each_length_and_resolution_comes_out_exactly(
    bucket: Bucket, small_family: PipelineModel, tmp_path: Path, resolution: Resolution, duration: int
) -> None:
    told: list[Progress] = []
    job_input = {"prompt": PROMPT, "duration": duration, "resolution": resolution.value}
    worker = Worker(small_family, bucket, version="1")
    result = worker.run(Job(f"{resolution}-{duration}", job_input), told.append, Event())
    path = tmp_path / "video.mp4"
    path.write_bytes(bucket.get_bytes(result.video_key))
    video = probe(path)
    size = (1280, 720) if resolution is Resolution.P720 else (1920, 1080)
    assert result.rendered_size == ((88, 48) if resolution is Resolution.P720 else (144, 80))
    assert (video.width, video.height, video.fps, video.num_frames) == (*size, 24.0, 24 * duration + 1)
    assert [progress.progress for progress in told] == sorted(progress.progress for progress in told)
    assert {"denoising", "upscaling", "decoding"} <= set(result.timings)
