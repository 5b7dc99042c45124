"""The decoder's levels up to the features as a network of single points, which is quicker to train.

All kernels of the demo model's decoder have nothing but their middle, apart from the first one, which sees the cells on
both sides, and the one after it, which sees two latents before.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import nn

from tools.demo_model import drawing, first_frame, wiring
from tools.demo_model.world import COVER_CHANNELS, LATENT_CHANNELS

#: What the first convolution sees of its kernel: the cells left, at and right of a cell.
TAPS: Final = 3
#: Frame, row and column of the middle of a kernel, and of the same in the latents before.
_MIDDLES: Final = ((2, 1, 1), (1, 1, 1), (0, 1, 1))
#: Hidden units of the residual blocks that learn: usual ones, and ones that work in the first frame alone.
_BLOCKS: Final = {0: ((64, 0), (64, 0)), 2: ((48, 16), (48, 16)), 3: ((24, 8), (24, 8))}
#: How far units of the first frame are pushed down in others, how long their weights may be so that nothing lifts them
#: there, and what norms multiply them and usual units beside them by.
_GATE: Final = 4.0
_LONGEST: Final = 0.6
_SHUT: Final = 30.0
_OPEN: Final = 5.0


class _Units(nn.Module):
    """Some hidden units of a residual block."""

    def __init__(self, width: int, count: int, gamma: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, count), nn.Linear(count, width, bias=False)
        self.gamma = nn.Parameter(torch.full((count,), gamma))
        nn.init.zeros_(self.second.weight)


class Block(nn.Module):
    """A residual block of the decoder, for single points. It writes to nothing that `wiring` carries."""

    gate: torch.Tensor
    learned: torch.Tensor

    def __init__(self, level: int, usual: int, gated: int) -> None:
        super().__init__()
        width, names = wiring.WIDTHS[level], wiring.LEVELS[level]
        self.usual = _Units(width, usual, _OPEN if gated else 1.0)
        self.gated = _Units(width, gated, _SHUT) if gated else None
        self.gamma, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        gate = torch.zeros(width)
        gate[names.index("constant")], gate[names.index("first frame")] = -_GATE, 1.6 * _GATE
        self.gate = nn.Buffer(gate, persistent=False)
        learned = torch.zeros(2, width)
        learned[:, wiring.at(level, "distance", wiring.LEARNED)] = 1
        learned[1, wiring.at(level, wiring.SPARE)] = 1
        if level == 0:
            learned[0, [names.index(axis) for axis in wiring.AXES]] = 1
        self.learned = nn.Buffer(learned, persistent=False)

    def weights(self) -> first_frame.Weights:
        """Of both convolutions."""
        first: list[torch.Tensor] = [self.usual.first.weight]
        bias: list[torch.Tensor] = [self.usual.first.bias]
        gamma: list[torch.Tensor] = [self.usual.gamma]
        second = [self.usual.second.weight * self.learned[0, :, None]]
        if self.gated:
            weight = self.gated.first.weight
            first.append(weight * (_LONGEST / weight.norm(dim=1, keepdim=True)).clamp(max=1) + self.gate)
            bias.append(torch.tanh(self.gated.first.bias))
            gamma.append(self.gated.gamma)
            second.append(self.gated.second.weight * self.learned[1, :, None])
        own = self.bias * self.learned[0]
        return (self.gamma, torch.cat(first), torch.cat(bias)), (torch.cat(gamma), torch.cat(second, dim=1), own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = x
        for gamma, weight, bias in self.weights():
            length = (found.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()
            found = F.linear(F.silu(found / length * (found.shape[-1] ** 0.5 * gamma)), weight, bias)
        return x + found


class PointDecoder(nn.Module):
    """What is learned of the decoder's levels up to the features, for single points."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(TAPS * LATENT_CHANNELS, wiring.WIDTHS[0])
        first: Any = self.first
        wiring.start_first(first.weight.view(wiring.WIDTHS[0], TAPS, LATENT_CHANNELS), first.bias)
        known = torch.ones(wiring.WIDTHS[0], dtype=torch.bool)
        known[wiring.at(0, wiring.LEARNED)] = False
        first.weight.register_hook(lambda gradient: gradient.masked_fill(known[:, None], 0))
        first.bias.register_hook(lambda gradient: gradient.masked_fill(known, 0))
        self.levels = nn.ModuleDict(
            {
                str(level): nn.Sequential(*(Block(level, *units) for units in blocks))
                for level, blocks in _BLOCKS.items()
            }
        )
        for level in range(3):
            self.register_buffer(f"wires {level}", wiring.upsampling_weights(level), persistent=False)
        self.mixed = wiring.at(2, wiring.LEARNED)
        self.known = [channel for channel in range(wiring.WIDTHS[2]) if channel not in self.mixed]
        self.found = wiring.at(3, "distance", wiring.LEARNED)
        #: The learned channels of squares of 8 x 8 pixels, from all others.
        self.mix = nn.Linear(len(self.known), len(self.mixed))
        #: Distances and learned channels of the 2 x 2 squares in each, from all its channels.
        self.near = nn.Linear(wiring.WIDTHS[2], 4 * len(self.found))
        #: What the first frame has instead, because it is unpacked from other places.
        self._only_first = wiring.at(2, wiring.SPARE, "first frame")
        self.first_near = nn.Linear(len(self._only_first), 4 * len(self.found), bias=False)
        nn.init.zeros_(self.first_near.weight)

    def blocks(self, level: int) -> list[Block]:
        """The residual blocks of a level that learn."""
        level_: Any = self.levels[str(level)]
        return list(level_)

    def mixed_into(self, named: torch.Tensor) -> torch.Tensor:
        """Squares of 8 x 8 pixels (n, c) with their learned channels, whatever was there before."""
        x = named.clone()
        x[:, self.mixed] = self.mix(named[:, self.known])
        return x

    def squares(self, x: torch.Tensor, *, is_first: bool = False) -> torch.Tensor:
        """Squares of 8 x 8 pixels (n, c) to the 2 x 2 squares in each (n, 4, C), in the first half of the time."""
        weight, bias = self.upsampling(2)
        used = first_frame.PLACES if is_first else slice(4)
        weight, bias = weight[used], bias[used]
        if is_first:
            weight = weight + first_frame.other_shortcut(2)
        x = torch.einsum("ni,poi->npo", self.levels["2"](x), weight) + bias
        found: torch.Tensor = self.levels["3"](x)
        return found

    def upsampling(self, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(8, outputs, inputs) and (8, outputs): what an upsampling computes at its places, shortcut included."""
        weight: torch.Tensor = self.get_buffer(f"wires {level}").clone()
        bias = torch.zeros(weight.shape[:2])
        if level == 1:
            weight[:, self.mixed] = self.mix.weight @ weight[:, self.known]
            bias[:, self.mixed] = self.mix.bias
        weight[first_frame.PLACES, :, : wiring.WIDTHS[level]] += first_frame.added_weights(level, weight)
        if level == 2:
            count = len(self.found)
            weight[:, self.found] = self.near.weight.view(4, count, -1).repeat(2, 1, 1)
            bias[:, self.found] = self.near.bias.view(4, count).repeat(2, 1)
            rows, columns = torch.tensor(self.found)[:, None], torch.tensor(self._only_first)
            for place, first in zip(first_frame.PLACES, self.first_near.weight.view(4, count, -1), strict=True):
                weight[place, rows, columns] = first
        return weight, bias


@torch.no_grad()
def put(average: dict[str, torch.Tensor], decoder: Any) -> None:
    """Builds the decoder from a trained network and the levels that draw. Its attention does nothing."""
    network = PointDecoder()
    network.load_state_dict(average)
    drawing.start(decoder, first_frame.SCALES[-1])
    kernel = decoder.conv_in.conv.weight
    kernel.zero_()
    kernel[:, :, -1, 1] = network.first.weight.view(wiring.WIDTHS[0], TAPS, LATENT_CHANNELS).movedim(1, 2)
    kernel[:, COVER_CHANNELS] = 0
    kernel[:, :, *_MIDDLES[0]] -= torch.eye(LATENT_CHANNELS)  # the decoder adds the latents
    decoder.conv_in.conv.bias.copy_(network.first.bias)
    for parameter in decoder.mid_block.attentions[0].proj_out.parameters():
        parameter.zero_()
    learned = {level: [block.weights() for block in network.blocks(level)] for level in _BLOCKS}
    for level, resnets in enumerate(
        (
            [*decoder.mid_block.resnets, *decoder.up_blocks[0].resnets],
            *(decoder.up_blocks[i].resnets for i in (1, 2, 3)),
        )
    ):
        blocks = learned.get(level, []) + ([first_frame.copies()] if level == 0 else [])
        for resnet, weights in zip_longest(resnets, blocks):
            _put_block(weights, resnet, first_frame.SCALES[level])
    for level in range(3):
        weight, bias = network.upsampling(level)
        scale = first_frame.SCALES[level + 1]
        weight *= scale / first_frame.SCALES[level]
        weight[..., : wiring.WIDTHS[level]] -= first_frame.shortcut(level)
        upsampling = decoder.up_blocks[level].upsamplers[0].conv.conv
        _put_middle(weight.flatten(0, 1), scale * bias.flatten(), upsampling)


def _put_block(weights: first_frame.Weights | None, resnet: Any, scale: float) -> None:
    """A block that adds nothing, where there is none."""
    for parameter in resnet.conv2.conv.parameters():
        parameter.zero_()
    if weights:
        (gamma, weight, bias), (gamma_2, weight_2, bias_2) = weights
        for norm, of in ((resnet.norm1, gamma), (resnet.norm2, gamma_2)):
            norm.gamma.copy_(of.view_as(norm.gamma))
        _put_middle(weight, bias, resnet.conv1.conv)
        _put_middle(scale * weight_2, scale * bias_2, resnet.conv2.conv)


def _put_middle(weight: torch.Tensor, bias: torch.Tensor, convolution: Any) -> None:
    """Into the middle of a kernel, and of its earlier frames if there is a weight for them."""
    convolution.weight.zero_()
    width = convolution.weight.shape[1]
    for ago in range(weight.shape[1] // width):
        convolution.weight[:, :, *_MIDDLES[ago]] = weight[:, ago * width : (ago + 1) * width]
    convolution.bias.copy_(bias)
