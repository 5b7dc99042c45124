"""What is known of each checkpoint: data, no code.

Source: the table of recommended settings in https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5 (README, "Inference").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint is sampled. None: as the checkpoint's own scheduler and guider say."""

    num_inference_steps: int = 50
    shift: float | None = None
    guidance_scale: float | None = None


#: By the end of a checkpoint's name, in diffusers' layout.
SAMPLING: Final[Mapping[str, Sampling]] = {
    "480p_t2v": Sampling(50, shift=5.0, guidance_scale=6.0),
    "720p_t2v": Sampling(50, shift=9.0, guidance_scale=6.0),
    "480p_t2v_distilled": Sampling(50, shift=5.0, guidance_scale=1.0),
    "720p_t2v_distilled": Sampling(50, shift=9.0, guidance_scale=1.0),
}

#: (width, height) that a base model renders, by its transformer's `target_size`. 16:9, in multiples of 16.
BASE_SIZES: Final[Mapping[int, tuple[int, int]]] = {640: (848, 480), 960: (1280, 720)}
