"""Weights and inputs that depend on their names alone, so that other code can compute with the same ones."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch

#: Numbers that a `digest` samples.
_SAMPLES = 6


def noise(name: str, *shape: int) -> torch.Tensor:
    """Float32 numbers from -0.5 to 0.5, the same on every machine."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    hashed = torch.sin(12.9898 * index + zlib.crc32(name.encode()) % 9973) * 43758.5453
    return (hashed - hashed.floor() - 0.5).float().reshape(shape)


def weights(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """A state dict of these shapes: matrices that keep the size of their input, norms near 1, small biases."""
    made = {}
    for name, shape in shapes.items():
        values = noise(name, *shape)
        if name.endswith("bias"):
            made[name] = 0.1 * values
        elif len([side for side in shape if side > 1]) > 1:
            made[name] = values * (12 / math.prod(shape[1:])) ** 0.5
        else:
            made[name] = 1 + 0.2 * values
    return made


def digest(tensor: torch.Tensor) -> list[float]:
    """The root of the mean square of all numbers, and six of them, evenly spaced."""
    flat = tensor.detach().double().flatten()
    picked = flat[torch.linspace(0, len(flat) - 1, _SAMPLES).long()]
    return [float(flat.square().mean().sqrt()), *map(float, picked)]
