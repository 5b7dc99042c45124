"""Previews: a small JPEG of what the latents of an unfinished render show.

A projection turns the channels of each latent into pixels. It takes milliseconds where the VAE takes seconds.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from PIL import Image
from safetensors.torch import load_file, save_file

from contract.result import MAX_PREVIEW_BYTES

#: Pixels of a preview's longer side.
_SIDE: Final = 320
_QUALITY: Final = 80

#: Red, green and blue of each channel of HunyuanVideo-1.5's latents, as the transformer scales them, and what is added.
#: Measured by others. Source: https://github.com/comfyanonymous/ComfyUI, comfy/latent_formats.py (HunyuanVideo15);
#: latent_preview.py there takes the sums as colours from -1 to 1.
_PUBLISHED: Final = (
    (0.0568, -0.0521, -0.0131),
    (0.0014, 0.0735, 0.0326),
    (0.0186, 0.0531, -0.0138),
    (-0.0031, 0.0051, 0.0288),
    (0.0110, 0.0556, 0.0432),
    (-0.0041, -0.0023, -0.0485),
    (0.0530, 0.0413, 0.0253),
    (0.0283, 0.0251, 0.0339),
    (0.0277, -0.0372, -0.0093),
    (0.0393, 0.0944, 0.1131),
    (0.0020, 0.0251, 0.0037),
    (-0.0017, 0.0012, 0.0234),
    (0.0468, 0.0436, 0.0203),
    (0.0354, 0.0439, -0.0233),
    (0.0090, 0.0123, 0.0346),
    (0.0382, 0.0029, 0.0217),
    (0.0261, -0.0300, 0.0030),
    (-0.0088, -0.0220, -0.0283),
    (-0.0272, -0.0121, -0.0363),
    (-0.0664, -0.0622, 0.0144),
    (0.0414, 0.0479, 0.0529),
    (0.0355, 0.0612, -0.0247),
    (0.0147, 0.0264, 0.0174),
    (0.0438, 0.0038, 0.0542),
    (0.0431, -0.0573, -0.0033),
    (-0.0162, -0.0211, -0.0406),
    (-0.0487, -0.0295, -0.0393),
    (0.0005, -0.0109, 0.0253),
    (0.0296, 0.0591, 0.0353),
    (0.0119, 0.0181, -0.0306),
    (-0.0085, -0.0362, 0.0229),
    (0.0005, -0.0106, 0.0242),
)
_PUBLISHED_BIAS: Final = (0.0456, -0.0202, -0.0644)


@dataclass(frozen=True)
class Projection:
    """Turns each latent, a vector of C channels, into a square of n x n pixels from -1 to 1: features @ weight + bias.

    The features are the channels, and the products of the P pairs of channels in `pairs` (2, P). `weight` is
    (C + P, 3 n^2) and `bias` (3 n^2,): n^2 values of red, then of green and of blue.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    pairs: torch.Tensor

    @classmethod
    def read(cls, path: Path) -> Self:
        """The projection that `write` has written."""
        tensors = load_file(path)
        return cls(tensors["weight"].float(), tensors["bias"].float(), tensors["pairs"].long())

    def write(self, path: Path) -> None:
        """Writes it in 16 bits, as safetensors."""
        tensors = {"weight": self.weight.half(), "bias": self.bias.half(), "pairs": self.pairs.to(torch.uint8)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    @staticmethod
    def features(latents: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """(h, w, C + P) of latents (C, h, w)."""
        return torch.cat([latents, latents[pairs[0]] * latents[pairs[1]]]).movedim(0, -1)

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """(3, n h, n w) from -1 to 1, of latents (C, h, w) as the transformer scales them."""
        projected = self.features(latents.float().cpu(), self.pairs) @ self.weight + self.bias  # (h, w, 3 n^2)
        side = math.isqrt(self.bias.numel() // 3)
        return F.pixel_shuffle(projected.movedim(-1, 0), side).nan_to_num(0.0).clamp(-1, 1)

    def jpeg(self, latents: torch.Tensor) -> bytes:
        """A JPEG of at most MAX_PREVIEW_BYTES, of latents (C, h, w)."""
        pixels = self.pixels(latents).movedim(0, -1).add(1).mul(127.5).round().byte()
        picture = Image.fromarray(pixels.numpy(), "RGB")
        scale = _SIDE / max(picture.size)
        width, height = (max(round(side * scale), 1) for side in picture.size)
        return _encoded(picture.resize((width, height), Image.Resampling.BICUBIC))


def projection_of(channels: int) -> Projection | None:
    """The published projection of HunyuanVideo-1.5's VAE; None for a VAE with another number of channels."""
    if channels != len(_PUBLISHED):
        return None
    return Projection(torch.tensor(_PUBLISHED), torch.tensor(_PUBLISHED_BIAS), torch.empty(2, 0, dtype=torch.long))


def _encoded(picture: Image.Image) -> bytes:
    """A JPEG of the picture, or of the largest half, quarter and so on of it that MAX_PREVIEW_BYTES allow."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue() if file.tell() <= MAX_PREVIEW_BYTES else _encoded(picture.reduce(2))
