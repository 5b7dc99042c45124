"""The VAE's decoder, one latent frame after another, with the numbers of the whole decode.

No part of the decoder looks ahead in time. A convolution needs its last two input frames, which a `History` keeps. The
attention of the middle block needs all earlier frames; it comes early and in low resolution, so `stem` computes it for
the whole video at once. What follows it, nearly all of the work, takes memory that does not depend on the duration.

Convolutions and norms compute a band of rows at a time, so a temporary is as large as a band and not as a frame. After
the last temporal upsampling, frames are computed one by one.

Source of the arithmetic: diffusers, models/autoencoders/autoencoder_kl_hunyuanvideo15.py. Its autoencoder_kl_wan.py
decodes another VAE in the same way (`feat_cache`).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock as AttnBlock
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15CausalConv3d as CausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15Decoder3D as Decoder3D
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15ResnetBlock as ResnetBlock
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15RMS_norm as RMSNorm
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15Upsample as Upsample
from torch import nn

from handler.video_model.memory import BAND

#: Frames before its own that a convolution sees. Its kernel is 3 x 3 x 3.
_PAST: Final = 2
#: The least length that the norm divides by, as in `torch.nn.functional.normalize`.
_SHORTEST: Final = 1e-12


class History:
    """The last two input frames of each convolution, (1, C, 1, H, W) each: what a decoder remembers of a tile."""

    def __init__(self) -> None:
        self._frames: dict[nn.Module, list[torch.Tensor]] = {}
        self._parked: dict[nn.Module, list[torch.Tensor]] = {}

    def knows(self, conv: nn.Module) -> bool:
        """Whether the convolution has seen a frame."""
        return conv in self._frames

    def extend(self, conv: nn.Module, frames: list[torch.Tensor]) -> list[torch.Tensor]:
        """The frames with two before them, which are repetitions of the first one at the start of the video."""
        extended = _after(self._frames.get(conv), frames)
        self._frames[conv] = extended[-_PAST:]
        return extended

    def park(self) -> None:
        """Moves all frames to host memory, which is allocated once."""
        for conv, frames in self._frames.items():
            if conv not in self._parked:
                self._parked[conv] = [torch.empty(frame.shape, dtype=frame.dtype) for frame in frames]
            for parked, frame in zip(self._parked[conv], frames, strict=True):
                if not frame.is_meta:  # has no numbers
                    parked.copy_(frame)
        self._frames = {}

    def restore(self, device: torch.device) -> None:
        """Moves parked frames back to the device."""
        if not self._frames:
            self._frames = {conv: [one.to(device) for one in frames] for conv, frames in self._parked.items()}


class CausalDecoder:
    """Computes what a VAE's decoder does: `stem` of the whole video, then `step` for each latent frame."""

    def __init__(self, decoder: Decoder3D, band: int = BAND) -> None:
        self._decoder = decoder
        self._band = band
        self._used = {part: _used(part.conv.weight) for part in decoder.modules() if isinstance(part, CausalConv3d)}
        # A residual block whose last convolution is zero adds nothing.
        self._empty = {part for part in self._used if _is_empty(part)}
        temporal = [
            index
            for index, block in enumerate(decoder.up_blocks)
            if any(upsampler.add_temporal_upsample for upsampler in block.upsamplers or ())
        ]
        # Blocks that compute all frames of a step together, and blocks that compute them one by one.
        self._together = decoder.up_blocks[: max(temporal, default=-1) + 1]
        self._one_by_one = decoder.up_blocks[len(self._together) :]

    def stem(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (1, c, T, h, w) to the output (1, C, T, h, w) of the attention in the middle block."""
        decoder, middle = self._decoder, self._decoder.mid_block
        hidden = self._conv(decoder.conv_in, latents, None)
        torch.unflatten(hidden, 1, (-1, decoder.repeat)).add_(latents.unsqueeze(2))
        hidden = self._resnet(middle.resnets[0], hidden, None)
        return frame_causal_attention(middle.attentions[0], hidden, self._band)

    def step(self, hidden: torch.Tensor, history: History) -> torch.Tensor:
        """The stem's output (1, C, 1, h, w) for the next latent frame to its frames (1, 3, n, H, W).

        The first latent frame becomes one frame, every other one four (with the published temporal ratio).
        """
        hidden = self._resnet(self._decoder.mid_block.resnets[1], hidden, history)
        for block in self._together:
            hidden = self._up_block(block, hidden, history)
        return torch.cat([self._finish(frame, history) for frame in torch.split(hidden, 1, dim=2)], dim=2)

    def _finish(self, hidden: torch.Tensor, history: History) -> torch.Tensor:
        """One frame (1, C, 1, h, w) after the last temporal upsampling to its pixels (1, 3, 1, H, W)."""
        for block in self._one_by_one:
            hidden = self._up_block(block, hidden, history)
        hidden = _normed(self._decoder.norm_out, hidden, self._band, activate=True)
        return self._conv(self._decoder.conv_out, hidden, history)

    def _up_block(self, block: Any, hidden: torch.Tensor, history: History) -> torch.Tensor:
        for resnet in block.resnets:
            hidden = self._resnet(resnet, hidden, history)
        for upsampler in block.upsamplers or ():
            hidden = self._upsample(upsampler, hidden, history)
        return hidden

    def _resnet(self, block: ResnetBlock, x: torch.Tensor, history: History | None) -> torch.Tensor:
        if block.conv2 in self._empty and block.conv_shortcut is None:
            return x
        hidden = self._conv(block.conv1, _normed(block.norm1, x, self._band, activate=True), history)
        hidden = _normed(block.norm2, hidden, self._band, activate=True)
        hidden = self._conv(block.conv2, hidden, history)
        return hidden.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))

    def _upsample(self, block: Upsample, x: torch.Tensor, history: History) -> torch.Tensor:
        """(1, C, n, h, w) to (1, c, n, 2h, 2w), or 2n frames; the first frame of a video stays one frame.

        The convolution's channels are unpacked into neighbouring pixels and frames. So are those of `x`, repeated, as
        the shortcut.
        """
        first = block.add_temporal_upsample and not history.knows(block.conv)
        frames, repeats = (1, block.repeats // 2) if first else (1 + block.add_temporal_upsample, block.repeats)
        hidden: torch.Tensor = block._dcae_upsample_rearrange(self._conv(block.conv, x, history), r1=frames)
        if first:
            hidden = hidden[:, : hidden.shape[1] // 2]
        shortcut = block._dcae_upsample_rearrange(x, r1=frames)
        torch.unflatten(hidden, 1, (-1, repeats)).add_(shortcut.unsqueeze(2))
        return hidden

    def _conv(self, conv: CausalConv3d, x: torch.Tensor, history: History | None) -> torch.Tensor:
        """A causal convolution of (1, C, n, H, W). Without a history, `x` is the whole video."""
        kernel = conv.conv.weight[self._used[conv]]
        past, reach = kernel.shape[2] - 1, kernel.shape[4] // 2
        frames = list(torch.split(x, 1, dim=2))
        frames = (_after(None, frames) if history is None else history.extend(conv, frames))[_PAST - past :]
        height, width = x.shape[-2:]
        bands = list(_bands(height, x.shape[1] * len(frames) * (width + 2), self._band))
        whole: torch.Tensor | None = None
        for top, bottom in bands:
            rows = slice(max(top - reach, 0), bottom + reach)
            band = torch.cat([frame[..., rows, :] for frame in frames], dim=2)
            if reach:
                band = F.pad(band, (1, 1, int(top == 0), int(bottom == height), 0, 0), mode="replicate")
            done = _convolve(kernel, conv.conv.bias, band)  # (1, c, n, rows, W)
            if len(bands) == 1:
                return done
            if whole is None:
                whole = done.new_empty(*done.shape[:3], height, width)
            whole[..., top:bottom, :] = done
        assert whole is not None  # noqa: S101 - there is a band
        return whole


def frame_causal_attention(block: AttnBlock, x: torch.Tensor, band: int = BAND) -> torch.Tensor:
    """What `block` computes from (1, C, T, h, w): each frame attends to itself and to all frames before it.

    diffusers gives all frames at once to the kernel, with a mask of T h w x T h w. One frame's queries with the keys up
    to that frame need no mask.
    """
    normed = _normed(block.norm, x, band, activate=False)
    query, key, value = (_tokens(project(normed)) for project in (block.to_q, block.to_k, block.to_v))
    del normed
    size = x.shape[-2] * x.shape[-1]
    for end in range(size, query.shape[2] + 1, size):
        own = slice(end - size, end)
        query[:, :, own] = F.scaled_dot_product_attention(query[:, :, own], key[:, :, :end], value[:, :, :end])
    del key, value
    attended = torch.unflatten(query.squeeze(1).transpose(1, 2), 2, x.shape[2:])  # (1, C, T, h, w)
    projected: torch.Tensor = block.proj_out(attended)
    return projected.add_(x)


def use_frame_causal_attention(encoder: nn.Module) -> None:
    """Makes a VAE's encoder attend without a mask. diffusers fills the mask row by row: 8,000 for an image of 1080p."""
    for module in encoder.modules():
        if isinstance(module, AttnBlock):
            module.forward = partial(frame_causal_attention, module)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(1, C, T, h, w) to (1, 1, T h w, C)."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()


def _normed(norm: RMSNorm, x: torch.Tensor, band: int, *, activate: bool) -> torch.Tensor:
    """`norm` of (1, C, n, H, W), and its SiLU if `activate`. The norm computes in float32, a band at a time."""
    bands = list(_bands(x.shape[-2], x.shape[1] * x.shape[2] * x.shape[-1], band))
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for top, bottom in bands:
        part = x[..., top:bottom, :].float()
        length = part.square().sum(dim=1, keepdim=True).sqrt_().clamp_min_(_SHORTEST)
        part = (part / length).to(x.dtype).mul_(norm.scale).mul_(norm.gamma).add_(norm.bias)
        normed[..., top:bottom, :] = F.silu(part, inplace=True) if activate else part
    return normed


def _used(weight: torch.Tensor) -> tuple[slice, ...]:
    """The part of a kernel (c, C, 3, 3, 3) that is computed: on a CPU, without frames before and a border of zeros.

    Most kernels of the demo model have only their middle. With real weights, on a GPU, none has zeros to look for.
    """
    if weight.device.type != "cpu":
        return (slice(None),)
    past = bool(weight[:, :, :_PAST].any())
    middle = weight.clone()
    middle[..., 1, 1] = 0
    side = slice(None) if middle.any() else slice(1, 2)
    return (slice(None), slice(None), slice(None) if past else slice(_PAST, None), side, side)


def _is_empty(conv: CausalConv3d) -> bool:
    """Whether a convolution gives zero, as some of the demo model do. Looked for on a CPU alone."""
    return conv.conv.weight.device.type == "cpu" and not conv.conv.weight.any() and not conv.conv.bias.any()


def _convolve(kernel: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The convolution of (1, C, n + 2, H, W): (1, c, n, H - 2, W - 2), for a kernel (c, C, 3, 3, 3).

    Computed as one of two dimensions that has the three frames as channels. For a single output frame, that is the same
    memory read in the same order. On a CPU it takes half as long as PyTorch's convolution of three dimensions.
    """
    triples = x[0].unfold(1, kernel.shape[2], 1)  # (C, n, H, W, 3)
    frames = triples.permute(1, 0, 4, 2, 3).flatten(1, 2)  # (n, 3C, H, W)
    convolved = F.conv2d(frames, kernel.flatten(1, 2), bias)
    return convolved.transpose(0, 1).unsqueeze(0)


def _bands(height: int, row: int, band: int) -> Iterator[tuple[int, int]]:
    """First row and the row after the last one of each band, for rows of `row` numbers."""
    rows = max(band // row, 1)
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def _after(past: list[torch.Tensor] | None, frames: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*(past or [frames[0]] * _PAST), *frames]
