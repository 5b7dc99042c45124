"""Latents to uint8 frames, a tile at a time, so that the GPU never holds more of the video than one tile and seams.

The tiles, their overlap and their blending are those of `AutoencoderKLHunyuanVideo15.tiled_decode`, and so is each
pixel. That keeps every tile, then every row, then the whole in 16 bits: 11 GB for ten seconds at 1080p. Frames can't be
handed on earlier than at the end, as each needs every tile; a decoder cut in time instead would show where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from handler.video_model.attention import causal_mask
from handler.video_model.base import Frames


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor, on_tile: Callable[[float], None]) -> Frames:
    """Frames (n, H, W, 3) in host memory, of latents (1, C, T, h, w) as the VAE takes them.

    `on_tile` is told before each tile how much is done, from 0.0 to below 1.0; what it raises ends the decoding.
    """
    try:
        return _decode(vae, latents.to(vae.dtype), on_tile)
    finally:
        causal_mask.cache_clear()  # half a gigabyte at real size


def _decode(vae: Any, latents: torch.Tensor, on_tile: Callable[[float], None]) -> Frames:
    frames, height, width = latents.shape[-3:]
    ratio = vae.spatial_compression_ratio
    num_frames = (frames - 1) * vae.temporal_compression_ratio + 1
    video = np.empty((num_frames, height * ratio, width * ratio, 3), dtype=np.uint8)
    side_y, side_x, seam_y, seam_x = _tiling(vae, height, width)
    step_y, step_x = side_y - seam_y // ratio, side_x - seam_x // ratio
    tops, lefts = range(0, height, step_y), range(0, width, step_x)
    above: list[torch.Tensor] = []  # the lower seams of the row of tiles before
    for row, top in enumerate(tops):
        seams: list[torch.Tensor] = []
        beside: torch.Tensor | None = None  # the right seam of the tile before
        for column, left in enumerate(lefts):
            on_tile((row * len(lefts) + column) / (len(tops) * len(lefts)))
            tile = vae.decoder(latents[..., top : top + side_y, left : left + side_x])
            if above:
                tile = vae.blend_v(above[column], tile, seam_y)
            if beside is not None:
                tile = vae.blend_h(beside, tile, seam_x)
            if len(tops) > 1:
                seams.append(tile[..., -seam_y:, :].clone())
            beside = tile[..., -seam_x:].clone() if len(lefts) > 1 else None
            pixels = _pixels(tile[..., : step_y * ratio, : step_x * ratio])
            y, x = top * ratio, left * ratio
            video[:, y : y + pixels.shape[1], x : x + pixels.shape[2]] = pixels.cpu().numpy()
            del tile, pixels
        above = seams
    return video


def _tiling(vae: Any, height: int, width: int) -> tuple[int, int, int, int]:
    """Height and width of a tile in latents, and of the seams between tiles in pixels. One tile has no seams."""
    if not vae.use_tiling or (height <= vae.tile_latent_min_height and width <= vae.tile_latent_min_width):
        return height, width, 0, 0
    seam_y = int(vae.tile_sample_min_height * vae.tile_overlap_factor)
    seam_x = int(vae.tile_sample_min_width * vae.tile_overlap_factor)
    return vae.tile_latent_min_height, vae.tile_latent_min_width, seam_y, seam_x


def _pixels(video: torch.Tensor) -> torch.Tensor:
    """(1, 3, n, H, W) of about -1 to 1 as uint8 (n, H, W, 3), converted where the tensor is."""
    return video[0].permute(1, 2, 3, 0).float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).contiguous()
