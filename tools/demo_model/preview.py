"""Measures the projection that makes the demo model's previews, see `handler/video_model/preview.py`."""

from __future__ import annotations

from random import Random
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it

from handler.video_model.decode import decode
from handler.video_model.preview import Projection
from tools.demo_model.captions import random_clip
from tools.demo_model.scenes import CELL
from tools.demo_model.world import COLOUR_CHANNELS, COVER_CHANNELS, SCENE_COLOUR_CHANNELS, Batch

_CLIPS: Final = 48
#: Pixels on a side of what a latent shows.
_SIDE: Final = 4
#: Keeps weights small, because the transformer's latents are not as exact as those of the world.
_RIDGE: Final = 0.001
#: An object's colour counts where it covers the scene, the scene's colour elsewhere.
_PAIRS: Final = torch.cartesian_prod(
    torch.tensor(COVER_CHANNELS), torch.tensor([*COLOUR_CHANNELS, *SCENE_COLOUR_CHANNELS])
).T


def fit(vae: Any) -> Projection:
    """The least-squares solution over random clips: from their latents to the mean of the frames that the VAE draws."""
    random = Random(0)
    features, drawn = [], []
    for _ in range(_CLIPS):
        latents = Batch([random_clip(random)], 2, 5, 9).latents()
        frames = np.concatenate(list(decode(vae, latents / vae.config.scaling_factor, lambda _: None)))
        mean = torch.from_numpy(frames[1:].mean(axis=0)).movedim(-1, 0) / 127.5 - 1  # (3, H, W)
        pixels = F.pixel_unshuffle(F.avg_pool2d(mean, CELL // _SIDE), _SIDE)  # (3 n^2, h, w)
        features.append(Projection.features(latents[0, :, 1], _PAIRS).flatten(0, 1))
        drawn.append(pixels.movedim(0, -1).flatten(0, 1))
    given = F.pad(torch.cat(features).double(), (0, 1), value=1.0)  # (latents, features + 1)
    squares = given.T @ given + _RIDGE * len(given) * torch.eye(given.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(squares, given.T @ torch.cat(drawn).double()).float()
    return Projection(solution[:-1], solution[-1], _PAIRS)
