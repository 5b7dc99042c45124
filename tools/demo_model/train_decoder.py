"""Trains the VAE's decoder to draw the world from its latents."""

from __future__ import annotations

import argparse
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

from tools.demo_model.captions import random_clip
from tools.demo_model.components import vae
from tools.demo_model.optimizer import Muon
from tools.demo_model.world import CELL, FPS, TEMPORAL, Batch

log = logging.getLogger(__name__)

#: What each stage sees: latent frames, clips in a batch, and its share of the time.
_STAGES: Final = ((1, 20, 0.5), (2, 5, 0.3), (3, 3, 0.2))
_MUON_RATE, _ADAM_RATE = 0.02, 2e-3
#: Cells on a side of a part, and rows and columns of whole pictures.
_CROPS: Final = (2, 2, 3)
_SIZES: Final = ((5, 9), (5, 9), (9, 5), (6, 6), (6, 8), (8, 6))


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--out", type=Path, default=Path(".cache/demo-model"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    train(options.out, 60 * options.minutes)


def train(out: Path, seconds: float) -> None:
    """Trains for this long in all, or goes on from `decoder.pt` in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    decoder = vae().decoder
    _start_simple(decoder)
    _compute_faster(decoder)
    path, state = out / "decoder.pt", {"elapsed": 0.0, "step": 0}
    kernels = [p for p in decoder.parameters() if p.ndim == 5]
    others = [p for p in decoder.parameters() if p.ndim != 5]
    optimizers = [Muon(kernels, _MUON_RATE, rows=32), torch.optim.Adam(others, _ADAM_RATE, betas=(0.9, 0.98))]
    if path.exists():
        saved = torch.load(path)
        decoder.load_state_dict(saved["decoder"])
        for optimizer, kept in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        state = saved["state"]
    average = {name: p.detach().clone() for name, p in decoder.state_dict().items()}
    random = Random(state["step"])
    start, last = time.monotonic() - state["elapsed"], time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        done = elapsed / seconds
        frames, size = _stage(done)
        share = min(1.0, (state["step"] + 1) / 50, (1 - done) / 0.5 + 0.01)
        latents, target = _examples(random, frames, size)
        drawn = decoder(latents)
        loss = _loss(drawn, target)
        decoder.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, rate in zip(optimizers, (_MUON_RATE, _ADAM_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
        state["step"] += 1
        with torch.no_grad():
            keep = min(0.995, state["step"] / (state["step"] + 20))
            for name, p in decoder.state_dict().items():
                average[name].lerp_(p, 1 - keep)
        if time.monotonic() - last > 60:
            last, state["elapsed"] = time.monotonic(), elapsed
            _save(path, decoder, optimizers, state, average)
            log.info(
                json.dumps(
                    {
                        "step": state["step"],
                        "minutes": round(elapsed / 60, 1),
                        "frames": frames,
                        "loss": round(loss.item(), 4),
                        "psnr": psnr(decoder, average),
                    }
                )
            )
    state["elapsed"] = seconds
    _save(path, decoder, optimizers, state, average)
    log.info("final psnr %s", psnr(decoder, average))


def _stage(done: float) -> tuple[int, int]:
    for frames, size, share in _STAGES:
        if done < share:
            return frames, size
        done -= share
    return _STAGES[-1][:2]


def _examples(random: Random, frames: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents with a little noise, and what they show: a part of the picture near a thing, at any moment of a clip."""
    rows, columns = random.choice(_SIZES)
    first = random.randrange(0, 20)
    batch = Batch([random_clip(random) for _ in range(size)], first + frames, rows, columns)
    whole = batch.latents()[:, :, first:]
    pictures = batch.frames(TEMPORAL * first, TEMPORAL * (first + frames - 1) + 1)
    x, y, *_ = batch.placed(torch.tensor([TEMPORAL * first / FPS]))
    side = random.choice(_CROPS)
    latents, targets = [], []
    for clip in range(size):
        top = _start(random, float(y[clip, 0, 0]) * rows, rows, side)
        left = _start(random, float(x[clip, 0, 0]) * columns, columns, side)
        latents.append(whole[clip, ..., top : top + side, left : left + side])
        targets.append(pictures[clip, ..., CELL * top : CELL * (top + side), CELL * left : CELL * (left + side)])
    clean = torch.stack(latents)
    return clean + 0.08 * random.random() * torch.randn_like(clean), torch.stack(targets)


def _start(random: Random, centre: float, cells: int, side: int) -> int:
    """The first of `side` cells around a place."""
    return min(max(round(centre - side / 2 + random.uniform(-0.5, 0.5)), 0), cells - side)


def _loss(drawn: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    loss = (drawn - target).abs().mean()
    for axis in (-1, -2):
        loss = loss + 0.5 * (drawn.diff(dim=axis) - target.diff(dim=axis)).abs().mean()
    return loss


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


def _start_simple(decoder: nn.Module) -> None:
    """Residual branches start at zero, so that training starts from the shortcuts alone."""
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


def _save(path: Path, decoder: nn.Module, optimizers: Any, state: dict[str, Any], average: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    torch.save(
        {
            "decoder": decoder.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "state": state,
            "average": average,
        },
        new,
    )
    new.replace(path)


if __name__ == "__main__":
    main()
