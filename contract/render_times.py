"""How long a video takes to render, for programs that may not import the cost model of the worker.

The server limits RunPod's jobs with these seconds, and `hunyuan deploy` its endpoints. `handler.video_model.cost`
calculates them, and a test compares every one with it. Nothing here has been measured.
"""

import math
from collections.abc import Mapping
from typing import Final

from contract.job import DEFAULT_MODEL, MAX_DURATION, MIN_DURATION, JobInput, Profile, Resolution

#: Seconds on an H100 of a video from text, of the shortest and of the longest duration.
_ON_AN_H100: Final[Mapping[Profile, Mapping[Resolution, tuple[float, float]]]] = {
    Profile.TURBO: {Resolution.P720: (36, 85), Resolution.P1080: (36, 85)},
    Profile.FAST: {Resolution.P720: (76, 270), Resolution.P1080: (465, 1_730)},
    Profile.BALANCED: {Resolution.P720: (181, 634), Resolution.P1080: (570, 2_093)},
    Profile.QUALITY: {Resolution.P720: (1_038, 3_810), Resolution.P1080: (1_427, 5_270)},
}
#: An RTX 4090, the slowest GPU that the cost model knows, takes so many times as long as an H100.
SLOWEST: Final = 6.0
#: A video from an image takes at most so many times as long: its base model takes more steps, or guidance.
_FROM_AN_IMAGE: Final = 2.0
#: Steps of a checkpoint whose steps a request may change.
_STEPS: Final = 50
#: A job may take so many times as long as calculated before it is ended, and never less than this many seconds: a
#: finished video waits up to 600 s for its bucket (HUNYUAN_STORE_PATIENCE).
_MARGIN: Final = 2.0
_SHORTEST_TIMEOUT: Final = 1_800


def profile_of(model: str) -> Profile | None:
    """The profile that a request's `model` names; None for DEFAULT_MODEL, whose profile the worker chooses."""
    return None if model == DEFAULT_MODEL else Profile(model.removeprefix(f"{DEFAULT_MODEL}-"))


def calculated_seconds(profile: Profile, job_input: JobInput) -> float:
    """Seconds on an H100, rounded up. Between the two durations they are interpolated: up to an eighth too long."""
    shortest, longest = _ON_AN_H100[profile][job_input.resolution]
    share = (job_input.duration - MIN_DURATION) / (MAX_DURATION - MIN_DURATION)
    seconds = shortest + (longest - shortest) * share
    steps = max((job_input.num_inference_steps or _STEPS) / _STEPS, 1.0)
    return seconds * steps * (_FROM_AN_IMAGE if job_input.image is not None else 1.0)


def execution_timeout(job_input: JobInput, profile: Profile | None = None, slowdown: float = SLOWEST) -> int:
    """Seconds after which a platform may end the job, on a GPU that takes `slowdown` times as long as an H100.

    `profile` renders DEFAULT_MODEL; None stands for the slowest one, which also covers one checkpoint alone.
    """
    rendered_by = profile_of(job_input.model) or profile or Profile.QUALITY
    seconds = _MARGIN * slowdown * calculated_seconds(rendered_by, job_input)
    return max(60 * math.ceil(seconds / 60), _SHORTEST_TIMEOUT)


def longest_timeout(profile: Profile, slowdown: float = SLOWEST) -> int:
    """The execution timeout of the longest video that a profile renders."""
    longest = JobInput(prompt="The longest video", resolution=Resolution.P1080, duration=MAX_DURATION)
    return execution_timeout(longest, profile, slowdown)
