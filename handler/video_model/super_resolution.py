"""Super-resolution in latent space: 480p to 720p and 720p to 1080p, without decoding in between.

diffusers has no such stage. Source: https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5,
hyvideo/pipelines/hunyuan_video_sr_pipeline.py. The windows are not in the source: each step computes the velocities of
overlapping boxes of latents and takes their weighted mean, as MultiDiffusion does (https://arxiv.org/abs/2302.08113).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideo15Transformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from handler.video_model.catalog import Sampling
from handler.video_model.precision import sample_in_float32
from handler.video_model.windows import SuperResolutionTiling, Window, windows

#: Fraction of noise in the low-resolution latents. Source: `hyvideo/pipelines/hunyuan_video_sr_pipeline.py`.
_NOISE: Final = 0.7
_TIMESTEPS: Final = 1000


@dataclass(frozen=True)
class ImageCondition:
    """An image as scaled latents (1, C, 1, H, W) and as the vision tower's states (1, 729, D)."""

    latents: torch.Tensor
    states: torch.Tensor


@dataclass(frozen=True)
class SuperResolution:
    """One stage: from latents of one size to latents of the next.

    `transformer` is a meanflow model without guidance. It takes 98 channels: latents 32, condition 32 and its mask 1,
    low resolution 32 and its mask 1. `upsampler` runs in float32, and latents and timesteps stay in float32: 16 bits
    cannot tell neighbouring timesteps apart, and round away small steps.
    """

    transformer: HunyuanVideo15Transformer3DModel
    upsampler: nn.Module
    scheduler: FlowMatchEulerDiscreteScheduler
    sampling: Sampling

    def __post_init__(self) -> None:
        sample_in_float32(self.transformer)

    @torch.no_grad()
    def __call__(
        self,
        latents: torch.Tensor,  # (1, C, T, h, w), scaled, from the previous stage
        size: tuple[int, int],
        prompt: Mapping[str, torch.Tensor],
        generator: torch.Generator,
        after_pass: Callable[[], None],
        image: ImageCondition | None = None,
        tiling: SuperResolutionTiling | None = None,
    ) -> torch.Tensor:
        """Latents (1, C, T, H, W) in float32 for `size`, which is (height, width) in latents.

        `image` is the first frame at this size, `prompt` has the transformer's `encoder_*` arguments. Calls
        `after_pass` after each pass of the transformer: once for each step and window. An exception from it ends the
        stage.
        """
        # 1. Noise, and the low resolution with noise added: (1, C, T, H, W) each.
        device = latents.device
        shape = (*latents.shape[:3], *size)
        current = torch.randn(shape, generator=generator).to(device)
        low = (1 - _NOISE) * self._low_resolution(latents, size)
        low = low + _NOISE * torch.randn(shape, generator=generator).to(device)
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
            velocity = self._velocity(
                torch.cat([current, condition, guide], dim=1),
                tiling,
                after_pass,
                timestep=timestep.expand(shape[0]),
                timestep_r=following.expand(shape[0]),
                image_embeds=states,
                **prompt,
            )
            current = self.scheduler.step(velocity, timestep, current, return_dict=False)[0]
        return current

    def _velocity(
        self,
        inputs: torch.Tensor,  # (1, 3 C + 2, T, H, W)
        tiling: SuperResolutionTiling | None,
        after_pass: Callable[[], None],
        **named: torch.Tensor,
    ) -> torch.Tensor:
        """(1, C, T, H, W) in float32: the windows' velocities, and their weighted mean where windows overlap."""
        boxes = windows(tiling, *inputs.shape[2:])
        if tiling is None or len(boxes) == 1:
            velocity = self._pass(inputs, **named)
            after_pass()
            return velocity
        weights = inputs.new_zeros(inputs.shape[2:])
        total = weights.repeat(1, self.transformer.config.out_channels, 1, 1, 1)
        for box in boxes:
            with _positions(self.transformer.rope, box):
                velocity = self._pass(inputs[..., *box.index], **named)
            weight = _weights(box, tiling, weights)
            total[..., *box.index] += weight * velocity
            weights[box.index] += weight
            after_pass()
        return total / weights

    def _pass(self, inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        """The transformer's velocity, (1, C, T, H, W) in float32."""
        velocity: torch.Tensor = self.transformer(hidden_states=inputs, return_dict=False, **named)[0]
        return velocity

    def _condition(self, current: torch.Tensor, image: ImageCondition | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The image's latents and mask in the first frame, zeros elsewhere, and the vision tower's states."""
        batch, channels, *rest = current.shape
        condition = current.new_zeros(batch, channels + 1, *rest)
        if image is None:
            states = current.new_zeros(batch, 0, self.transformer.config.image_embed_dim)
        else:
            condition[:, :channels, :1], condition[:, channels:, :1] = image.latents, 1
            states = image.states.to(current.device)
        return condition, states.to(self.transformer.dtype)

    def _low_resolution(self, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(1, C, T, h, w) to (1, C, T, H, W): each latent frame resized, then all refined by the upsampler."""
        batch, channels, frames, height, width = latents.shape
        # (T, C, h, w)
        flat = latents.float().transpose(1, 2).reshape(batch * frames, channels, height, width)
        resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
        refined: torch.Tensor = self.upsampler(resized.reshape(batch, frames, channels, *size).transpose(1, 2))
        return refined


@contextmanager
def _positions(rope: nn.Module, box: Window) -> Iterator[None]:
    """Makes the transformer rotate a window's tokens by their positions in the video instead of in the window.

    A window is then the whole video with attention that ends at the window. In particular, only the first latent frame
    of the video, which is one frame and not four, is at position 0.
    """
    # Before other hooks: the ranks of a render take their part of these positions.
    handle = rope.register_forward_hook(lambda _, __, own: _rotation(rope, box, own[0].device), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _rotation(rope: Any, box: Window, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the window's positions, (tokens, head size) each, as the video's own `rope` has them."""
    sides = [
        torch.arange(side.start, side.stop, dtype=torch.float32, device=device)
        for side in (box.frames, box.rows, box.columns)
    ]
    parts = [
        get_1d_rotary_pos_embed(dim, positions.reshape(-1), rope.theta, use_real=True)
        for dim, positions in zip(rope.rope_dim, torch.meshgrid(*sides, indexing="ij"), strict=True)
    ]
    cosines, sines = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return cosines, sines


def _weights(box: Window, tiling: SuperResolutionTiling, like: torch.Tensor) -> torch.Tensor:
    """(frames, rows, columns) of the window: 1 inside it, lower towards each neighbour."""
    sides = (box.frames, box.rows, box.columns)
    overlaps = (tiling.window - tiling.stride, tiling.overlap, tiling.overlap)
    in_time, down, across = (
        _ramp(side, length, overlap).to(like) for side, length, overlap in zip(sides, like.shape, overlaps, strict=True)
    )
    return in_time[:, None, None] * down[:, None] * across


def _ramp(side: range, length: int, overlap: int) -> torch.Tensor:
    """Weights along one side of a window in a video of `length`: they rise and fall linearly over the overlaps."""
    rising = torch.arange(1, len(side) + 1) / (overlap + 1)
    ramp = torch.ones(len(side))
    if side.start > 0:
        ramp = ramp.minimum(rising)
    if side.stop < length:
        ramp = ramp.minimum(rising.flip(0))
    return ramp


def stage_arguments(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's `prompt_embeds*` arguments under the transformer's names."""
    names = {
        "prompt_embeds": "encoder_hidden_states",
        "prompt_embeds_mask": "encoder_attention_mask",
        "prompt_embeds_2": "encoder_hidden_states_2",
        "prompt_embeds_mask_2": "encoder_attention_mask_2",
    }
    return {theirs: prompt[ours] for ours, theirs in names.items()}
