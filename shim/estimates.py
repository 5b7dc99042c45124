"""Estimates how long a new task takes, from the backlog and from recent render times."""

import math
from collections.abc import Mapping
from typing import Final

from contract.job import JobInput, Profile, Resolution
from shim.queue.base import Backlog, RenderTimes, render_kind

#: Render seconds for each second of video: midpoints of the API reference's table.
_DOCUMENTED: Final[Mapping[str, float]] = {Resolution.P720: 5.0, Resolution.P1080: 7.5}
_P720_PIXELS: Final = 1280 * 720
#: The same for a slower profile is this many times longer, by its steps and passes.
_SLOWER: Final[Mapping[str, float]] = {Profile.BALANCED.model: 6.0, Profile.QUALITY.model: 40.0}


def documented_rate(resolution: str, pixels: int) -> float:
    """Render seconds for each second of video. Scales 720p's by pixels for a resolution that the table lacks."""
    return _DOCUMENTED.get(resolution, _DOCUMENTED[Resolution.P720] * pixels / _P720_PIXELS)


def render_seconds(job_input: JobInput, observed: RenderTimes) -> float:
    """Seconds that one render takes: the observed mean of its kind, or the documented figure before the first one."""
    mean = observed.get(render_kind(job_input))
    if mean is not None:
        return mean
    rate = documented_rate(job_input.resolution, math.prod(job_input.size))
    return rate * job_input.duration * _SLOWER.get(job_input.model, 1.0)


def estimated_time(job_input: JobInput, backlog: Backlog, observed: RenderTimes) -> int:
    """Seconds from now until a job submitted behind `backlog` is done.

    A running job counts half, the mean of what is left of it. A hidden input counts as one like `job_input`.
    """
    waiting = sum(render_seconds(ahead or job_input, observed) for ahead in backlog.waiting)
    running = sum(render_seconds(ahead or job_input, observed) / 2 for ahead in backlog.running)
    if len(backlog.running) < backlog.workers:
        running = 0.0  # a free worker takes the job at once
    seconds_ahead = (waiting + running) / max(backlog.workers, 1)
    return math.ceil(seconds_ahead + render_seconds(job_input, observed))
