"""torch.compile for the transformers' repeated block, done before the first job.

What is compiled are the two functions of `blocks.py`, once for all blocks, all transformers of the same width and all
sizes of videos: their tokens are a dynamic dimension. diffusers' own `compile_repeated_blocks` takes the whole block,
whose loop over chunks makes each of our twelve sizes a compilation of its own, and PyTorch gives up after eight.
Streamed blocks are left alone: they wait for the bus, not for the arithmetic.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import HunyuanVideo15Transformer3DModel

from handler.video_model.blocks import after_attention, before_attention, chunked_blocks

#: Latent frames, height and width, and tokens of both texts, of the pass that compiles. None of the numbers of tokens
#: that they make is a size of the model: PyTorch would take the two for one.
_WARM_UP: Final = (3, 5, 7)
_WARM_UP_TEXT: Final = (11, 3)

log = logging.getLogger(__name__)


def compile_blocks(
    transformers: Sequence[HunyuanVideo15Transformer3DModel], cache_dir: Path | None = None, backend: str = "inductor"
) -> bool:
    """Compile, and run each transformer once, so that no job waits for the compiler.

    What is compiled is kept in `cache_dir` for the next start; None leaves that to PyTorch. False where there is no
    compiler that works: that is said once, and the blocks go on as they were.
    """
    if cache_dir is not None:
        # PyTorch takes it from nowhere else, and puts its own default there as soon as it is imported.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir.absolute() / "torchinductor")
    compiled = [torch.compile(part, dynamic=True, backend=backend) for part in (before_attention, after_attention)]
    _use(transformers, *compiled)
    try:
        for transformer in transformers:
            warm_up(transformer)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError) as exc:  # of the compiler: PyTorch's are RuntimeErrors
        reason = str(exc).strip().partition("\n")[0]
        log.warning("HUNYUAN_COMPILE: nothing can be compiled here, going on without, slower: %s", reason)
        _use(transformers, before_attention, after_attention)
        return False
    return True


def _use(
    transformers: Sequence[HunyuanVideo15Transformer3DModel], before: Callable[..., Any], after: Callable[..., Any]
) -> None:
    for transformer in transformers:
        for block in chunked_blocks(transformer):
            block.use(before, after)


@torch.no_grad()
def warm_up(transformer: HunyuanVideo15Transformer3DModel) -> None:
    """One pass over a small video of random numbers."""
    config, dtype = transformer.config, transformer.dtype
    device = next(transformer.parameters()).device

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, device=device, dtype=dtype)

    text, text_2 = _WARM_UP_TEXT
    with transformer.cache_context("warm-up"):
        transformer(
            hidden_states=noise(config.in_channels, *_WARM_UP),
            timestep=torch.full((1,), 500.0, device=device, dtype=dtype),
            timestep_r=torch.zeros(1, device=device, dtype=dtype) if config.use_meanflow else None,
            encoder_hidden_states=noise(text, config.text_embed_dim),
            encoder_attention_mask=torch.ones(1, text, device=device, dtype=dtype),
            encoder_hidden_states_2=noise(text_2, config.text_embed_2_dim),
            encoder_attention_mask_2=torch.ones(1, text_2, device=device, dtype=dtype),
            image_embeds=torch.zeros(1, 0, config.image_embed_dim, device=device, dtype=dtype),
            return_dict=False,
        )
    transformer._reset_stateful_cache()
