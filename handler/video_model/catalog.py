"""The checkpoints, their sampling and sizes, and the route of a video through them.

A new resolution needs its `ROUTES` here, and nothing else of the model changes.

Source of the numbers: https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5 (README, "Inference", recommended
settings), and for the four-step base https://huggingface.co/lightx2v/Hy1.5-Distill-Models.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from contract.job import DEFAULT_MODEL, Profile, Resolution
from handler.video_model.windows import SuperResolutionTiling


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint is sampled. None stands for the value of the checkpoint's own scheduler or guider.

    `fixed` names the fields of a request that must not differ from these numbers, because distillation fixed them.
    """

    num_inference_steps: int = 50
    shift: float | None = None
    guidance_scale: float | None = None
    fixed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """`base_size` is the side, in pixels, of a square with the area of its videos: 640 for 480p, 960, 1440."""

    name: str
    base_size: int
    sampling: Sampling

    @property
    def is_super_resolution(self) -> bool:
        """Whether it upscales the latents of another checkpoint."""
        return "_sr_" in self.name


#: What a request may not change. Every distilled checkpoint has guidance in its weights, and applying it again breaks
#: the video. A CFG-distilled checkpoint must use 50 steps (the repository's README), and the four-step base was trained
#: at four timesteps only. The step-distilled image base takes 8 or 12 steps, and 12 by default in the repository.
_GUIDANCE: Final = ("guidance_scale",)
_GUIDANCE_AND_STEPS: Final = ("guidance_scale", "num_inference_steps")

CHECKPOINTS: Final[Mapping[str, Checkpoint]] = {
    checkpoint.name: checkpoint
    for checkpoint in (
        # Shift 9 is in LightX2V's example for these weights (examples/hunyuan_video/hunyuan_t2v_distill.py, commit
        # 4a4f5417), which is newer than its configuration with shift 5 (configs/hunyuan_video_15/
        # hunyuan_video_t2v_480p_distill.json, commit 753a494c) and names the published file. Both render 81 frames at
        # 16 fps; for 121 frames at 24 fps neither is published.
        Checkpoint("480p_t2v_4step", 640, Sampling(4, shift=9.0, guidance_scale=1.0, fixed=_GUIDANCE_AND_STEPS)),
        Checkpoint("480p_t2v_distilled", 640, Sampling(50, shift=5.0, guidance_scale=1.0, fixed=_GUIDANCE_AND_STEPS)),
        Checkpoint("480p_t2v", 640, Sampling(50, shift=5.0, guidance_scale=6.0)),
        Checkpoint("720p_t2v_distilled", 960, Sampling(50, shift=9.0, guidance_scale=1.0, fixed=_GUIDANCE_AND_STEPS)),
        Checkpoint("720p_t2v", 960, Sampling(50, shift=9.0, guidance_scale=6.0)),
        Checkpoint("480p_i2v_step_distilled", 640, Sampling(12, shift=7.0, guidance_scale=1.0, fixed=_GUIDANCE)),
        Checkpoint("480p_i2v_distilled", 640, Sampling(50, shift=5.0, guidance_scale=1.0, fixed=_GUIDANCE_AND_STEPS)),
        Checkpoint("480p_i2v", 640, Sampling(50, shift=5.0, guidance_scale=6.0)),
        Checkpoint("720p_i2v_distilled", 960, Sampling(50, shift=7.0, guidance_scale=1.0, fixed=_GUIDANCE_AND_STEPS)),
        Checkpoint("720p_i2v", 960, Sampling(50, shift=7.0, guidance_scale=6.0)),
        Checkpoint("720p_sr_distilled", 960, Sampling(6, shift=2.0, guidance_scale=1.0)),
        Checkpoint("1080p_sr_distilled", 1440, Sampling(8, shift=2.0, guidance_scale=1.0)),
    )
}


@dataclass(frozen=True)
class Route:
    """Names of the checkpoints that render a video: a base model, then super-resolution stages in order.

    With a `tiling` each stage computes a video window by window, without one the whole video at once.
    """

    base: str
    super_resolution: tuple[str, ...] = ()
    tiling: SuperResolutionTiling | None = None

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """All of them, in order."""
        return (self.base, *self.super_resolution)


#: The route for each `model` of a request and each resolution.
Routes = Mapping[tuple[str, Resolution], Route]

_SR_720P: Final = "720p_sr_distilled"
_SR_1080P: Final = "1080p_sr_distilled"

#: Chosen by its error and its cost: docs/performance.md has both.
TURBO_TILING: Final = SuperResolutionTiling(tile=(45, 42), overlap=4, window=12, stride=10)

ROUTES: Final[Mapping[tuple[Profile, Resolution], Route]] = {
    # The encoder scales 720p to 1080p.
    (Profile.TURBO, Resolution.P720): Route("480p_t2v_4step", (_SR_720P,), TURBO_TILING),
    (Profile.TURBO, Resolution.P1080): Route("480p_t2v_4step", (_SR_720P,), TURBO_TILING),
    (Profile.FAST, Resolution.P720): Route("480p_t2v_4step", (_SR_720P,)),
    (Profile.FAST, Resolution.P1080): Route("480p_t2v_4step", (_SR_720P, _SR_1080P)),
    (Profile.BALANCED, Resolution.P720): Route("480p_t2v_distilled", (_SR_720P,)),
    (Profile.BALANCED, Resolution.P1080): Route("480p_t2v_distilled", (_SR_720P, _SR_1080P)),
    (Profile.QUALITY, Resolution.P720): Route("720p_t2v"),
    (Profile.QUALITY, Resolution.P1080): Route("720p_t2v", (_SR_1080P,)),
}

#: The base model of a route whose video starts from an image.
IMAGE_BASES: Final[Mapping[Profile, str]] = {
    Profile.TURBO: "480p_i2v_step_distilled",
    Profile.FAST: "480p_i2v_step_distilled",
    Profile.BALANCED: "480p_i2v_distilled",
    Profile.QUALITY: "720p_i2v",
}


#: A base that is not distilled, for a profile whose own image base is absent: with guidance, it takes twice the time.
_UNDISTILLED_IMAGE_BASES: Final[Mapping[Profile, str]] = {Profile.BALANCED: "480p_i2v"}


def needed(profile: Profile) -> frozenset[str]:
    """The checkpoints that a profile needs for all resolutions."""
    return frozenset(name for (of, _), route in ROUTES.items() if of is profile for name in route.checkpoints)


def missing(profile: Profile, present: Collection[str]) -> list[str]:
    """The checkpoints that a profile needs and that are not present."""
    return sorted(needed(profile) - set(present))


def offered(present: Collection[str]) -> list[Profile]:
    """The profiles whose checkpoints are all present, fastest first."""
    return [profile for profile in Profile if not missing(profile, present)]


def text_routes(models: Mapping[str, Profile]) -> Routes:
    """The routes of videos from text, for the profile behind each `model`."""
    return {(model, size): ROUTES[profile, size] for model, profile in models.items() for size in Resolution}


def image_routes(models: Mapping[str, Profile], present: Collection[str]) -> Routes:
    """The routes of videos from an image; none if no image-to-video base is present.

    A profile without a base takes the fastest profile that has one.
    """
    candidates = [
        (profile, name) for bases in (_UNDISTILLED_IMAGE_BASES, IMAGE_BASES) for profile, name in bases.items()
    ]
    bases = {profile: name for profile, name in candidates if name in present}
    able = [profile for profile in Profile if profile in models.values() and profile in bases]
    if not able:
        return {}
    taken = {model: profile if profile in able else able[0] for model, profile in models.items()}
    return {key: replace(route, base=bases[taken[key[0]]]) for key, route in text_routes(taken).items()}


def single_routes(checkpoint: str) -> Routes:
    """One checkpoint renders every resolution; the encoder scales its videos."""
    return {(DEFAULT_MODEL, resolution): Route(checkpoint) for resolution in Resolution}


def known_name(directory_name: str) -> str | None:
    """The checkpoint that a directory name ends with: `HunyuanVideo-1.5-Diffusers-480p_t2v` is `480p_t2v`."""
    return next((name for name in sorted(CHECKPOINTS, key=len, reverse=True) if directory_name.endswith(name)), None)


@cache
def trained_size(base_size: int, width: int, height: int, patch: int = 16) -> tuple[int, int]:
    """(width, height) in pixels, multiples of `patch`, that a model of `base_size` renders for an aspect ratio.

    The models were trained on these sizes: at most as many patches as a square of `base_size` has, in sides of up to
    4:1. Of them this is the one with the nearest ratio of height to width. Source: hyvideo/utils/data_utils.py in the
    repository above. diffusers' rule differs: its nearest ratio lies on the square's side of the wanted one.
    """
    # 1. All sizes, from the widest to the highest.
    patches = round((base_size / patch) ** 2)
    wide, high = patches, 1
    sizes: list[tuple[int, int]] = []
    while wide > 0:
        if max(wide, high) <= 4 * min(wide, high):
            sizes.append((wide, high))
        if wide * (high + 1) <= patches:
            high += 1
        else:
            wide -= 1
    # 2. The nearest. As the source does, round ratios to five digits; the first of two equally near ones wins.
    wide, high = min(sizes, key=lambda size: abs(round(size[1] / size[0], 5) - height / width))
    return patch * wide, patch * high
