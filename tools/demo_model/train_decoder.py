"""Trains the VAE's decoder to draw the world from its latents.

First its lower levels learn to give the upper ones what those draw from (`drawing.py`), then all of it learns pixels.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from random import Random
from types import MethodType
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15CausalConv3d as CausalConv3d
from torch import nn

from tools.demo_model import drawing
from tools.demo_model.captions import random_clip
from tools.demo_model.components import vae
from tools.demo_model.training import Training, command
from tools.demo_model.world import CELL, FPS, SHAPE_CHANNELS, SHAPE_STRENGTH, TEMPORAL, Batch

log = logging.getLogger(__name__)

#: Share of the time, whether the loss is in pixels, the largest rates, and latent frames with clips in a batch of it.
_STAGES: Final = ((0.6, False, 1.0, ((1, 24), (3, 8))), (0.4, True, 0.3, ((1, 16), (3, 3))))
#: Of Muon and of Adam. Larger ones leave noise in the features.
_RATES: Final = (0.006, 2e-3)
#: Cells on a side of a part, and rows and columns of whole pictures.
_CROPS: Final = (2, 3)
_SIZES: Final = ((5, 9), (5, 9), (9, 5), (6, 6), (6, 8), (8, 6))


def train(out: Path, seconds: float, trained: Path | None = None) -> None:
    """Trains for this long in all, or goes on from `decoder.pt` in `out`. Starts from the weights in `trained`."""
    torch.manual_seed(0)
    decoder = vae().decoder
    _compute_faster(decoder)
    path = out / "decoder.pt"
    if trained is not None:
        decoder.load_state_dict(vae().from_pretrained(trained / "vae", dtype=torch.float32).decoder.state_dict())
    elif not path.exists():
        _start_simple(decoder)
        drawing.start(decoder)
    kernels = [p for p in decoder.parameters() if p.ndim == 5]
    others = [p for p in decoder.parameters() if p.ndim != 5]
    training = Training(path, decoder, kernels, others, _RATES, rows=32)
    state = training.state
    random = Random(state["step"])
    start, last = time.monotonic() - state["elapsed"], time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        done = elapsed / seconds
        in_pixels, share, batches = _stage(done)
        share *= min(1.0, (state["step"] + 1) / 50)
        frames, size = random.choice(batches)
        loss = (_pixel_loss if in_pixels else _feature_loss)(decoder, random, frames, size)
        training.step(loss, share, keep=0.99)
        if time.monotonic() - last > 60:
            last = time.monotonic()
            training.save(elapsed)
            log.info(
                json.dumps(
                    {
                        "step": state["step"],
                        "minutes": round(elapsed / 60, 1),
                        "pixels": in_pixels,
                        "frames": frames,
                        "loss": round(loss.item(), 4),
                        "psnr": psnr(decoder, training.average),
                    }
                )
            )
    training.save(seconds)
    log.info("final psnr %s", psnr(decoder, training.average))


def _stage(done: float) -> tuple[bool, float, tuple[tuple[int, int], ...]]:
    """Whether the loss is in pixels, the rates as a fraction, which falls to zero in each stage, and the batches."""
    first, second = _STAGES
    share, in_pixels, rate, batches = first if done < first[0] else second
    into = done / share if done < first[0] else (done - first[0]) / share
    return in_pixels, rate * (1.01 - into), batches


def _feature_loss(decoder: Any, random: Random, frames: int, size: int) -> torch.Tensor:
    batch, first, last = _clips(random, frames, size)
    wanted, matters = drawing.features(batch, first, last)
    latents = _noisy(random, batch.latents()[:, :, -frames:])
    wanted, matters, latents = _parts(random, batch, first, (8, wanted), (8, matters), (1, latents))
    hidden = decoder.conv_in(latents) + latents.repeat_interleave(decoder.repeat, dim=1)
    hidden = decoder.mid_block(hidden)
    for block in decoder.up_blocks[:3]:
        hidden = block(hidden)
    loss: torch.Tensor = ((hidden - wanted).abs() * matters).mean()
    return loss


def _pixel_loss(decoder: Any, random: Random, frames: int, size: int) -> torch.Tensor:
    batch, first, last = _clips(random, frames, size)
    latents = _noisy(random, batch.latents()[:, :, -frames:])
    target, latents = _parts(random, batch, first, (CELL, batch.frames(first, last)), (1, latents))
    error = decoder(latents) - target
    loss: torch.Tensor = error.abs().mean()
    for axis in (-1, -2):
        loss = loss + 0.5 * error.diff(dim=axis).abs().mean()
    return loss


def _clips(random: Random, frames: int, size: int) -> tuple[Batch, int, int]:
    """Clips whose last latent frames are looked at, and the first of their pictures and the one after the last."""
    earlier = random.randrange(0, 20)
    batch = Batch([random_clip(random) for _ in range(size)], earlier + frames, *random.choice(_SIZES))
    return batch, TEMPORAL * earlier, TEMPORAL * (earlier + frames - 1) + 1


def _noisy(random: Random, latents: torch.Tensor) -> torch.Tensor:
    """With noise, as the transformer's latents are not perfect: more in colours and scene, which change slowly."""
    noise = torch.randn_like(latents)
    noise[:, :SHAPE_CHANNELS] *= 0.3 * SHAPE_STRENGTH
    return latents + 0.3 * random.random() * noise


def _parts(random: Random, batch: Batch, first: int, *whole: tuple[int, torch.Tensor]) -> list[torch.Tensor]:
    """The same part of each, near a thing. Each comes with its points on a side of a cell."""
    x, y, *_ = batch.placed(torch.tensor([first / FPS]))
    side = random.choice(_CROPS)
    corners = [
        (_start(random, float(y[i, 0, 0]), batch.rows, side), _start(random, float(x[i, 0, 0]), batch.columns, side))
        for i in range(len(x))
    ]
    return [
        torch.stack(
            [
                of[i, ..., points * top : points * (top + side), points * left : points * (left + side)]
                for i, (top, left) in enumerate(corners)
            ]
        )
        for points, of in whole
    ]


def _start(random: Random, place: float, cells: int, side: int) -> int:
    """The first of `side` cells around a place from 0 to 1."""
    return min(max(round(place * cells - side / 2 + random.uniform(-0.5, 0.5)), 0), cells - side)


@torch.no_grad()
def psnr(decoder: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of held-out clips, whole pictures, in dB: of single frames and of nine frames."""
    own = {name: p.clone() for name, p in decoder.state_dict().items()}
    decoder.load_state_dict(weights)
    found = {}
    for frames in (1, 2):
        random, errors = Random(1_000_003), []
        for _ in range(10 // frames):
            batch = Batch([random_clip(random)], frames, 5, 9)
            drawn = decoder(batch.latents()).clamp(-1, 1)
            errors.append(F.mse_loss(drawn, batch.frames()).item())
        found[str(frames)] = round(10 * math.log10(4 / (sum(errors) / len(errors))), 2)
    decoder.load_state_dict(own)
    return found


@torch.no_grad()
def _start_simple(decoder: Any) -> None:
    """Residual branches start at zero, and shapes, which are weak, as strong as all else."""
    decoder.conv_in.conv.weight[:, :SHAPE_CHANNELS] /= SHAPE_STRENGTH
    for name, module in decoder.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.conv.weight)
            nn.init.zeros_(module.conv.bias)
        if name.endswith("proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _compute_faster(decoder: Any) -> None:
    """The stock attention takes no batches (its mask does not broadcast), and convolutions of two dimensions are
    several times faster on a CPU than those of three."""
    attention = decoder.mid_block.attentions[0]
    attention.forward = MethodType(_attend, attention)
    for module in decoder.modules():
        if isinstance(module, CausalConv3d):
            module.forward = MethodType(_convolve, module)


def _convolve(self: Any, x: torch.Tensor) -> torch.Tensor:
    weight, batch, frames = self.conv.weight, x.shape[0], x.shape[2]
    if frames == 1:
        padded = F.pad(x.squeeze(2), (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, weight.sum(dim=2), self.conv.bias).unsqueeze(2)
    padded = F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
    triples = padded.unfold(2, 3, 1).permute(0, 2, 1, 5, 3, 4).flatten(2, 3).flatten(0, 1)  # (B n, 3C, H, W)
    drawn = F.conv2d(triples, weight.flatten(1, 2), self.conv.bias)
    return torch.unflatten(drawn, 0, (batch, frames)).transpose(1, 2)


def _attend(self: Any, x: torch.Tensor) -> torch.Tensor:
    normed = self.norm(x)
    query, key, value = (project(normed).flatten(2).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v))
    size = x.shape[3] * x.shape[4]
    frame = torch.arange(query.shape[1]) // size
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=frame[:, None] >= frame)
    projected: torch.Tensor = self.proj_out(torch.unflatten(attended.transpose(1, 2), 2, x.shape[2:]))
    return x + projected


if __name__ == "__main__":
    command(train, __doc__, minutes=45)
