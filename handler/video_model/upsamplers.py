"""The upsamplers, which refine resized latents before a super-resolution stage denoises them.

diffusers has none. Source: https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5,
hyvideo/models/transformers/modules/upsample.py. Parameters have the names of the published weights, so that these load
unchanged.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15CausalConv3d as CausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15RMS_norm as RMSNorm
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import nn


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


#: By the first part of a parameter's name that only this upsampler has. Repositories name classes differently, but
#: parameters alike.
_UPSAMPLERS: Final[Mapping[str, Any]] = {
    "in_conv": SRTo720pUpsampler,
    "conv_in": SRTo1080pUpsampler,
}


def load_upsampler(directory: Path) -> nn.Module:
    """The upsampler in `directory`, with all of its weights, in float32 on the CPU.

    The names of the parameters tell which one it is, `config.json` its dimensions.

    Raises:
        OSError, ValueError, TypeError, RuntimeError: a file is missing, or the weights belong to another model.
    """
    (path,) = sorted(directory.glob("*.safetensors"))
    weights = load_file(path)
    parts = {name.partition(".")[0] for name in weights}
    upsampler_class = next((kind for part, kind in _UPSAMPLERS.items() if part in parts), None)
    if upsampler_class is None:
        raise ValueError(f"{path} has no parameters of {' or '.join(_UPSAMPLERS)}, as an upsampler must")
    upsampler: nn.Module = upsampler_class.from_config(json.loads((directory / "config.json").read_text()))
    upsampler.load_state_dict(weights, strict=True)
    return upsampler.float().eval()
