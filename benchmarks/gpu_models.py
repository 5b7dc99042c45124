"""Models with random weights at the real dimensions, or at small ones, for `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from torch import nn
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from benchmarks import random_model
from contract.job import DEFAULT_MODEL, Profile
from handler.video_model.catalog import CHECKPOINTS, IMAGE_BASES, Checkpoint, image_routes, text_routes
from handler.video_model.parts import Base, Parts, Upscaler
from handler.video_model.super_resolution import SuperResolution
from handler.video_model.upsamplers import SRTo720pUpsampler, SRTo1080pUpsampler


@dataclass(frozen=True)
class Scale:
    """The dimensions of the models."""

    layers: int
    heads: int
    head_dim: int
    rope: tuple[int, int, int]
    latent_channels: int
    text_dim: int
    text_2_dim: int
    text_layers: int
    shrink: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


#: The dimensions of the published checkpoints.
REAL: Final = Scale(54, 16, 128, (16, 56, 56), 32, 3584, 1472, 28, 1)
TINY: Final = Scale(2, 2, 16, (4, 6, 6), 8, 32, 16, 3, 20)


class RandomModels:
    """Builds the parts of a profile."""

    def __init__(self, scale: Scale, device: str) -> None:
        self.scale = scale
        self.device = device
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def parts(self, profile: Profile, *, images: bool = False) -> Parts:
        """The checkpoints of a profile; with `images` also those of videos that start from an image."""
        models = {DEFAULT_MODEL: profile}
        routes = text_routes(models)
        from_image = image_routes(models, list(IMAGE_BASES.values())) if images else {}
        bases, upscalers = {}, {}
        for route in {*routes.values(), *from_image.values()}:
            for checkpoint in map(self._scaled, route.checkpoints):
                if checkpoint.is_super_resolution:
                    upscalers[checkpoint.name] = Upscaler(checkpoint, self._stage(checkpoint))
                else:
                    bases[checkpoint.name] = Base(checkpoint, self._pipeline(from_image=route in from_image.values()))
        return Parts(f"random {profile}", bases, routes, upscalers, from_image)

    def _scaled(self, name: str) -> Checkpoint:
        checkpoint = CHECKPOINTS[name]
        return replace(checkpoint, base_size=checkpoint.base_size // self.scale.shrink)

    def transformer(self, channels: int, *, meanflow: bool) -> Any:
        scale = self.scale
        return self._made(
            lambda: HunyuanVideo15Transformer3DModel(
                in_channels=channels,
                out_channels=scale.latent_channels,
                num_attention_heads=scale.heads,
                attention_head_dim=scale.head_dim,
                num_layers=scale.layers,
                text_embed_dim=scale.text_dim,
                text_embed_2_dim=scale.text_2_dim,
                rope_axes_dim=scale.rope,
                task_type="t2v",
                use_meanflow=meanflow,
            )
        )

    def _pipeline(self, *, from_image: bool) -> HunyuanVideo15Pipeline:
        built = random_model.build_pipeline()
        components: dict[str, Any] = {
            **built.components,
            "transformer": self.transformer(2 * self.scale.latent_channels + 1, meanflow=False),
            "scheduler": FlowMatchEulerDiscreteScheduler(),
            "guider": ClassifierFreeGuidance(),
        }
        if self.scale is not TINY:
            components |= {
                "vae": self._made(AutoencoderKLHunyuanVideo15),
                "text_encoder": self._made(self._qwen),
                "text_encoder_2": self._made(self._byt5),
                "tokenizer_2": ByT5Tokenizer(),
            }
        if from_image:
            components |= {
                "image_encoder": self._made(self._siglip),
                "feature_extractor": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
            }
        pipeline = (HunyuanVideo15ImageToVideoPipeline if from_image else HunyuanVideo15Pipeline)(**components)
        for name in ("system_message", "prompt_template_encode_start_idx"):
            setattr(pipeline, name, getattr(built, name))
        return pipeline

    def _qwen(self) -> nn.Module:
        model: nn.Module = Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=152_064,
                hidden_size=3584,
                intermediate_size=18_944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            )
        )
        return model

    def _byt5(self) -> nn.Module:
        model: nn.Module = T5EncoderModel(
            T5Config(
                vocab_size=1510,
                d_model=1472,
                d_kv=64,
                d_ff=3584,
                num_layers=12,
                num_heads=6,
                feed_forward_proj="gated-gelu",
            )
        )
        return model

    def _siglip(self) -> nn.Module:
        sizes = {"image_size": 384, "patch_size": 14, "hidden_size": 1152, "intermediate_size": 4304}
        model: nn.Module = SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=27, num_attention_heads=16, **sizes))
        return model

    def _stage(self, checkpoint: Checkpoint) -> SuperResolution:
        channels = self.scale.latent_channels
        small: nn.Module = (
            SRTo720pUpsampler(channels, channels, global_residual=True)
            if checkpoint.name == "720p_sr_distilled"
            # Widths that agree with the size of the published file, 0.20 GB. Its configuration was not at hand.
            else SRTo1080pUpsampler(channels, channels, block_out_channels=(8 * channels, 16 * channels))
        )
        return SuperResolution(
            transformer=self.transformer(3 * channels + 2, meanflow=True),
            upsampler=small.eval().to(self.device),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=checkpoint.sampling.shift or 1.0),
            sampling=checkpoint.sampling,
        )

    def _made(self, build: Callable[[], Any]) -> Any:
        """A module with random weights in `dtype`, in host memory. A GPU, if there is one, makes the numbers.

        On the device "meta" it has no numbers.
        """
        with torch.device("meta"):
            module = build()
        if self.device == "meta":
            return module.to(self.dtype).eval()
        module = module.to(self.dtype).to_empty(device="cpu").eval()
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data.copy_(torch.randn(tensor.shape, device=self.device, dtype=self.dtype) * 0.02)
        for part in module.modules():
            if hasattr(part, "inv_freq"):  # a computed buffer, not a weight
                part.inv_freq.copy_(torch.logspace(0, -6, part.inv_freq.numel()))
        return module
