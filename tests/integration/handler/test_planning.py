"""The published dimensions and the cost model, held against the modules themselves on the meta device."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel

from benchmarks.counted import meta_parts
from benchmarks.live import counting
from contract.job import Profile, Resolution
from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.video_model.cost import GPUS, Speed, decode_work, gpu_named, pass_work, render_seconds
from handler.video_model.dimensions import TRANSFORMER, VAE
from handler.video_model.placement import rounded_bytes_of, weights_of
from handler.video_model.planning import kind_of_video, published_weights, rows


@lru_cache
def transformer(channels: int, layers: int) -> Any:
    with torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel(
            in_channels=channels, num_layers=layers, task_type="t2v", use_meanflow=channels == 98
        )
    use_mask_free_attention(model, NATIVE)
    return model.eval()


@lru_cache
def vae() -> Any:
    with torch.device("meta"):
        return AutoencoderKLHunyuanVideo15().eval()


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("channels", [65, 98])
def test_the_transformer_has_the_stated_parameters(channels: int) -> None:
    model = transformer(channels, 1)
    block = parameters(model.transformer_blocks[0])
    assert block == TRANSFORMER.block_parameters
    assert parameters(model) - block == TRANSFORMER.outside_parameters(channels, meanflow=channels == 98)
    assert TRANSFORMER.parameters(65, meanflow=False) == 8_326_608_160


def test_the_vae_has_the_stated_parameters() -> None:
    assert parameters(vae().decoder) == VAE.decoder_parameters
    assert parameters(vae().encoder) == VAE.encoder_parameters


@pytest.mark.full
@pytest.mark.parametrize("profile", [Profile.FAST, Profile.QUALITY])
def test_the_published_weights_are_those_of_the_modules(profile: Profile) -> None:
    found, stated = weights_of(meta_parts(profile, TRANSFORMER.layers)), published_weights(profile, images=True)
    for name in ("text_encoders", "transformers", "vae_decoder", "vae_encoder", "vision"):
        for counted, said in zip(
            vars(getattr(found, name)).values(), vars(getattr(stated, name)).values(), strict=True
        ):
            assert counted == pytest.approx(said, rel=1e-3), name
    assert found.small == stated.small


def test_pinned_blocks_are_rounded_to_powers_of_two() -> None:
    assert rounded_bytes_of(torch.nn.Linear(3, 5, bias=False)) == 64, "60 bytes"


@pytest.mark.parametrize("channels", [65, 98])
@pytest.mark.parametrize(("image", "text"), [(0, (128, 0)), (729, (1000, 256))])
def test_a_pass_has_the_stated_operations(channels: int, image: int, text: tuple[int, int]) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(1, *shape, device="meta")

    words, glyphs = text
    named = {"timestep_r": torch.empty(1, device="meta")} if channels == 98 else {}
    for layers in (1, 2):
        model = transformer(channels, layers)  # its weights are not counted
        with torch.no_grad(), counting() as count:
            model(
                hidden_states=empty(channels, 3, 30, 53),
                timestep=torch.empty(1, device="meta"),
                encoder_hidden_states=empty(words, 3584),
                encoder_attention_mask=empty(words),
                encoder_hidden_states_2=empty(glyphs, 1472),
                encoder_attention_mask_2=empty(glyphs),
                image_embeds=empty(image, 1152),
                return_dict=False,
                **named,
            )
        stated = pass_work(3 * 30 * 53, channels, text, image, replace(TRANSFORMER, layers=layers))
        assert count.attention == stated.attention
        # The embedding of the timestep is left out.
        assert count.other == pytest.approx(stated.other, rel=2e-3)
        assert count.alive == 0, "every tensor was freed"


def test_the_decoder_has_the_stated_operations() -> None:
    with torch.no_grad(), counting() as count:
        vae().decoder(torch.empty(1, 32, 1, 16, 16, device="meta"))
    stated = decode_work((1, 16, 16))
    assert (count.attention, count.other) == (stated.attention, stated.other)


def test_a_long_decode_costs_as_much_as_its_frames() -> None:
    assert decode_work((61, 45, 80)).other == pytest.approx(decode_work((31, 45, 80)).other * 241 / 121, rel=0.01)


@pytest.mark.parametrize(
    ("name", "found"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GeForce RTX 4090", "RTX4090"), ("h200", "H200"), ("Tesla T4", None)],
)
def test_a_gpu_is_recognised_by_its_name(name: str, found: str | None) -> None:
    gpu = gpu_named(name)
    assert (gpu.name if gpu else None) == found


def test_seconds_are_operations_over_what_the_gpu_reaches() -> None:
    video = kind_of_video(Profile.FAST, Resolution.P720, 5, from_image=False)
    full = render_seconds(video, Speed.of(GPUS["H100"], share=1.0))
    assert sum(full.values()) == pytest.approx(45, rel=0.02), "45 PFLOP at 989 TFLOP/s"
    half = render_seconds(video, Speed.of(GPUS["H100"], share=0.5))
    assert sum(half.values()) == pytest.approx(2 * sum(full.values()))
    assert sum(render_seconds(video, Speed.of(GPUS["H100"], eight_bit=True)).values()) < sum(full.values()) / 0.6


def test_a_slow_bus_is_the_limit_of_streamed_weights() -> None:
    video = kind_of_video(Profile.FAST, Resolution.P720, 5, from_image=False)
    speed = Speed.of(replace(GPUS["B200"], bus=1.0))
    passes = sum(stage.passes for stage in video.stages)
    streamed = render_seconds(video, speed, streamed=True)
    assert streamed["denoising"] + streamed["upscaling"] == pytest.approx(16.65 * passes, rel=0.01)


@pytest.mark.parametrize("gpu", GPUS)
def test_less_memory_is_no_faster(gpu: str) -> None:
    for ample, scarce in zip(rows(GPUS[gpu]), rows(GPUS[gpu], vram=12), strict=True):
        assert scarce.seconds >= ample.seconds
        assert not scarce.fits or scarce.vram <= 12
