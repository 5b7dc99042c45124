"""What every kind of job needs on a GPU: seconds, memory of the GPU and of the host, and what is resident. No torch.

`hunyuan plan` and docs/performance.md print it, from the same functions that a worker plans and estimates with.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from contract.job import DEFAULT_MODEL, Profile, Resolution
from handler.video_model.catalog import CHECKPOINTS, IMAGE_BASES, image_routes, text_routes
from handler.video_model.cost import GPUS, Gpu, Speed, gpu_named, render_seconds
from handler.video_model.dimensions import HALF, SINGLE, TRANSFORMER, UPSAMPLERS, VAE
from handler.video_model.memory import (
    SMALLEST,
    DoesNotFitError,
    Part,
    Placement,
    PlacementPlan,
    Weights,
    budget,
    host_memory,
    peak,
)
from handler.video_model.workload import Workload, kind_of_job, workload

__all__ = ["GPUS", "Row", "gpu_named", "kind_of_video", "published_weights", "rows"]

_GB: Final = 1e9
_DURATIONS: Final = (5, 10)
#: The parts of the published models that are the same for every profile, in 16 bits: Qwen2.5-VL's text model with ByT5,
#: the VAE's encoder, SigLIP. Their largest neighbouring layers pass together while they are streamed.
_TEXT_ENCODERS: Final = Part(14_579_868_416, 1_115_692_032, 27_523_879_680)
_VAE_ENCODER: Final = Part(HALF * VAE.encoder_parameters, 63_703_296, 921_283_840)
_VISION: Final = Part(856_457_032, 19_843_744, 1_410_789_376)
#: What a transformer takes in pinned blocks of powers of two: a base model, and one of super-resolution.
_ROUNDED: Final = 18_478_073_920, 18_487_519_296


@dataclass(frozen=True)
class Row:
    """One kind of job on one GPU. Memory in GB; `host_rounded` without the allocator's setting for pinned blocks."""

    profile: Profile
    resolution: Resolution
    duration: int
    seconds: float
    vram: float
    host: float
    host_rounded: float
    resident: str
    tile: int
    fits: bool
    problem: str = ""


def published_weights(profile: Profile, *, images: bool) -> Weights:
    """A worker's weights with the checkpoints of one profile; with `images` also those of videos from an image."""
    models = {DEFAULT_MODEL: profile}
    routes = {*text_routes(models).values()}
    if images:
        routes |= {*image_routes(models, IMAGE_BASES.values()).values()}
    names = {name for route in routes for name in route.checkpoints}
    upscalers = [name for name in names if CHECKPOINTS[name].is_super_resolution]
    latent, bases = TRANSFORMER.latent_channels, len(names) - len(upscalers)
    base = HALF * TRANSFORMER.parameters(2 * latent + 1, meanflow=False)
    stage = HALF * TRANSFORMER.parameters(3 * latent + 2, meanflow=True)
    outside = TRANSFORMER.outside_parameters(
        *((3 * latent + 2,) if upscalers else (2 * latent + 1,)), meanflow=bool(upscalers)
    )
    decoder = HALF * VAE.decoder_parameters
    return Weights(
        text_encoders=_TEXT_ENCODERS,
        transformers=Part(
            bases * base + len(upscalers) * stage,
            HALF * (2 * TRANSFORMER.block_parameters + outside),
            bases * _ROUNDED[0] + len(upscalers) * _ROUNDED[1],
        ),
        vae_decoder=Part(decoder, decoder),
        vae_encoder=_VAE_ENCODER if images else Part(),
        vision=_VISION if images else Part(),
        small=sum(SINGLE * UPSAMPLERS[name].parameters for name in upscalers),
    )


def kind_of_video(profile: Profile, resolution: Resolution, duration: int, *, from_image: bool) -> Workload:
    """The stages of a 16:9 video."""
    models = {DEFAULT_MODEL: profile}
    routes = image_routes(models, IMAGE_BASES.values()) if from_image else text_routes(models)
    job_input = kind_of_job(resolution, duration, from_image=from_image)
    return workload(job_input, routes[DEFAULT_MODEL, resolution], CHECKPOINTS)


def rows(
    gpu: Gpu, *, vram: float | None = None, share: float | None = None, sage: bool = False, from_image: bool = False
) -> Iterator[Row]:
    """Every profile, resolution and duration on this GPU. `vram` (GB), `share` and `sage` replace the GPU's own."""
    speed = Speed.of(gpu, share=share, eight_bit=sage)
    free = int((gpu.memory if vram is None else vram) * _GB)
    for profile in Profile:
        weights = published_weights(profile, images=from_image)
        for resolution in Resolution:
            for duration in _DURATIONS:
                video = kind_of_video(profile, resolution, duration, from_image=from_image)
                yield _row(profile, resolution, duration, video, weights, speed, free)


def _row(
    profile: Profile, resolution: Resolution, duration: int, video: Workload, weights: Weights, speed: Speed, free: int
) -> Row:
    try:
        plan, problem = budget(free, weights, [video]).plan, ""
    except DoesNotFitError as exc:
        plan, problem = SMALLEST, str(exc)
    host = host_memory(plan, weights, video)
    streamed = plan.transformers is Placement.STREAMED
    return Row(
        profile=profile,
        resolution=resolution,
        duration=duration,
        seconds=sum(render_seconds(video, speed, streamed=streamed, tile=plan.tile).values()),
        vram=peak(plan, weights, video) / _GB,
        host=host.total / _GB,
        host_rounded=(host.total - host.pinned + host.rounded) / _GB,
        resident=_resident(plan),
        tile=plan.tile,
        fits=not problem,
        problem=problem,
    )


def _resident(plan: PlacementPlan) -> str:
    named = (("text encoders", plan.text_encoders), ("transformers", plan.transformers), ("VAE", plan.vae))
    return ", ".join(name for name, where in named if where is Placement.RESIDENT) or "nothing"
