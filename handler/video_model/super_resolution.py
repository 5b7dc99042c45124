"""Super-resolution in latent space: 480p to 720p and 720p to 1080p, without decoding in between.

diffusers has no such stage. Source: https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5,
hyvideo/pipelines/hunyuan_video_sr_pipeline.py and hyvideo/models/transformers/modules/upsample.py. Parameters have the
names of the published weights, so that these load unchanged.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideo15Transformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15CausalConv3d as CausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15RMS_norm as RMSNorm
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import nn

from handler.video_model.catalog import Sampling

#: Fraction of noise in the low-resolution latents. Source: `hyvideo/pipelines/hunyuan_video_sr_pipeline.py`.
_NOISE: Final = 0.7
_TIMESTEPS: Final = 1000


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            CausalConv3d(channels, channels),
            nn.SiLU(),
            CausalConv3d(channels, channels),
            nn.SiLU(),
            CausalConv3d(channels, channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual: torch.Tensor = self.block(x)
        return x + residual


class SRTo720pUpsampler(ModelMixin, ConfigMixin):  # type: ignore[misc] # diffusers is untyped
    """Refines latents that were resized to 720p: (B, C, T, H, W) to (B, C, T, H, W)."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int | None = None,
        num_blocks: int = 6,
        global_residual: bool = False,
    ) -> None:
        super().__init__()
        hidden = hidden_channels or 64
        self.in_conv = CausalConv3d(in_channels, hidden)
        self.blocks = nn.ModuleList(_Residual(hidden) for _ in range(num_blocks))
        self.out_conv = CausalConv3d(hidden, out_channels)
        self.adds_input = global_residual and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) to the same shape."""
        hidden = self.in_conv(x)
        for block in self.blocks:
            hidden = block(hidden)
        refined: torch.Tensor = self.out_conv(hidden)
        return refined + x if self.adds_input else refined


class _ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_channels, images=False)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = RMSNorm(out_channels, images=False)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.nin_shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        added: torch.Tensor = self.nin_shortcut(x) + hidden
        return added


class _Level(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_blocks: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(_ResnetBlock(*pair) for pair in pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = block(x)
        return x


class SRTo1080pUpsampler(ModelMixin, ConfigMixin):  # type: ignore[misc] # diffusers is untyped
    """Refines latents that were resized to 1080p: (B, C, T, H, W) to (B, out_channels, T, H, W)."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        z_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        num_res_blocks: int = 2,
        is_residual: bool = False,  # noqa: ARG002 - the published configuration has it; it has no effect
    ) -> None:
        super().__init__()
        first = block_out_channels[0]
        self.repeats = first // z_channels
        self.conv_in = CausalConv3d(z_channels, first)
        widths = [first, *block_out_channels]
        self.up = nn.ModuleList(_Level(before, after, num_res_blocks + 1) for before, after in pairwise(widths))
        self.norm_out = RMSNorm(widths[-1], images=False)
        self.conv_out = CausalConv3d(widths[-1], out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, z_channels, T, H, W) to (B, out_channels, T, H, W)."""
        hidden = self.conv_in(x) + x.repeat_interleave(self.repeats, dim=1)
        for level in self.up:
            hidden = level(hidden)
        refined: torch.Tensor = self.conv_out(F.silu(self.norm_out(hidden)))
        return refined


#: By the `_class_name` of a published configuration.
UPSAMPLERS: Final[Mapping[str, type[nn.Module]]] = {
    upsampler.__name__: upsampler for upsampler in (SRTo720pUpsampler, SRTo1080pUpsampler)
}


def load_upsampler(directory: Path) -> nn.Module:
    """The upsampler that `config.json` describes, with all of its weights, in float32 on the CPU.

    Raises:
        OSError, ValueError, KeyError, RuntimeError: a file is missing, or the weights belong to another model.
    """
    config = json.loads((directory / "config.json").read_text())
    upsampler_class = UPSAMPLERS[config["_class_name"]]
    upsampler = upsampler_class(**{name: value for name, value in config.items() if not name.startswith("_")})
    (weights,) = sorted(directory.glob("*.safetensors"))
    upsampler.load_state_dict(load_file(weights), strict=True)
    return upsampler.float().eval()


@dataclass(frozen=True)
class ImageCondition:
    """An image as scaled latents (1, C, 1, H, W) and as the vision tower's states (1, 729, D)."""

    latents: torch.Tensor
    states: torch.Tensor


@dataclass(frozen=True)
class SuperResolution:
    """One stage: from latents of one size to latents of the next.

    `transformer` is a meanflow model without guidance. It takes 98 channels: latents 32, condition 32 and its mask 1,
    low resolution 32 and its mask 1. `upsampler` runs in float32.
    """

    transformer: HunyuanVideo15Transformer3DModel
    upsampler: nn.Module
    scheduler: FlowMatchEulerDiscreteScheduler
    sampling: Sampling

    @torch.no_grad()
    def __call__(
        self,
        latents: torch.Tensor,  # (1, C, T, h, w), scaled, from the previous stage
        size: tuple[int, int],
        prompt: Mapping[str, torch.Tensor],
        generator: torch.Generator,
        after_step: Callable[[], None],
        image: ImageCondition | None = None,
    ) -> torch.Tensor:
        """Latents (1, C, T, H, W) for `size`, which is (height, width) in latents.

        `image` is the first frame at this size, `prompt` has the transformer's `encoder_*` arguments.
        """
        # 1. Noise, and the low resolution with noise added: (1, C, T, H, W) each.
        device, dtype = latents.device, self.transformer.dtype
        shape = (*latents.shape[:3], *size)
        current = torch.randn(shape, generator=generator).to(device, dtype)
        low = (1 - _NOISE) * self._low_resolution(latents, size).to(dtype)
        low = low + _NOISE * torch.randn(shape, generator=generator).to(device, dtype)
        low = torch.cat([low, torch.ones_like(low[:, :1])], dim=1)  # (1, C + 1, T, H, W) with its mask
        # 2. The image: (1, C + 1, T, H, W) with its mask, and (1, 0 or 729, D).
        condition, states = self._condition(current, image)
        # 3. Denoise.
        sigmas = np.linspace(1.0, 0.0, self.sampling.num_inference_steps + 1)[:-1]
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        timesteps = self.scheduler.timesteps
        for timestep, following in pairwise([*timesteps, torch.zeros_like(timesteps[0])]):
            # Below the noise level of the low resolution, the low resolution would only hold back details.
            guide = low * float(timestep >= _TIMESTEPS * _NOISE)
            velocity = self.transformer(
                hidden_states=torch.cat([current, condition, guide], dim=1),
                timestep=timestep.expand(shape[0]).to(dtype),
                timestep_r=following.expand(shape[0]).to(dtype),
                image_embeds=states,
                return_dict=False,
                **prompt,
            )[0]
            current = self.scheduler.step(velocity, timestep, current, return_dict=False)[0]
            after_step()
        return current

    def _condition(self, current: torch.Tensor, image: ImageCondition | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The image's latents and mask in the first frame, zeros elsewhere, and the vision tower's states."""
        batch, channels, *rest = current.shape
        condition = current.new_zeros(batch, channels + 1, *rest)
        if image is None:
            return condition, current.new_zeros(batch, 0, self.transformer.config.image_embed_dim)
        condition[:, :channels, :1], condition[:, channels:, :1] = image.latents, 1
        return condition, image.states.to(current)

    def _low_resolution(self, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(1, C, T, h, w) to (1, C, T, H, W): each latent frame resized, then all refined by the upsampler."""
        batch, channels, frames, height, width = latents.shape
        # (T, C, h, w)
        flat = latents.float().transpose(1, 2).reshape(batch * frames, channels, height, width)
        resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
        refined: torch.Tensor = self.upsampler(resized.reshape(batch, frames, channels, *size).transpose(1, 2))
        return refined


def stage_arguments(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's `prompt_embeds*` arguments under the transformer's names."""
    names = {
        "prompt_embeds": "encoder_hidden_states",
        "prompt_embeds_mask": "encoder_attention_mask",
        "prompt_embeds_2": "encoder_hidden_states_2",
        "prompt_embeds_mask_2": "encoder_attention_mask_2",
    }
    return {theirs: prompt[ours] for ours, theirs in names.items()}
