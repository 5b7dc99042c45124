"""How long until a video is there: what is ahead of it, and what such videos took lately."""

from __future__ import annotations

import math
from typing import Final

from contract.job import MAX_DURATION, MIN_DURATION, JobInput, Profile, Resolution
from shim.queue.base import Backlog, RenderTimes, kind_of

#: Midpoints of the API reference's table, for 5 and 10 seconds of video.
_DOCUMENTED: Final = {Resolution.P720: (25.0, 50.0), Resolution.P1080: (37.5, 75.0)}
#: The same for the slower profiles, times this: reckoned from their steps and passes, until one has been observed.
_SLOWER: Final = {Profile.BALANCED.model: 6.0, Profile.QUALITY.model: 40.0}


def render_seconds(job_input: JobInput, observed: RenderTimes) -> float:
    """Seconds that one render takes: as observed, else the documented figure, linear in the duration."""
    seen = observed.get(kind_of(job_input))
    if seen is not None:
        return seen
    shortest, longest = _DOCUMENTED[job_input.resolution]
    share = (job_input.duration - MIN_DURATION) / (MAX_DURATION - MIN_DURATION)
    return (shortest + share * (longest - shortest)) * _SLOWER.get(job_input.model, 1.0)


def estimated_time(job_input: JobInput, backlog: Backlog, observed: RenderTimes) -> int:
    """Seconds from now until a job submitted behind `backlog` is done.

    A running job counts half: on average that much of it is left. A job whose input the queue hides counts as
    one like this.
    """
    waiting = sum(render_seconds(ahead or job_input, observed) for ahead in backlog.waiting)
    running = sum(render_seconds(ahead or job_input, observed) / 2 for ahead in backlog.running)
    if len(backlog.running) < backlog.workers:
        running = 0.0  # a free worker waits for nobody
    ahead_of_us = (waiting + running) / max(backlog.workers, 1)
    return math.ceil(ahead_of_us + render_seconds(job_input, observed))
