"""How the decoder's last three levels start: as a machine that draws, built by hand but for a few weights.

Left to themselves, these narrow levels learn to blur. So the level at a quarter of the resolution gets `FEATURES`
channels with a meaning (`features`), two linear upsamplings carry them to full resolution, and a few weights, trained
on random numbers in a minute, choose between an object's colour and the scene's at each pixel. `train_decoder.py`
trains the levels below, which give the features.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import nn

from tools.demo_model.world import FPS, Batch, cells

log = logging.getLogger(__name__)

#: At a quarter of the resolution: distances and how much brighter the scene is, at 2 x 2 places, and colours.
NAMES: Final = (
    *(f"distance {place}" for place in range(4)),
    *("thing red", "thing green", "thing blue", "scene red", "scene green", "scene blue"),
    *(f"light {place}" for place in range(4)),
    "constant",
)
FEATURES: Final = len(NAMES)
#: Pixels from an outline that are told apart.
REACH: Final = 4.0
#: Larger than what varies, so that the norms, which divide by a pixel's length, change little.
CONSTANT: Final = 3.0
#: At half and at full resolution: distance, the object's colour, the scene's colour, the constant.
_WIDTH: Final = 8
#: Of the training of single pixels: a minute on one core.
STEPS: Final = 2500
_ATTEMPTS, _SAMPLES, _RATE = 24, 1024, 1.5e-2


def features(batch: Batch, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the drawing levels expect for these frames, (B, FEATURES, n, H / 4, W / 4), and where it matters, alike."""
    seconds = torch.arange(first, last) / FPS
    fine, coarse = (batch.distances(seconds, spacing) for spacing in (2, 4))
    distance = cells(fine.amin(dim=1).clamp(-REACH, REACH) / REACH, 2)
    nearness = torch.softmax(-coarse / 2, dim=1)
    colour = 2 * torch.einsum("bnthw,bnc->bcthw", nearness, batch.colour) - 1
    frames = distance.shape[2]
    light = cells(batch.light(), 2)[:, :, 0]
    scene = F.avg_pool2d(batch.plain(), 4)
    still = torch.cat([2 * scene - 1, 2 * light], dim=1).unsqueeze(2).expand(-1, -1, frames, -1, -1)
    constant = torch.full_like(distance[:, :1], CONSTANT)
    found = torch.cat([distance, colour, still, constant], dim=1)
    matters = torch.ones_like(found)
    matters[:, 10:14] = 6.0
    near = coarse.amin(dim=1, keepdim=True)
    matters[:, :4] = 1 + 2 * (near.abs() < 6)
    matters[:, 4:7] = (near < 8).float()
    return found, matters


@torch.no_grad()
def start(decoder: Any, steps: int | None = None) -> None:
    """Sets the last three levels of the decoder. `steps` are those for single pixels, by default STEPS."""
    for resnet in (resnet for block in decoder.up_blocks[3:] for resnet in block.resnets):
        resnet.conv2.conv.weight.zero_()
        resnet.conv2.conv.bias.zero_()
    _carry(decoder.up_blocks[3].upsamplers[0], _to_half, spread=False)
    _carry(decoder.up_blocks[4].upsamplers[0], _to_full, spread=True)
    _choose(decoder, STEPS if steps is None else steps)


def _to_half(place: int) -> list[tuple[int, int]]:
    """(output, input) channels of one of the 2 x 2 places: 16 features to 8."""
    same = [(0, place), *((1 + c, 4 + c) for c in range(3)), *((4 + c, 7 + c) for c in range(3)), (7, 14)]
    return same + [(4 + c, 10 + place) for c in range(3)]


def _to_full(_: int) -> list[tuple[int, int]]:
    return [(c, c) for c in range(_WIDTH)]


def _carry(upsampler: Any, channels: Callable[[int], list[tuple[int, int]]], *, spread: bool) -> None:
    """Makes an upsampling a linear map of channels, bilinear if `spread`, and takes its shortcut away."""
    weight = upsampler.conv.conv.weight
    weight.zero_()
    upsampler.conv.conv.bias.zero_()
    for place in range(4):
        row, column = divmod(place, 2)
        taps = torch.zeros(3, 3)
        if spread:
            for dy, y in ((1, 0.75), (2 * row, 0.25)):
                for dx, x in ((1, 0.75), (2 * column, 0.25)):
                    taps[dy, dx] += y * x
        else:
            taps[1, 1] = 1
        for output, source in channels(place):
            weight[place * _WIDTH + output, source, -1] += taps
    for output in range(weight.shape[0]):
        weight[output, output // upsampler.repeats, -1, 1, 1] -= 1


class _Chooser(nn.Module):
    """Several attempts at the last level and the output, for pixels on their own."""

    def __init__(self) -> None:
        super().__init__()

        def normal(rows: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(_ATTEMPTS, rows, _WIDTH) * scale / math.sqrt(_WIDTH))

        self.maps = nn.ParameterList([normal(_WIDTH, 1.0), normal(_WIDTH, 0.5), normal(3, 0.5)])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(_ATTEMPTS, m.shape[1])) for m in self.maps])
        self.gammas = nn.ParameterList([nn.Parameter(torch.ones(_ATTEMPTS, _WIDTH)) for _ in range(3)])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 8) to (attempts, n, 3)."""
        x = pixels.expand(_ATTEMPTS, -1, -1)
        return self._map(2, x + self._map(1, self._map(0, x)))

    def _map(self, index: int, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = F.normalize(x, dim=-1) * math.sqrt(_WIDTH) * self.gammas[index][:, None]
        mapped: torch.Tensor = torch.einsum("enc,edc->end", F.silu(normed), self.maps[index])
        biased: torch.Tensor = mapped + self.biases[index][:, None]
        return biased


@torch.enable_grad()
def _choose(decoder: Any, steps: int) -> None:
    """Trains the weights of single pixels, and puts the best attempt into the decoder."""
    chooser = _Chooser()
    optimizer = torch.optim.Adam(chooser.parameters(), lr=_RATE, betas=(0.9, 0.98))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _RATE * min(1, (step + 1) / 100, (1 - step / steps) / 0.6 + 0.003)
        pixels, wanted = _random_pixels(_SAMPLES)
        error = chooser(pixels) - wanted
        losses = error.abs().mean(dim=(1, 2)) + error.square().mean(dim=(1, 2))
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    with torch.no_grad():
        pixels, wanted = _random_pixels(20_000)
        errors = (chooser(pixels) - wanted).square().mean(dim=(1, 2))
        best = int(errors.argmin())
        log.info("pixels near outlines: %.1f dB", 10 * math.log10(4 / float(errors[best])))
        resnet = decoder.up_blocks[-1].resnets[0]
        convs = (resnet.conv1.conv, resnet.conv2.conv, decoder.conv_out.conv)
        for index, (conv, norm) in enumerate(zip(convs, (resnet.norm1, resnet.norm2, decoder.norm_out), strict=True)):
            conv.weight.zero_()
            conv.weight[:, :, -1, 1, 1] = chooser.maps[index][best]
            conv.bias.copy_(chooser.biases[index][best])
            norm.gamma.copy_(chooser.gammas[index][best].view_as(norm.gamma))


def _random_pixels(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (n, 8), most of them near an outline, and their colours (n, 3) from -1 to 1."""
    colours = 2 * torch.rand(2, count, 3) - 1
    pure = torch.rand(2, count, 1) < 0.3
    thing, scene = torch.where(pure, 0.9 * colours.sign(), colours)
    close = torch.rand(count, 1) < 0.6
    distance = (2 * torch.rand(count, 1) - 1) * torch.where(close, 1.5, REACH)
    cover = (0.5 - distance).clamp(0, 1)
    constant = torch.full((count, 1), CONSTANT)
    return torch.cat([distance / REACH, thing, scene, constant], dim=1), scene + cover * (thing - scene)
