"""What a model consists of: base pipelines, super-resolution stages, and the routes of videos through them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from diffusers import HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel

from contract.job import MAX_DURATION, MIN_DURATION
from contract.offer import SamplingLimits
from handler.video_model.catalog import Checkpoint, Routes
from handler.video_model.super_resolution import SuperResolution
from handler.video_model.workload import Workload, kind_of_job, workload

#: From this number of steps on, neighbouring steps are alike. Step-distilled checkpoints take up to 12.
_MANY_STEPS: Final = 16


@dataclass(frozen=True)
class Base:
    """A base model: its pipeline, from text or from an image, and its checkpoint's numbers."""

    checkpoint: Checkpoint
    pipeline: HunyuanVideo15Pipeline  # or HunyuanVideo15ImageToVideoPipeline, which adds an image encoder

    @property
    def image_encoder(self) -> torch.nn.Module | None:
        """The vision tower; None for a text-to-video model."""
        encoder: torch.nn.Module | None = self.pipeline.components.get("image_encoder")
        return encoder


@dataclass(frozen=True)
class Upscaler:
    """A super-resolution stage and its checkpoint's numbers."""

    checkpoint: Checkpoint
    stage: SuperResolution


@dataclass(frozen=True)
class Parts:
    """The bases and upscalers by name, and which of them render a video. All bases share text encoders and VAE."""

    name: str
    bases: Mapping[str, Base]
    routes: Routes
    upscalers: Mapping[str, Upscaler] = field(default_factory=dict)
    image_routes: Routes = field(default_factory=dict)

    @property
    def shared(self) -> HunyuanVideo15Pipeline:
        """A pipeline with the shared text encoders and VAE."""
        return next(iter(self.bases.values())).pipeline

    @property
    def many_step_transformers(self) -> list[HunyuanVideo15Transformer3DModel]:
        """Those of base models that are not step-distilled."""
        sampled = [(base.pipeline.transformer, base.checkpoint.sampling) for base in self.bases.values()]
        return [transformer for transformer, sampling in sampled if sampling.num_inference_steps >= _MANY_STEPS]

    @property
    def upscaler_transformers(self) -> list[HunyuanVideo15Transformer3DModel]:
        """Those of super-resolution stages."""
        return [upscaler.stage.transformer for upscaler in self.upscalers.values()]

    @property
    def transformers(self) -> list[HunyuanVideo15Transformer3DModel]:
        """All of them, bases first."""
        return [base.pipeline.transformer for base in self.bases.values()] + self.upscaler_transformers

    @property
    def limits(self) -> list[SamplingLimits]:
        """What a request may not change, for each `model` that ends at a distilled base."""
        sampled = {
            (model, from_image, self.bases[route.base].checkpoint.sampling)
            for from_image, routes in ((False, self.routes), (True, self.image_routes))
            for (model, _), route in routes.items()
        }
        return [
            SamplingLimits(
                model=model, from_image=from_image, **{field: getattr(sampling, field) for field in sampling.fixed}
            )
            for model, from_image, sampling in sorted(sampled, key=repr)
            if sampling.fixed
        ]

    def workloads(self) -> list[Workload]:
        """The 16:9 videos that a request may ask for."""
        checkpoints = self.checkpoints
        return [
            workload(kind_of_job(resolution, duration, from_image=from_image), route, checkpoints)
            for from_image, routes in ((False, self.routes), (True, self.image_routes))
            for (_, resolution), route in dict.fromkeys(routes.items())
            for duration in range(MIN_DURATION, MAX_DURATION + 1)
        ]

    @property
    def checkpoints(self) -> Mapping[str, Checkpoint]:
        """Those of all bases and upscalers, by name."""
        parts: Mapping[str, Base | Upscaler] = {**self.bases, **self.upscalers}
        return {name: part.checkpoint for name, part in parts.items()}
