"""How the decoder's last three levels draw: a machine that is built by hand.

Left to themselves, these narrow levels learn to blur. So the level at a quarter of the resolution gets `FEATURES`
channels with a meaning (`NAMES`), two linear upsamplings carry them to full resolution, and a residual block chooses
between an object's colour and the scene's at each pixel. The levels below give the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch

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
#: What norms multiply by so that the activation is nearly linear.
_LINEAR: Final = 2.0**-8
#: By how much c falls in a pixel, how hard the activation's knee is, and the length of what is divided by its length.
_STEEPNESS: Final = 3.0
_HARDNESS: Final = 2.0
_LENGTH: Final = 1000.0
#: What distances are multiplied by, because far from outlines they can be anything.
_SHORTER: Final = 1 / 16
#: Of the output's norm. In 16 bits, it has to be below 65,504 with the scale.
_LAST_CONSTANT: Final = 30.0


@torch.no_grad()
def start(decoder: Any, scale: float = 1.0) -> None:
    """Sets the last three levels of the decoder, for features that come multiplied by `scale`."""
    for resnet in (resnet for block in decoder.up_blocks[3:] for resnet in block.resnets):
        resnet.conv2.conv.weight.zero_()
        resnet.conv2.conv.bias.zero_()
    _carry(decoder.up_blocks[3].upsamplers[0], _to_half, spread=False)
    _carry(decoder.up_blocks[4].upsamplers[0], _to_full, spread=True)
    _choose(decoder, scale)


#: Output channel, input channel, weight.
_Wires = list[tuple[int, int, float]]


def _to_half(place: int) -> _Wires:
    """To one of the 2 x 2 places: 16 features to 8."""
    distance, light = place, 10 + place
    same = [(0, distance), *((1 + c, 4 + c) for c in range(6)), (_WIDTH - 1, FEATURES - 1)]
    return [(*wire, 1.0) for wire in same] + [(4 + c, light, 1.0) for c in range(3)]


def _to_full(_: int) -> _Wires:
    return [(c, c, 1.0 if c else _SHORTER) for c in range(_WIDTH)]


def _carry(upsampler: Any, wires: Callable[[int], _Wires], *, spread: bool) -> None:
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
        for output, source, factor in wires(place):
            weight[place * _WIDTH + output, source, -1] += factor * taps
    for output in range(weight.shape[0]):
        weight[output, output // upsampler.repeats, -1, 1, 1] -= 1


def _choose(decoder: Any, scale: float) -> None:
    """Sets the last residual block to choose a colour for each pixel, the thing's or the scene's, and the output.

    For each of red, green and blue, with a = thing - scene and c from far below -2 outside to far above 2 inside, the
    block adds (silu(a + c) - silu(c - a)) / 2 to the scene: nothing outside, a inside, and between them on outlines.
    The norms divide by a pixel's length, so a constant that is larger than all else makes this length nearly the same.
    """
    block = decoder.up_blocks[-1].resnets[0]
    convs = (block.conv1.conv, block.conv2.conv, decoder.conv_out.conv)
    first, second, output = (torch.zeros(conv.weight.shape[:2]) for conv in convs)
    colours = [(thing, thing + 3) for thing in (1, 2, 3)]
    for index, (thing, scene) in enumerate(colours):
        for unit, sign in ((2 * index, 1.0), (2 * index + 1, -1.0)):
            first[unit, 0] = -_STEEPNESS * REACH / _SHORTER
            first[unit, thing], first[unit, scene] = sign, -sign
            second[scene, unit] = sign * scale / (2 * _HARDNESS)
        output[index, scene] = 2 * _LAST_CONSTANT / (_LINEAR * math.sqrt(_WIDTH))
    first[-1, -1] = _LENGTH / CONSTANT
    gammas = (_LINEAR, _HARDNESS * _LENGTH / math.sqrt(_WIDTH), _LINEAR)
    norms = (block.norm1, block.norm2, decoder.norm_out)
    for conv, norm, weight, gamma in zip(convs, norms, (first, second, output), gammas, strict=True):
        conv.weight.zero_()
        conv.weight[:, :, -1, 1, 1] = weight
        conv.bias.zero_()
        norm.gamma.fill_(gamma)
    block.conv2.conv.bias[-1] = scale * (_LAST_CONSTANT - CONSTANT)
