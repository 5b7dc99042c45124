"""Small models of the real classes: single ones, and a family with super-resolution stages."""

from __future__ import annotations

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from torch import nn
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from benchmarks import random_model
from contract.job import DEFAULT_MODEL, Resolution
from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.video_model.catalog import Checkpoint, Route, Sampling
from handler.video_model.checkpoints import single_parts
from handler.video_model.generate import PipelineModel
from handler.video_model.parts import Base, Parts, Upscaler
from handler.video_model.super_resolution import SuperResolution
from handler.video_model.upsamplers import SRTo720pUpsampler, SRTo1080pUpsampler

LATENTS = 8


def single(pipeline: HunyuanVideo15Pipeline | None = None, *, steps: int = 2) -> PipelineModel:
    """A model of one checkpoint that renders 56x32, with the attention that every loaded model has.

    diffusers' own attends to 3,000 padded tokens, under a mask, for 868 of the video.
    """
    pipeline = pipeline or random_model.build_pipeline()
    use_mask_free_attention(pipeline.transformer, NATIVE)
    return PipelineModel(single_parts(Checkpoint("demo", 48, Sampling(steps)), pipeline))


def sr_transformer(seed: int = 0) -> HunyuanVideo15Transformer3DModel:
    """Has the published inputs: latents, condition and its mask, low resolution and its mask; meanflow."""
    torch.manual_seed(seed)
    model = HunyuanVideo15Transformer3DModel(
        in_channels=3 * LATENTS + 2,
        out_channels=LATENTS,
        num_attention_heads=2,
        attention_head_dim=16,
        rope_axes_dim=(4, 6, 6),
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=32,
        text_embed_2_dim=16,
        image_embed_dim=16,
        task_type="t2v",
        use_meanflow=True,
    )
    return model.eval()


def upsampler_720p(seed: int = 0) -> SRTo720pUpsampler:
    torch.manual_seed(seed)
    upsampler: SRTo720pUpsampler = SRTo720pUpsampler(
        LATENTS, LATENTS, hidden_channels=8, num_blocks=2, global_residual=True
    )
    upsampler.eval()
    return upsampler


def upsampler_1080p(seed: int = 0) -> SRTo1080pUpsampler:
    torch.manual_seed(seed)
    upsampler: SRTo1080pUpsampler = SRTo1080pUpsampler(LATENTS, LATENTS, block_out_channels=(16, 8), num_res_blocks=1)
    upsampler.eval()
    return upsampler


def stage(upsampler: nn.Module, steps: int, seed: int = 0) -> SuperResolution:
    return SuperResolution(
        transformer=sr_transformer(seed),
        upsampler=upsampler,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        sampling=Sampling(steps, shift=2.0, guidance_scale=1.0),
    )


def image_pipeline(seed: int = 0) -> HunyuanVideo15ImageToVideoPipeline:
    """The demo model's components with a vision tower of 729 tokens, as in the published model."""
    built = random_model.build_pipeline()
    torch.manual_seed(seed)
    tower = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=54, patch_size=2
    )
    pipeline = HunyuanVideo15ImageToVideoPipeline(
        **built.components,
        image_encoder=SiglipVisionModel(tower).eval(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 54, "width": 54}),
    )
    for name in ("system_message", "prompt_template_encode_start_idx", "tokenizer_max_length"):
        setattr(pipeline, name, getattr(built, name))
    return pipeline


def image_family() -> PipelineModel:
    """From an image, at 56x32, and through one stage to 88x48."""
    pipeline = image_pipeline()
    use_mask_free_attention(pipeline.transformer, NATIVE)
    first = stage(upsampler_720p(), 2)
    use_mask_free_attention(first.transformer, NATIVE)
    routes = {(DEFAULT_MODEL, resolution): Route("base", ("first",)) for resolution in Resolution}
    return PipelineModel(
        Parts(
            "image family",
            {"base": Base(Checkpoint("base", 48, Sampling(2, guidance_scale=1.0)), pipeline)},
            routes,
            {"first": Upscaler(Checkpoint("first", 72, first.sampling), first)},
            routes,
        )
    )


def family() -> PipelineModel:
    """Small sizes for 480p, 720p and 1080p: 56x32, 88x48 and 144x80. 720p has one stage, 1080p has two."""
    pipeline = random_model.build_pipeline()
    use_mask_free_attention(pipeline.transformer, NATIVE)
    first, second = stage(upsampler_720p(), 2), stage(upsampler_1080p(), 2, seed=1)
    for each in (first, second):
        use_mask_free_attention(each.transformer, NATIVE)
    return PipelineModel(
        Parts(
            "family",
            {"base": Base(Checkpoint("base", 48, Sampling(2, guidance_scale=1.0)), pipeline)},
            {
                (DEFAULT_MODEL, Resolution.P720): Route("base", ("first",)),
                (DEFAULT_MODEL, Resolution.P1080): Route("base", ("first", "second")),
            },
            {
                "first": Upscaler(Checkpoint("first", 72, first.sampling), first),
                "second": Upscaler(Checkpoint("second", 108, second.sampling), second),
            },
        )
    )
