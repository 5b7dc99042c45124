"""How long a new task will take."""

import pytest

from contract.job import JobInput, Resolution
from shim.estimates import estimated_time, render_seconds
from shim.queue.base import Backlog, kind_of

NOTHING_AHEAD = Backlog(waiting=(), running=(), workers=1)


def job(resolution: Resolution = Resolution.P1080, duration: int = 10) -> JobInput:
    return JobInput(prompt="A paper boat on a rainy street", resolution=resolution, duration=duration)


@pytest.mark.parametrize(
    ("resolution", "duration", "shortest", "longest"),
    [
        (Resolution.P720, 5, 20, 30),
        (Resolution.P720, 10, 40, 60),
        (Resolution.P1080, 5, 30, 45),
        (Resolution.P1080, 10, 60, 90),
    ],
)
def test_before_any_render_the_documented_times_hold(
    resolution: Resolution, duration: int, shortest: int, longest: int
) -> None:
    assert shortest <= estimated_time(job(resolution, duration), NOTHING_AHEAD, {}) <= longest


def test_a_slower_profile_takes_longer_until_it_has_been_observed() -> None:
    models = ["HunyuanVideo-1.5-fast", "HunyuanVideo-1.5-balanced", "HunyuanVideo-1.5-quality"]
    jobs = [job().model_copy(update={"model": model}) for model in models]
    seconds = [render_seconds(each, {}) for each in jobs]
    assert seconds == sorted(seconds)
    assert seconds[0] == render_seconds(job(), {}) < seconds[1]
    observed = {kind_of(jobs[2]): 300.0}
    assert [render_seconds(each, observed) for each in jobs] == [*seconds[:2], 300.0]


def test_observed_times_replace_the_documented_ones() -> None:
    assert render_seconds(job(), {kind_of(job()): 12.5}) == 12.5


def test_what_waits_ahead_is_added() -> None:
    observed = {kind_of(job()): 60.0, kind_of(job(Resolution.P720, 5)): 20.0}
    backlog = Backlog(waiting=[job(Resolution.P720, 5)], running=[job()], workers=1)
    assert estimated_time(job(), backlog, observed) == 30 + 20 + 60


def test_more_workers_wait_less() -> None:
    backlog = Backlog(waiting=[job()] * 4, running=[job(), job()], workers=2)
    assert estimated_time(job(), backlog, {kind_of(job()): 10.0}) == 10 / 2 + 40 / 2 + 10


def test_a_free_worker_waits_for_nobody() -> None:
    backlog = Backlog(waiting=(), running=[job()], workers=2)
    assert estimated_time(job(), backlog, {kind_of(job()): 10.0}) == 10


def test_a_job_whose_input_is_hidden_counts_as_one_like_ours() -> None:
    backlog = Backlog(waiting=[None], running=(), workers=0)
    assert estimated_time(job(), backlog, {kind_of(job()): 10.0}) == 20
