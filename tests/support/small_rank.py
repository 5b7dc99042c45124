"""`python -m tests.support.small_rank`: another rank, with a small model, and too little memory for some jobs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from handler.settings import WorkerSettings
from handler.video_model import follower, generate
from handler.video_model.approximations import approximate
from handler.video_model.base import ModelLoadError
from handler.video_model.generate import PipelineModel
from handler.video_model.parallel import Parallel
from handler.video_model.progress import DenoisingProgress
from handler.video_model.windows import SuperResolutionTiling
from tests.support.small_models import family, image_family

#: The prompt of jobs for which this rank has too little memory after two steps.
TOO_LARGE: Final = "A paper boat that takes too much memory"


def windowed_family() -> PipelineModel:
    model = family()
    tiling = SuperResolutionTiling(tile=(3, 5), overlap=1, window=16, stride=15)
    routes = {asked: replace(route, tiling=tiling) for asked, route in model.parts.routes.items()}
    return PipelineModel(replace(model.parts, routes=routes))


#: The model path of a model that this rank can't load.
MISSING: Final = "a model that rank 1 lacks"

#: By the model path of the settings.
MODELS: Final[Mapping[str, Callable[[], PipelineModel]]] = {
    "family": family,
    "windowed family": windowed_family,
    "image family": image_family,
}


def load_rank(settings: WorkerSettings, parallel: Parallel | None) -> PipelineModel:
    """What `handler.video_model.loader` does, for a small model."""
    if settings.model_path == MISSING and parallel is not None and parallel.rank == 1:
        raise ModelLoadError("it is not on this disk")
    model = MODELS[settings.model_path]()
    base = next(iter(model.parts.bases.values())).pipeline.transformer
    approximate(
        model.parts.transformers,
        settings.approximations,
        many_steps=[base],
        bases={"480p_i2v": base},
        upscalers=model.parts.upscaler_transformers,
    )
    if parallel is not None:
        for transformer in model.parts.transformers:
            parallel.share(transformer)
        model._parallel = parallel
    return model


class _Progress(DenoisingProgress):
    def __init__(self, job_input: Any, *arguments: Any) -> None:
        super().__init__(job_input, *arguments)
        self._steps_left = 2 if job_input.prompt == TOO_LARGE else None

    def after_denoising(self, latents: torch.Tensor) -> None:
        super().after_denoising(latents)
        if self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left == 0:
                raise MemoryError("can't allocate memory on rank 1")


if __name__ == "__main__":
    torch.set_num_threads(1)
    setattr(generate, "DenoisingProgress", _Progress)  # noqa: B010 - mypy rejects the assignment
    setattr(follower, "load_rank", load_rank)  # noqa: B010
    follower.main(sys.argv[1:])
