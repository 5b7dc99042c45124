"""Latents to uint8 frames, one tile at a time, so that the GPU holds only one tile of the video and the seams.

The tiles, their overlap, their blending and every pixel equal those of diffusers' `tiled_decode`. That keeps all tiles,
then all rows, then the video in 16 bits: 11 GB for ten seconds at 1080p. Each frame needs every tile, so no frame is
ready before the end. Tiles in time instead of space would leave visible cuts. Source: `tiled_decode` in diffusers,
models/autoencoders/autoencoder_kl_hunyuanvideo15.py.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from handler.video_model.attention import causal_mask
from handler.video_model.base import Frames


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor, on_tile: Callable[[float], None]) -> Frames:
    """Frames (n, H, W, 3) in host memory, from latents (1, C, T, h, w) scaled for the VAE.

    Calls `on_tile` before each tile with the fraction done, from 0.0 to below 1.0. An exception from it ends decoding.
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
    above: list[torch.Tensor] = []  # lower seams of the row above, (1, 3, n, seam, W of a tile) each
    for row, top in enumerate(tops):
        seams: list[torch.Tensor] = []
        beside: torch.Tensor | None = None  # right seam of the tile to the left, (1, 3, n, H of a tile, seam)
        for column, left in enumerate(lefts):
            on_tile((row * len(lefts) + column) / (len(tops) * len(lefts)))
            # 1. Decode a tile: (1, C, T, h, w) to (1, 3, n, H, W).
            tile = vae.decoder(latents[..., top : top + side_y, left : left + side_x])
            # 2. Blend it with its neighbours, and keep its seams for the next ones.
            if above:
                tile = vae.blend_v(above[column], tile, seam_y)
            if beside is not None:
                tile = vae.blend_h(beside, tile, seam_x)
            if len(tops) > 1:
                seams.append(tile[..., -seam_y:, :].clone())
            beside = tile[..., -seam_x:].clone() if len(lefts) > 1 else None
            # 3. Copy the pixels that no later tile changes.
            pixels = _pixels(tile[..., : step_y * ratio, : step_x * ratio])
            y, x = top * ratio, left * ratio
            video[:, y : y + pixels.shape[1], x : x + pixels.shape[2]] = pixels.cpu().numpy()
            del tile, pixels
        above = seams
    return video


def _tiling(vae: Any, height: int, width: int) -> tuple[int, int, int, int]:
    """Height and width of a tile in latents, and of a seam in pixels. A single tile has no seams."""
    if not vae.use_tiling or (height <= vae.tile_latent_min_height and width <= vae.tile_latent_min_width):
        return height, width, 0, 0
    seam_y = int(vae.tile_sample_min_height * vae.tile_overlap_factor)
    seam_x = int(vae.tile_sample_min_width * vae.tile_overlap_factor)
    return vae.tile_latent_min_height, vae.tile_latent_min_width, seam_y, seam_x


def _pixels(video: torch.Tensor) -> torch.Tensor:
    """(1, 3, n, H, W) from -1 to 1 as uint8 (n, H, W, 3) on the same device."""
    return video[0].permute(1, 2, 3, 0).float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).contiguous()
