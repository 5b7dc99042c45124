"""Estimates how long a new task takes, from the backlog and from recent render times."""

import heapq
import math
from collections.abc import Mapping
from typing import Final

from contract.job import JobInput, Resolution
from contract.render_times import calculated_seconds, profile_of
from shim.queue.base import Backlog, RenderTimes, render_kind
from shim.queue.job import JobSnapshot

#: Render seconds for each second of video: midpoints of the API reference's table.
_DOCUMENTED: Final[Mapping[str, float]] = {Resolution.P720: 5.0, Resolution.P1080: 7.5}
_P720_PIXELS: Final = 1280 * 720
#: Percent from which on the pace of a render tells when it will end.
_STEADY_PROGRESS: Final = 5


def documented_rate(resolution: str, pixels: int) -> float:
    """Render seconds for each second of video. Scales 720p's by pixels for a resolution that the table lacks."""
    return _DOCUMENTED.get(resolution, _DOCUMENTED[Resolution.P720] * pixels / _P720_PIXELS)


def render_seconds(job_input: JobInput, observed: RenderTimes) -> float:
    """Seconds that one render takes: the observed mean of its kind, or what a worker expects before the first one.

    If no worker has said so: the documented figure, and what is calculated for an H100 for a profile that the client
    named and that is slower.
    """
    mean = observed.get(render_kind(job_input))
    if mean is not None:
        return mean
    documented = documented_rate(job_input.resolution, math.prod(job_input.size)) * job_input.duration
    profile = profile_of(job_input.model)
    return documented if profile is None else max(documented, calculated_seconds(profile, job_input))


def estimated_time(job_input: JobInput, backlog: Backlog, observed: RenderTimes) -> int:
    """Seconds from now until a job submitted behind `backlog` is done.

    Each job goes to the worker that is free first, in the order of the queue. A running job keeps its worker for half
    its time, the mean of what is left of it. A hidden input counts as one like `job_input`.
    """
    free_in = [0.0] * max(backlog.workers, 1)  # a heap: seconds until each worker is free
    for ahead in backlog.running:
        heapq.heapreplace(free_in, free_in[0] + render_seconds(ahead or job_input, observed) / 2)
    for ahead in backlog.waiting:
        heapq.heapreplace(free_in, free_in[0] + render_seconds(ahead or job_input, observed))
    return math.ceil(free_in[0] + render_seconds(job_input, observed))


def remaining_time(job: JobSnapshot) -> int | None:
    """Seconds until a waiting or running job is expected to be done; None if that cannot be said.

    The pace of its render counts, and before that the estimate at its submission. A later attempt has no pace, because
    progress never falls.
    """
    if job.running_time > 0 and job.progress >= _STEADY_PROGRESS and job.attempts <= 1:
        return math.ceil(job.running_time * (100 - job.progress) / job.progress)
    if job.estimated_time is None or job.estimated_time <= job.elapsed_time:
        return None
    return math.ceil(job.estimated_time - job.elapsed_time)
