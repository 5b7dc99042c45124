"""The error of super-resolution in windows against the untiled loop: `python -m benchmarks.tiling`.

A small transformer of the real class with random weights, six steps, on a video of 31 latent frames at half the height
and width of 720p; tile and overlap are halved, too. The error is the root mean square of the difference of the final
latents, relative to the latents. `seams`: how much this difference jumps from one column to the next where two windows
meet, relative to its jumps everywhere; a seam is far above 1. `global`: queries and keys are unrelated, so a token
attends to all others nearly alike, which a window changes most. `local`: keys are queries, so with the rotation a token
attends mostly to its neighbourhood. Random weights only rank the tilings; they do not tell how a trained model looks.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideo15Transformer3DModel

from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.video_model.catalog import Sampling
from handler.video_model.super_resolution import SuperResolution
from handler.video_model.windows import SuperResolutionTiling, Window, windows

CHANNELS: Final = 8
FRAMES, HEIGHT, WIDTH = 31, 22, 40
TILINGS: Final = (
    SuperResolutionTiling((22, 20), 0, 12, 12),
    SuperResolutionTiling((12, 21), 2, 7, 6),
    SuperResolutionTiling((12, 21), 2, 12, 10),
    SuperResolutionTiling((22, 15), 2, 12, 10),
    SuperResolutionTiling((22, 21), 2, 7, 6),
    SuperResolutionTiling((22, 21), 2, 12, 10),
    SuperResolutionTiling((22, 22), 4, 12, 10),
)


def main() -> None:
    for kind in ("global", "local"):
        stage = _stage(local=kind == "local")
        exact = _upscaled(stage, None)
        for tiling in TILINGS:
            difference = _upscaled(stage, tiling) - exact
            boxes = windows(tiling, FRAMES, HEIGHT, WIDTH)
            error, seams = difference.norm() / exact.norm(), _seams(difference, boxes)
            print(f"{kind}, {tiling}: {len(boxes)} windows, error {error:.4f}, seams {seams:.2f}", flush=True)


def _seams(difference: torch.Tensor, boxes: Sequence[Window]) -> float:
    """Root mean square of the jumps between columns where two windows overlap or touch, relative to all jumps."""
    jumps = difference.diff(dim=-1).pow(2).mean(dim=(0, 1, 2, 3))  # (W - 1,)
    columns = list(dict.fromkeys(box.columns for box in boxes))
    meeting = torch.cat([jumps[right.start - 1 : left.stop] for left, right in pairwise(columns)])
    return float((meeting.mean() / jumps.mean()).sqrt())


def _stage(*, local: bool) -> SuperResolution:
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=3 * CHANNELS + 2,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=32,
        rope_axes_dim=(4, 14, 14),
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=32,
        text_embed_2_dim=16,
        image_embed_dim=16,
        task_type="t2v",
        use_meanflow=True,
    ).eval()
    if local:
        for block in transformer.transformer_blocks:
            block.attn.to_k.load_state_dict(block.attn.to_q.state_dict())
    use_mask_free_attention(transformer, NATIVE)
    return SuperResolution(transformer, torch.nn.Identity(), FlowMatchEulerDiscreteScheduler(shift=2.0), Sampling(6))


def _upscaled(stage: SuperResolution, tiling: SuperResolutionTiling | None) -> torch.Tensor:
    """The stage's latents for smooth random content with some noise."""
    generator = torch.Generator().manual_seed(1)
    smooth = F.interpolate(
        torch.randn(1, CHANNELS, 3, 4, 6, generator=generator), size=(FRAMES, 15, 26), mode="trilinear"
    )
    low = smooth + 0.3 * torch.randn(smooth.shape, generator=generator)
    prompt = {
        "encoder_hidden_states": torch.randn(1, 40, 32, generator=generator),
        "encoder_attention_mask": torch.ones(1, 40),
        "encoder_hidden_states_2": torch.zeros(1, 4, 16),
        "encoder_attention_mask_2": torch.zeros(1, 4),
    }
    return stage(low, (HEIGHT, WIDTH), prompt, generator, lambda: None, tiling=tiling)


if __name__ == "__main__":
    main()
