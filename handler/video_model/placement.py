"""What a model is made of, and where the memory plan puts each part."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.hooks import apply_group_offloading

from contract.job import MAX_DURATION, MIN_DURATION, Resolution, num_frames
from handler.settings import WorkerSettings
from handler.video_model.base import ModelLoadError
from handler.video_model.catalog import Route, bucket_size
from handler.video_model.generate import Base, Upscaler
from handler.video_model.memory import Budget, DoesNotFitError, Placement, Weights, Workload, budget

#: Steps from which on neighbouring ones are alike; step-distilled checkpoints take up to 12.
_MANY_STEPS: Final = 16
log = logging.getLogger(__name__)

Routes = Mapping[tuple[str, Resolution], Route]


@dataclass(frozen=True)
class Parts:
    """What a model is made of, before it is put on its device."""

    name: str
    bases: Mapping[str, Base]
    routes: Routes
    upscalers: Mapping[str, Upscaler]
    image_routes: Routes = field(default_factory=dict)

    @property
    def base_transformers(self) -> list[HunyuanVideo15Transformer3DModel]:
        """Of the base models."""
        return [base.pipeline.transformer for base in self.bases.values()]

    @property
    def many_step_transformers(self) -> list[HunyuanVideo15Transformer3DModel]:
        """Of those base models that are neither step-distilled nor nearly so."""
        sampled = [(base.pipeline.transformer, base.checkpoint.sampling) for base in self.bases.values()]
        return [transformer for transformer, sampling in sampled if sampling.num_inference_steps >= _MANY_STEPS]

    @property
    def upscaler_transformers(self) -> list[HunyuanVideo15Transformer3DModel]:
        """Of the super-resolution stages."""
        return [upscaler.stage.transformer for upscaler in self.upscalers.values()]

    @property
    def transformers(self) -> list[HunyuanVideo15Transformer3DModel]:
        """All of them."""
        return self.base_transformers + self.upscaler_transformers

    def workloads(self) -> list[Workload]:
        """Each video that may be asked for, by what it comes to."""
        parts: Mapping[str, Base | Upscaler] = {**self.bases, **self.upscalers}
        routes = set(self.routes.values())
        sizes = {max(parts[name].checkpoint.base_size for name in route.checkpoints) for route in routes}
        return [
            Workload(num_frames(duration), bucket_size(size, 16, 9))
            for size in sizes
            for duration in range(MIN_DURATION, MAX_DURATION + 1)
        ]


def put_on_gpu(parts: Parts, settings: WorkerSettings) -> Budget:
    """Put each part where the plan for the free memory wants it.

    Raises:
        ModelLoadError: not even the smallest video fits.
    """
    free, total = torch.cuda.mem_get_info()
    if settings.vram_limit is not None:
        free = min(free, int(settings.vram_limit * 1e9))
        torch.cuda.set_per_process_memory_fraction(min(free / total, 1.0))
    shared = next(iter(parts.bases.values())).pipeline
    text_encoders = [shared.text_encoder, shared.text_encoder_2]
    weights = Weights(
        text_encoders=sum(bytes_of(module) for module in text_encoders),
        transformers=[bytes_of(transformer) for transformer in parts.transformers],
        vae=bytes_of(shared.vae),
        block=max(bytes_of(transformer.transformer_blocks[0]) for transformer in parts.transformers),
    )
    try:
        made = budget(free, weights, parts.workloads(), offload=settings.offload_cpu)
    except DoesNotFitError as exc:
        raise ModelLoadError(f"HUNYUAN_MODEL_PATH: {parts.name} does not fit: {exc}") from exc
    log.info("memory: %s", made.plan)
    small: list[torch.nn.Module] = [upscaler.stage.upsampler for upscaler in parts.upscalers.values()]
    small += [base.image_encoder for base in parts.bases.values() if base.image_encoder is not None]
    place_all(
        [
            *((module, made.plan.text_encoders, "leaf_level") for module in text_encoders),
            *((module, made.plan.transformers, "block_level") for module in parts.transformers),
            (shared.vae, made.plan.vae, "leaf_level"),
            *((module, Placement.RESIDENT, "") for module in small),
        ],
        torch.device("cuda"),
    )
    tile = made.plan.tile
    shared.vae.enable_tiling(tile, tile, *[tile // shared.vae_scale_factor_spatial] * 2)
    return made


def place_all(placements: Sequence[tuple[torch.nn.Module, Placement, str]], device: torch.device) -> None:
    """`place` each, all at the same time.

    Weights that were loaded are mapped from their files: it is now that they are read, and each reader waits for the
    disk by itself. (To load in parallel would not do: both libraries change PyTorch's defaults while they build.)
    """
    with ThreadPoolExecutor(max_workers=len(placements)) as pool:
        for placed in [pool.submit(place, *placement, device) for placement in placements]:
            placed.result()


def place(module: torch.nn.Module, placement: Placement, kind: str, device: torch.device) -> None:
    """On the device, or streamed to it for each forward.

    Source: https://huggingface.co/docs/diffusers/optimization/memory#group-offloading
    """
    if placement is Placement.RESIDENT:
        module.to(device)
        return
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(module, onload_device=device, offload_type=kind, use_stream=device.type == "cuda", **blocks)


def bytes_of(module: torch.nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
