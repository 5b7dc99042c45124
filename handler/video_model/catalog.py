"""What is known of the checkpoints, and which of them make a video: data, and the few lines that read it.

Source: https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5 (README, "Inference", recommended settings), and for the
four-step base https://huggingface.co/lightx2v/Hy1.5-Distill-Models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from contract.job import Profile, Resolution


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint is sampled. None: as the checkpoint's own scheduler and guider say."""

    num_inference_steps: int = 50
    shift: float | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """`base_size` is the side, in pixels, of the square whose area its videos have: 640 for 480p, 960, 1440."""

    name: str
    base_size: int
    sampling: Sampling


CHECKPOINTS: Final[Mapping[str, Checkpoint]] = {
    checkpoint.name: checkpoint
    for checkpoint in (
        Checkpoint("480p_t2v_4step", 640, Sampling(4, shift=9.0, guidance_scale=1.0)),
        Checkpoint("480p_t2v_distilled", 640, Sampling(50, shift=5.0, guidance_scale=1.0)),
        Checkpoint("480p_t2v", 640, Sampling(50, shift=5.0, guidance_scale=6.0)),
        Checkpoint("720p_t2v_distilled", 960, Sampling(50, shift=9.0, guidance_scale=1.0)),
        Checkpoint("720p_t2v", 960, Sampling(50, shift=9.0, guidance_scale=6.0)),
        Checkpoint("480p_i2v_step_distilled", 640, Sampling(12, shift=7.0, guidance_scale=1.0)),
        Checkpoint("480p_i2v_distilled", 640, Sampling(50, shift=5.0, guidance_scale=1.0)),
        Checkpoint("480p_i2v", 640, Sampling(50, shift=5.0, guidance_scale=6.0)),
        Checkpoint("720p_i2v_distilled", 960, Sampling(50, shift=7.0, guidance_scale=1.0)),
        Checkpoint("720p_i2v", 960, Sampling(50, shift=7.0, guidance_scale=6.0)),
        Checkpoint("720p_sr_distilled", 960, Sampling(6, shift=2.0, guidance_scale=1.0)),
        Checkpoint("1080p_sr_distilled", 1440, Sampling(8, shift=2.0, guidance_scale=1.0)),
    )
}


@dataclass(frozen=True)
class Route:
    """The checkpoints that a video goes through, by name: a base model, then super-resolution stages in order."""

    base: str
    super_resolution: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Every checkpoint on the way."""
        return (self.base, *self.super_resolution)


_SR_720P: Final = "720p_sr_distilled"
_SR_1080P: Final = "1080p_sr_distilled"

ROUTES: Final[Mapping[tuple[Profile, Resolution], Route]] = {
    (Profile.FAST, Resolution.P720): Route("480p_t2v_4step", (_SR_720P,)),
    (Profile.FAST, Resolution.P1080): Route("480p_t2v_4step", (_SR_720P, _SR_1080P)),
    (Profile.BALANCED, Resolution.P720): Route("480p_t2v_distilled", (_SR_720P,)),
    (Profile.BALANCED, Resolution.P1080): Route("480p_t2v_distilled", (_SR_720P, _SR_1080P)),
    (Profile.QUALITY, Resolution.P720): Route("720p_t2v"),
    (Profile.QUALITY, Resolution.P1080): Route("720p_t2v", (_SR_1080P,)),
}

#: Where a video starts from an image, another base takes the place of the text-to-video one.
IMAGE_BASES: Final[Mapping[Profile, str]] = {
    Profile.FAST: "480p_i2v_step_distilled",
    Profile.BALANCED: "480p_i2v_distilled",
    Profile.QUALITY: "720p_i2v",
}


def needed(profile: Profile) -> frozenset[str]:
    """The checkpoints that a profile takes for all that may be asked of it."""
    return frozenset(name for (of, _), route in ROUTES.items() if of is profile for name in route.checkpoints)


def offered(present: Collection[str]) -> list[Profile]:
    """The profiles whose checkpoints are all there, fastest first."""
    return [profile for profile in Profile if needed(profile) <= frozenset(present)]


def known_name(directory_name: str) -> str | None:
    """The checkpoint that a directory's name tells of: `HunyuanVideo-1.5-Diffusers-480p_t2v` is `480p_t2v`."""
    return next((name for name in sorted(CHECKPOINTS, key=len, reverse=True) if directory_name.endswith(name)), None)


def bucket_size(base_size: int, width: int, height: int, patch: int = 16) -> tuple[int, int]:
    """(width, height) that a model of `base_size` renders for this aspect ratio, in pixels, multiples of `patch`.

    The sizes that the models were trained on: as many patches as a square of `base_size` has, or just fewer; of those
    the one whose aspect ratio is nearest, on the square's side where there is no exact one. Source:
    hyvideo/utils/data_utils.py in the repository above.
    """
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
    ratio = height / width
    # Upstream rounds ratios to five digits, and takes the nearest from the square's side.
    side = [size for size in sizes if (round(size[1] / size[0], 5) - ratio) * (1 if ratio < 1 else -1) >= 0]
    wide, high = min(side, key=lambda size: abs(round(size[1] / size[0], 5) - ratio))
    return patch * wide, patch * high
