"""How the decoder draws the first frame, which `HunyuanVideo15Upsample` unpacks in a way of its own.

It unpacks it with the weights of other places, and what its shortcut adds is different. Three things make up for that.
Each level's channels are many times larger than those of the level before, so what is added hardly matters. What has to
be different at each place comes from copies of channels that are zero in all other frames; a residual block makes them.
And things have not turned yet, so the flag that says that it is the first frame stands for all constants.
Source: `HunyuanVideo15Upsample` in diffusers, models/autoencoders/autoencoder_kl_hunyuanvideo15.py.
"""

from __future__ import annotations

from typing import Final

import torch

from tools.demo_model import drawing
from tools.demo_model.wiring import COPY, LEARNED, LEVELS, SPARE, WIDTHS, at
from tools.demo_model.world import FIRST_FRAME_FLAG

#: How large the levels' channels are. 16-bit floats end at 65,504.
SCALES: Final = (1.0, 8.0, 64.0, 1024.0)
#: What its 2 x 2 places are unpacked from.
PLACES: Final = [0, 2, 4, 6]


def added_weights(level: int, weight: torch.Tensor) -> torch.Tensor:
    """(4, outputs, inputs): what has to be added to weights at the places that the first frame comes from.

    It comes from channels that are zero in all other frames.
    """
    now = torch.unflatten(weight, 2, (-1, WIDTHS[level])).sum(dim=2)  # all latents are the first one
    wanted, found = now[:4].clone(), now[PLACES] + other_shortcut(level)
    for copy, source in _copied(level + 1):
        wanted[:, copy] = wanted[:, source]
    missing = wanted - found
    added = torch.zeros_like(missing)
    for copy, source in _copied(level):
        added[:, :, copy] = missing[:, :, copy] + missing[:, :, source]
    for spare in at(level, SPARE):
        added[:, :, spare] = missing[:, :, spare]
    constant, flag, cos, mirror = (LEVELS[level].index(name) for name in ("constant", "first frame", "cos", "mirror"))
    constants = drawing.CONSTANT * missing[:, :, constant] + missing[:, :, cos] + missing[:, :, mirror]
    added[:, :, flag] = missing[:, :, flag] + constants / FIRST_FRAME_FLAG
    return added


def _copied(level: int) -> list[tuple[int, int]]:
    """Each copy and what it is of."""
    names = LEVELS[level]
    return [(copy, names.index(names[copy].removeprefix(COPY))) for copy in at(level, COPY)]


def shortcut(level: int, places: int = 8) -> torch.Tensor:
    """(places, outputs, inputs): what the shortcut adds to the convolution. The first frame has four places."""
    narrow, wide = WIDTHS[level + 1], WIDTHS[level]
    return torch.eye(wide).view(places, wide // places, wide).repeat_interleave(places * narrow // wide, dim=1)


def other_shortcut(level: int) -> torch.Tensor:
    """(4, outputs, inputs): what the shortcut adds in the first frame alone, by the scale of the outputs."""
    other = shortcut(level, 4) - shortcut(level)[PLACES]
    return other * SCALES[level] / SCALES[level + 1]


#: The weights of a residual block: of each convolution, what the norm before multiplies by, weight and bias.
Weights = tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
#: What the first norm of the copying block multiplies by, so that the activation is nearly linear; what the second one
#: makes of the flag, where the activation is a line, and of the minus in other frames, where it is zero; how much
#: larger the flag is than a channel of one, and how large the minus is beside it.
_LINEAR: Final = 2.0**-10
_OPEN: Final = 14.0
_LARGER: Final = 40.0
_BELOW: Final = 0.25


def copies() -> Weights:
    """A residual block that makes the copies, and clears the learned channels. It does nothing but in the first frame.

    A pair of hidden units has the flag, and a little of the channel more or less. Both are where the activation is a
    line, or both are closed. Their difference is the channel, whatever the norms divide by, because the flag is divided
    by the same.
    """
    names = LEVELS[0]
    made = [(copy, source, 1.0) for copy, source in _copied(0)]
    made += [(channel, channel, -1.0) for channel in at(0, LEARNED)]
    first, second = torch.zeros(WIDTHS[0], WIDTHS[0]), torch.zeros(WIDTHS[0], WIDTHS[0])
    for pair, (output, source, factor) in enumerate(made):
        for unit, sign in ((2 * pair, 1.0), (2 * pair + 1, -1.0)):
            first[unit, names.index("first frame")] = (1 + _BELOW) * _LARGER / FIRST_FRAME_FLAG
            first[unit, names.index("constant")] = -_BELOW * _LARGER / drawing.CONSTANT
            first[unit, source] = sign
            second[output, unit] = factor * sign * _LARGER / (2 * _OPEN)
    used = 2 * len(made)
    open_ = _OPEN * (used / WIDTHS[0]) ** 0.5
    zeros = torch.zeros(WIDTHS[0])
    return (torch.full((WIDTHS[0],), _LINEAR), first, zeros), (torch.full((WIDTHS[0],), open_), second, zeros)
