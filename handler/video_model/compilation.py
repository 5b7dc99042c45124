"""torch.compile for the transformers' repeated block, before the first job.

Compiles the two functions of `blocks.py`, once for all blocks, all transformers of the same width and all sizes of
videos: their tokens are a dynamic dimension. diffusers' own `compile_repeated_blocks` compiles the whole block with its
loop over chunks. Each of our twelve sizes would be its own compilation, and PyTorch stops after eight. Streamed blocks
are not compiled: they wait for the bus, not for the arithmetic.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import HunyuanVideo15Transformer3DModel

from handler.video_model.blocks import after_attention, before_attention, chunked_blocks
from handler.video_model.lora import applied, empty_updates
from handler.video_model.memory import Budget, Placement

#: Latent frames, height and width, tokens of both texts, and rank of LoRA adapters, for the pass that compiles. No
#: number of tokens equals the rank or a size of the model: PyTorch would compile the two as one dimension.
_WARM_UP: Final = (3, 5, 7)
_WARM_UP_TEXT: Final = (11, 3)
_WARM_UP_RANK: Final = 13

log = logging.getLogger(__name__)


def should_compile(setting: bool | None, device: str, memory: Budget | None) -> bool:
    """Whether to compile: if the blocks stay on a GPU, unless HUNYUAN_COMPILE (`setting`) says otherwise."""
    streamed = memory is not None and memory.plan.transformers is Placement.STREAMED
    if setting and streamed:
        log.warning("HUNYUAN_COMPILE has no effect: GPU memory is too small, so the transformers are streamed")
    return not streamed and (device == "cuda" if setting is None else setting)


def compile_blocks(
    transformers: Sequence[HunyuanVideo15Transformer3DModel],
    cache_dir: Path | None = None,
    backend: str = "inductor",
    *,
    loras: bool = False,
) -> bool:
    """Compiles, and runs each transformer once, so that no job waits for the compiler; with `loras` also for adapters.

    Keeps compiled kernels in `cache_dir` for the next start; None takes PyTorch's default. Returns False and logs a
    warning if no compiler works; the blocks then run uncompiled.
    """
    if cache_dir is not None:
        # PyTorch reads it only from here, and sets its own default on import.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir.absolute() / "torchinductor")
    compiled = [torch.compile(part, dynamic=True, backend=backend) for part in (before_attention, after_attention)]
    _set_functions(transformers, *compiled)
    try:
        for transformer in transformers:
            device = next(transformer.parameters()).device
            warm_up(transformer, device)
            if loras:
                with applied(empty_updates(_WARM_UP_RANK, transformer), transformer, device):
                    warm_up(transformer, device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError) as exc:  # the compiler's errors: PyTorch raises RuntimeError
        reason = str(exc).strip().partition("\n")[0]
        log.warning(
            "HUNYUAN_COMPILE: compilation failed, renders are slower; set it to false to skip the attempt: %s", reason
        )
        _set_functions(transformers, before_attention, after_attention)
        return False
    return True


def _set_functions(
    transformers: Sequence[HunyuanVideo15Transformer3DModel], before: Callable[..., Any], after: Callable[..., Any]
) -> None:
    for transformer in transformers:
        for block in chunked_blocks(transformer):
            block.set_functions(before, after)


@torch.no_grad()
def warm_up(transformer: HunyuanVideo15Transformer3DModel, device: torch.device) -> None:
    """Runs one pass over a small video of random numbers. Streamed weights are copied to `device` meanwhile."""
    config, dtype = transformer.config, transformer.dtype

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
