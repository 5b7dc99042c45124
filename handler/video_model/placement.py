"""Puts each part of a model where the memory plan says."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

import torch
from diffusers.hooks import apply_group_offloading

from handler.settings import WorkerSettings
from handler.video_model.base import ModelLoadError
from handler.video_model.memory import Budget, DoesNotFitError, Placement, PlacementPlan, Weights, budget
from handler.video_model.parts import Parts

#: What is streamed at once: a transformer block, or a single layer.
Grouping: TypeAlias = Literal["block_level", "leaf_level"]

log = logging.getLogger(__name__)


def put_on_gpu(parts: Parts, settings: WorkerSettings) -> Budget:
    """Puts each part where the plan for the free GPU memory says.

    Raises:
        ModelLoadError: not even the smallest video fits.
    """
    # 1. Measure: free memory, up to HUNYUAN_VRAM_LIMIT, and weights.
    free, total = torch.cuda.mem_get_info()
    if settings.vram_limit is not None:
        free = min(free, int(settings.vram_limit * 1e9))
        torch.cuda.set_per_process_memory_fraction(min(free / total, 1.0))
    # 2. Plan.
    try:
        made = budget(free, weights_of(parts), parts.workloads(), offload=settings.offload_cpu)
    except DoesNotFitError as exc:
        raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {parts.name} does not fit into GPU memory: {exc}") from exc
    log.info("memory plan: %s", made.plan)
    # 3. Place.
    place_all(_placements(parts, made.plan), torch.device("cuda"))
    tile, vae = made.plan.tile, parts.shared.vae
    vae.enable_tiling(tile, tile, *[tile // parts.shared.vae_scale_factor_spatial] * 2)
    return made


def weights_of(parts: Parts) -> Weights:
    """Bytes of the parts that the plan distinguishes."""
    shared = parts.shared
    return Weights(
        text_encoders=bytes_of(shared.text_encoder) + bytes_of(shared.text_encoder_2),
        transformers=[bytes_of(transformer) for transformer in parts.transformers],
        vae=bytes_of(shared.vae),
        block=max(bytes_of(transformer.transformer_blocks[0]) for transformer in parts.transformers),
    )


def _placements(parts: Parts, plan: PlacementPlan) -> list[tuple[torch.nn.Module, Placement, Grouping]]:
    shared = parts.shared
    small: list[torch.nn.Module] = [upscaler.stage.upsampler for upscaler in parts.upscalers.values()]
    small += [base.image_encoder for base in parts.bases.values() if base.image_encoder is not None]
    return [
        (shared.text_encoder, plan.text_encoders, "leaf_level"),
        (shared.text_encoder_2, plan.text_encoders, "leaf_level"),
        *((transformer, plan.transformers, "block_level") for transformer in parts.transformers),
        *_vae_placements(shared.vae, plan.vae),
        *((module, Placement.RESIDENT, "leaf_level") for module in small),
    ]


def _vae_placements(vae: Any, placement: Placement) -> list[tuple[torch.nn.Module, Placement, Grouping]]:
    """A streamed decoder stays in host memory, because `decode` copies it: each latent frame needs all its weights.

    The encoder is streamed by its own forward pass. The VAE's own `forward`, which encodes and decodes, never runs.
    """
    if placement is Placement.RESIDENT:
        return [(vae, placement, "leaf_level")]
    return [] if vae.encoder is None else [(vae.encoder, placement, "leaf_level")]


def place_all(placements: Sequence[tuple[torch.nn.Module, Placement, Grouping]], device: torch.device) -> None:
    """Calls `place` for each, all at the same time.

    Loaded weights are mapped from their files and read only here, so the threads wait for the disk in parallel.
    Loading in parallel is not possible: diffusers and transformers change PyTorch's global defaults while they load.
    """
    with ThreadPoolExecutor(max_workers=len(placements)) as pool:
        for placed in [pool.submit(place, *placement, device) for placement in placements]:
            placed.result()


def place(module: torch.nn.Module, placement: Placement, grouping: Grouping, device: torch.device) -> None:
    """Moves the module to the device, or streams it there for each forward pass, a group at a time.

    Source: https://huggingface.co/docs/diffusers/optimization/memory#group-offloading
    """
    if placement is Placement.RESIDENT:
        module.to(device)
        return
    blocks = {"num_blocks_per_group": 1} if grouping == "block_level" else {}
    use_stream = device.type == "cuda"
    apply_group_offloading(module, onload_device=device, offload_type=grouping, use_stream=use_stream, **blocks)


def bytes_of(module: torch.nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
