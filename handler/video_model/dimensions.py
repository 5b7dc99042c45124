"""The dimensions of the published models, and what follows from them: parameters and bytes. Imports no torch.

The memory plan and the cost model compute with these numbers, so that a machine without PyTorch can plan for a GPU that
it does not have. `tests/integration/handler/test_planning.py` compares every number with the modules themselves.
Source: the configurations of https://huggingface.co/hunyuanvideo-community.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

#: Bytes of a weight or of an activation: bfloat16 in transformers and text encoders, float16 in the VAE.
HALF: Final = 2
SINGLE: Final = 4


@dataclass(frozen=True)
class Transformer:
    """The denoising transformer: dual-stream blocks of `width` = `heads` x `head_size`."""

    layers: int = 54
    heads: int = 16
    head_size: int = 128
    #: Layers of the refiner, which the states of the text pass first.
    refiner_layers: int = 2
    latent_channels: int = 32
    text_width: int = 3584
    glyph_width: int = 1472
    glyph_hidden: int = 2048
    image_width: int = 1152

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_size

    @property
    def block_parameters(self) -> int:
        """Of one block: for both streams a modulation, query, key, value, output, and a feed-forward of 4 x width."""
        d = self.width
        stream = linear(d, 6 * d) + 4 * linear(d, d) + 2 * self.head_size + linear(d, 4 * d) + linear(4 * d, d)
        return 2 * stream

    def outside_parameters(self, channels: int, *, meanflow: bool) -> int:
        """All others: embedders, refiner and output. `channels` enter the model."""
        d = self.width
        time = linear(256, d) + linear(d, d)
        refiner_block = 2 * 2 * d + 4 * linear(d, d) + linear(d, 4 * d) + linear(4 * d, d) + linear(d, 2 * d)
        refiner = time + linear(self.text_width, d) + linear(d, d) + linear(self.text_width, d)
        glyphs = 2 * self.glyph_width + linear(self.glyph_width, self.glyph_hidden)
        glyphs += linear(self.glyph_hidden, self.glyph_hidden) + linear(self.glyph_hidden, d)
        image = 2 * self.image_width + linear(self.image_width, self.image_width) + linear(self.image_width, d) + 2 * d
        return (
            linear(channels, d)
            + image
            + refiner
            + self.refiner_layers * refiner_block
            + glyphs
            + time * (2 if meanflow else 1)
            + 3 * d  # an embedding for each of the three kinds of condition
            + linear(d, 2 * d)
            + linear(d, self.latent_channels)
        )

    def parameters(self, channels: int, *, meanflow: bool) -> int:
        """All of them."""
        return self.layers * self.block_parameters + self.outside_parameters(channels, meanflow=meanflow)


@dataclass(frozen=True)
class Vae:
    """The VAE. `channels` of the decoder's levels, from the latents on; the encoder has them in reverse order.

    A level has `resnets` residual blocks and ends with an upsampler, except the last. The first two upsamplers double
    the frames as well.
    """

    channels: tuple[int, ...] = (1024, 1024, 512, 256, 128)
    resnets: int = 3
    latent_channels: int = 32
    spatial: int = 16
    temporal: int = 4

    @property
    def decoder_parameters(self) -> int:
        """Of the decoder."""
        first, last = self.channels[0], self.channels[-1]
        total = conv(self.latent_channels, first) + 4 * conv(first, first) + 4 * first  # the middle's residual blocks
        total += 4 * conv(first, first, taps=1) + first  # its attention
        for level, width in enumerate(self.channels):
            total += self.resnets * 2 * (conv(width, width) + width)
            if level < len(self.channels) - 1:
                total += conv(width, self.channels[level + 1] * self.unpacked(level))
        return total + last + conv(last, 3)

    @property
    def encoder_parameters(self) -> int:
        """Of the encoder, which has one residual block fewer a level, and packs where the decoder unpacks."""
        widths = self.channels[::-1]
        last = widths[-1]
        total = conv(3, widths[0]) + 4 * conv(last, last) + 4 * last + 4 * conv(last, last, taps=1) + last
        for level, width in enumerate(widths):
            total += (self.resnets - 1) * 2 * (conv(width, width) + width)
            if level < len(widths) - 1:
                total += conv(width, widths[level + 1] // self.unpacked(len(widths) - 2 - level))
        return total + last + conv(last, 2 * self.latent_channels)

    def unpacked(self, level: int) -> int:
        """Values that the upsampler of a level makes of one: 2 x 2 pixels, and two frames in the first two levels."""
        return 8 if level < 2 else 4


@dataclass(frozen=True)
class Upsampler:
    """The network before a super-resolution stage, in float32: its widest layer's channels, and its parameters."""

    width: int
    parameters: int


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer."""
    return inputs * outputs + outputs


def conv(inputs: int, outputs: int, taps: int = 27) -> int:
    """Parameters of a convolution with 3 x 3 x 3 taps."""
    return inputs * outputs * taps + outputs


TRANSFORMER: Final = Transformer()
VAE: Final = Vae()
#: By checkpoint. That of 1080p has the widths that agree with the size of its file, 0.20 GB.
UPSAMPLERS: Final[Mapping[str, Upsampler]] = {
    "720p_sr_distilled": Upsampler(64, 2_102_496),
    "1080p_sr_distilled": Upsampler(512, 50_350_112),
}
