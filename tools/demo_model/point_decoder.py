"""The decoder's levels up to the features as a network of single points, which is quicker to train.

All kernels of the demo model's decoder have nothing but their middle, apart from the first one, which sees the cells on
both sides, and the one after it, which sees two latents before.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import nn

from tools.demo_model import drawing, wiring
from tools.demo_model.world import COVER_CHANNELS, LATENT_CHANNELS

#: What the first convolution sees of its kernel: the cells left, at and right of a cell.
TAPS: Final = 3
#: Frame, row and column of the middle of a kernel, and of the same in the latents before.
_MIDDLES: Final = ((2, 1, 1), (1, 1, 1), (0, 1, 1))
#: Channels of the levels up to the one that has the features.
_WIDTHS: Final = (64, 64, 64, 32)
#: Hidden units of each level's residual blocks: usual ones, and ones that work in the first frame alone.
_BLOCKS: Final = (((64, 0), (64, 0), (0, 64), (0, 64)), ((0, 64), (0, 64)), ((48, 16), (48, 16)), ((24, 8), (24, 8)))
#: How far units of the first frame are pushed down in others, how long their weights may be so that nothing lifts them
#: there, and what norms multiply them and usual units beside them by.
_GATE: Final = 4.0
_LONGEST: Final = 0.6
_SHUT: Final = 14.0
_OPEN: Final = 5.0


class _Units(nn.Module):
    """Some hidden units of a residual block."""

    def __init__(self, width: int, count: int, gamma: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, count), nn.Linear(count, width, bias=False)
        self.gamma = nn.Parameter(torch.full((count,), gamma))
        nn.init.zeros_(self.second.weight)


class Block(nn.Module):
    """A residual block of the decoder, for single points.

    Its usual units leave the channels alone that `wiring.carried` names. Those of the first frame write to all.
    """

    gate: torch.Tensor
    learned: torch.Tensor

    def __init__(self, level: int, usual: int, gated: int) -> None:
        super().__init__()
        width, names = _WIDTHS[level], wiring.LEVELS[level]
        self.usual = _Units(width, usual, _OPEN if gated else 1.0) if usual else None
        self.gated = _Units(width, gated, _SHUT) if gated else None
        self.gamma, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        gate = torch.zeros(width)
        gate[names.index("constant")], gate[names.index("first frame")] = -_GATE, 1.6 * _GATE
        self.gate = nn.Buffer(gate, persistent=False)
        learned = torch.ones(width, 1)
        learned[[names.index(name) for name in wiring.carried(level)]] = 0
        self.learned = nn.Buffer(learned, persistent=False)

    def weights(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Of both convolutions: weights, biases, and what the norm before multiplies by."""
        first: list[torch.Tensor] = []
        second: list[torch.Tensor] = []
        bias: list[torch.Tensor] = []
        gamma: list[torch.Tensor] = []
        if self.usual:
            first.append(self.usual.first.weight)
            bias.append(self.usual.first.bias)
            gamma.append(self.usual.gamma)
            second.append(self.usual.second.weight * self.learned)
        if self.gated:
            weight = self.gated.first.weight
            first.append(weight * (_LONGEST / weight.norm(dim=1, keepdim=True)).clamp(max=1) + self.gate)
            bias.append(torch.tanh(self.gated.first.bias))
            gamma.append(self.gated.gamma)
            second.append(self.gated.second.weight)
        own = self.bias * self.learned[:, 0] if self.usual else self.bias
        return (torch.cat(first), torch.cat(bias), self.gamma), (torch.cat(second, dim=1), own, torch.cat(gamma))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = x
        for weight, bias, gamma in self.weights():
            length = (found.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()
            found = F.linear(F.silu(found / length * (found.shape[-1] ** 0.5 * gamma)), weight, bias)
        return x + found


class PointDecoder(nn.Module):
    """The decoder's levels up to the features, for single points."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(TAPS * LATENT_CHANNELS, _WIDTHS[0])
        first: Any = self.first
        wiring.start_first(first.weight.view(_WIDTHS[0], TAPS, LATENT_CHANNELS), first.bias)
        named = torch.arange(_WIDTHS[0]) < len(wiring.LEVELS[0])
        first.weight.register_hook(lambda gradient: gradient.masked_fill(named[:, None], 0))
        first.bias.register_hook(lambda gradient: gradient.masked_fill(named, 0))
        self.levels = nn.ModuleList(
            nn.Sequential(*(Block(level, *units) for units in blocks)) for level, blocks in enumerate(_BLOCKS)
        )
        for level, wide, narrow in ((level, *_WIDTHS[level : level + 2]) for level in range(3)):
            wires = wiring.upsampling_weights(level, wide, narrow)
            self.register_buffer(f"wires {level}", wires, persistent=False)
        known = len(wiring.LEVELS[2])
        #: The free channels of squares of 8 x 8 pixels, from the named ones.
        self.mix = nn.Linear(known, _WIDTHS[2] - known)
        #: Distances and free channels of the 2 x 2 squares in each, from all its channels.
        self.near = nn.Linear(_WIDTHS[2], 4 * (4 + _WIDTHS[3] - len(wiring.LEVELS[3])))

    def forward(self, seen: torch.Tensor, frame: int | None) -> torch.Tensor:
        """(n, 3, taps, channels) to (n, 4, 4, 4, channels): the quarters of quarters of the quarters of each cell.

        `frame` is one of a latent's eight, or None for the only one of the first latent. The latents before it come
        after it.
        """
        seen = seen.clone()
        seen[..., COVER_CHANNELS] = 0
        x: torch.Tensor = self.levels[0](self.first(seen.flatten(2))).flatten(1)
        for level, (wide, narrow) in enumerate(pairwise(_WIDTHS)):
            weight, bias = self.upsampling(level)
            half = 0 if frame is None else frame >> (2 - level) & 1
            used = slice(0, 8, 2) if frame is None else slice(4 * half, 4 * half + 4)
            weight = weight[used]
            if frame is None:  # the first frame has another shortcut
                other = wiring.shortcut(4, narrow, wide) - wiring.shortcut(8, narrow, wide)[used]
                weight = weight + F.pad(other, (0, weight.shape[2] - wide))
            x = self.levels[level + 1](torch.einsum("...i,poi->...po", x, weight) + bias[used])
        return x

    def blocks(self, level: int) -> list[Block]:
        """The residual blocks of a level."""
        level_: Any = self.levels[level]
        return list(level_)

    def squares(self, named: torch.Tensor) -> torch.Tensor:
        """Named channels (n, c) of squares of 8 x 8 pixels to all channels (n, 4, C) of the 2 x 2 squares in each."""
        weight, bias = (of[:4] for of in self.upsampling(2))
        x = self.levels[2](torch.cat([named, self.mix(named)], dim=-1))
        found: torch.Tensor = self.levels[3](torch.einsum("ni,poi->npo", x, weight) + bias)
        return found

    def upsampling(self, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(8, outputs, inputs) and (8, outputs): what an upsampling computes at its places, shortcut included."""
        weight: torch.Tensor = self.get_buffer(f"wires {level}").clone()
        bias = torch.zeros(weight.shape[:2])
        known = len(wiring.LEVELS[level + 1])
        if level == 1:
            weight[:, known:] = self.mix.weight @ weight[:, :known]
            bias[:, known:] = self.mix.bias
        elif level == 2:
            learned = [*range(4), *range(known, weight.shape[1])]
            weight[:, learned] = self.near.weight.view(4, len(learned), -1).repeat(2, 1, 1)
            bias[:, learned] = self.near.bias.view(4, -1).repeat(2, 1)
        return weight, bias


def neighbourhoods(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, T, h, w) to (B, 3, taps, C, T, h, w), padded as in the decoder: each latent, and the two before it."""
    frames, columns = latents.shape[2], latents.shape[4]
    padded = F.pad(latents, (1, 1, 0, 0, 2, 0), mode="replicate")
    sides = torch.stack([padded[..., x : x + columns] for x in range(TAPS)], dim=1)
    return torch.stack([sides[:, :, :, 2 - ago : 2 - ago + frames] for ago in range(len(_MIDDLES))], dim=1)


def quarters(features: torch.Tensor) -> torch.Tensor:
    """(B, F, 8h, 8w) to (B, h, w, 4, 4, 4, F): sides are halved three times, as the decoder's levels double them."""
    batch, count, height, width = features.shape
    split = features.view(batch, count, height // 8, 2, 2, 2, width // 8, 2, 2, 2)
    return split.permute(0, 2, 6, 3, 7, 4, 8, 5, 9, 1).flatten(7, 8).flatten(5, 6).flatten(3, 4)


@torch.no_grad()
def put(average: dict[str, torch.Tensor], decoder: Any) -> None:
    """Builds the decoder from a trained network and the levels that draw. Its attention does nothing."""
    network = PointDecoder()
    network.load_state_dict(average)
    torch.manual_seed(0)
    drawing.start(decoder)
    kernel = decoder.conv_in.conv.weight
    kernel.zero_()
    kernel[:, :, -1, 1] = network.first.weight.view(_WIDTHS[0], TAPS, LATENT_CHANNELS).movedim(1, 2)
    kernel[:, COVER_CHANNELS] = 0
    kernel[:, :, *_MIDDLES[0]] -= torch.eye(LATENT_CHANNELS)  # the decoder adds the latents
    decoder.conv_in.conv.bias.copy_(network.first.bias)
    for parameter in decoder.mid_block.attentions[0].proj_out.parameters():
        parameter.zero_()
    resnets = [*decoder.mid_block.resnets, *(resnet for block in decoder.up_blocks[:4] for resnet in block.resnets)]
    blocks = [block for level in range(len(_BLOCKS)) for block in network.blocks(level)]
    for resnet, block in zip(resnets, blocks, strict=True):
        norms, convs = (resnet.norm1, resnet.norm2), (resnet.conv1.conv, resnet.conv2.conv)
        for (weight, bias, gamma), norm, conv in zip(block.weights(), norms, convs, strict=True):
            norm.gamma.copy_(gamma.view_as(norm.gamma))
            _put_middle(weight, bias, conv)
    for level, (wide, narrow) in enumerate(pairwise(_WIDTHS)):
        weight, bias = network.upsampling(level)
        weight[..., :wide] -= wiring.shortcut(8, narrow, wide)
        _put_middle(weight.flatten(0, 1), bias.flatten(), decoder.up_blocks[level].upsamplers[0].conv.conv)


def _put_middle(weight: torch.Tensor, bias: torch.Tensor, convolution: Any) -> None:
    """Into the middle of a kernel, and of its earlier frames if there is a weight for them."""
    convolution.weight.zero_()
    width = convolution.weight.shape[1]
    for ago in range(weight.shape[1] // width):
        convolution.weight[:, :, *_MIDDLES[ago]] = weight[:, ago * width : (ago + 1) * width]
    convolution.bias.copy_(bias)
