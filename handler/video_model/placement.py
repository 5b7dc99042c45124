"""Puts each part of a model where the memory plan says."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from diffusers.hooks import apply_group_offloading

from handler.machine import available_host_memory
from handler.settings import WorkerSettings
from handler.video_model.base import ModelLoadError
from handler.video_model.lora_files import CACHED_BYTES
from handler.video_model.memory import WHOLE, Budget, DoesNotFitError, Part, Placement, PlacementPlan, Weights, budget
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
    host = available_host_memory()
    if host is not None and settings.lora_dir is not None:
        host -= CACHED_BYTES
    try:
        made = budget(free, weights_of(parts), parts.workloads(), offload=settings.offload_cpu, host=host)
    except DoesNotFitError as exc:
        raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {parts.name} does not fit into memory: {exc}") from exc
    log.info("memory plan: %s", made.plan)
    # 3. Place.
    place_all(_placements(parts, made.plan), torch.device("cuda"))
    tile, vae = made.plan.tile, parts.shared.vae
    if tile == WHOLE:
        vae.disable_tiling()
    else:
        vae.enable_tiling(tile, tile, *[tile // parts.shared.vae_scale_factor_spatial] * 2)
    return made


def weights_of(parts: Parts) -> Weights:
    """Bytes of the parts that the plan distinguishes."""
    shared = parts.shared
    encoders = [base.image_encoder for base in parts.bases.values() if base.image_encoder is not None]
    encoder = shared.vae.encoder
    return Weights(
        text_encoders=_by_layers(shared.text_encoder, shared.text_encoder_2),
        transformers=_by_blocks(parts.transformers),
        vae_decoder=Part(bytes_of(shared.vae.decoder), bytes_of(shared.vae.decoder)),
        vae_encoder=_by_layers(encoder) if encoder is not None else Part(),
        vision=_by_layers(*encoders) if encoders else Part(),
        small=sum(bytes_of(upscaler.stage.upsampler) for upscaler in parts.upscalers.values()),
    )


def _by_layers(*modules: torch.nn.Module) -> Part:
    """Parts that are streamed layer by layer: two neighbouring ones are on the GPU at once."""
    sizes = [
        [bytes_of(layer) for layer in module.modules() if next(layer.children(), None) is None] for module in modules
    ]
    passing = max(sum(pair) for of_one in sizes for pair in pairwise([*of_one, 0]))
    return Part(sum(map(bytes_of, modules)), passing, sum(map(rounded_bytes_of, modules)))


def _by_blocks(transformers: Sequence[Any]) -> Part:
    """Transformers, of which one computes at a time: two of its blocks, and all of it that is outside the blocks."""
    passing = [bytes_of(each) - sum(map(bytes_of, each.transformer_blocks[2:])) for each in transformers]
    return Part(sum(map(bytes_of, transformers)), max(passing), sum(map(rounded_bytes_of, transformers)))


def _placements(parts: Parts, plan: PlacementPlan) -> list[tuple[torch.nn.Module, Placement, Grouping]]:
    shared = parts.shared
    towers = [base.image_encoder for base in parts.bases.values() if base.image_encoder is not None]
    return [
        (shared.text_encoder, plan.text_encoders, "leaf_level"),
        (shared.text_encoder_2, plan.text_encoders, "leaf_level"),
        *((tower, plan.text_encoders, "leaf_level") for tower in towers),
        *((transformer, plan.transformers, "block_level") for transformer in parts.transformers),
        *((upscaler.stage.upsampler, Placement.RESIDENT, "leaf_level") for upscaler in parts.upscalers.values()),
        *_vae_placements(shared.vae, plan.vae),
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


def rounded_bytes_of(module: torch.nn.Module) -> int:
    """The same, with each tensor rounded up to a power of two, as PyTorch rounds pinned blocks by default."""
    sizes = (tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
    return sum(1 << (size - 1).bit_length() for size in sizes if size)
