"""The estimate of how long a new task takes."""

import pytest

from contract.job import AspectRatio, JobInput, Profile, Resolution
from contract.render_times import calculated_seconds
from contract.worker import RenderEstimate, WorkerReport, WorkerState
from shim.queue.base import Backlog, Workers, render_kind
from shim.queue.estimates import documented_rate, estimated_time, render_seconds

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
def test_the_documented_times_apply_before_the_first_render(
    resolution: Resolution, duration: int, shortest: int, longest: int
) -> None:
    assert shortest <= estimated_time(job(resolution, duration), NOTHING_AHEAD, {}) <= longest


@pytest.mark.parametrize("resolution", Resolution)
@pytest.mark.parametrize("aspect_ratio", AspectRatio)
def test_every_resolution_has_an_estimate_in_proportion_to_the_duration(
    resolution: Resolution, aspect_ratio: AspectRatio
) -> None:
    short, long = [
        render_seconds(job(resolution, duration).model_copy(update={"aspect_ratio": aspect_ratio}), {})
        for duration in (5, 10)
    ]
    assert 0 < short == long / 2


def test_a_resolution_that_the_reference_lacks_is_scaled_by_its_pixels() -> None:
    assert documented_rate("360p", 640 * 360) == documented_rate("720p", 1280 * 720) / 4


def test_a_slower_profile_takes_as_long_as_calculated_until_it_has_been_observed() -> None:
    jobs = [job().model_copy(update={"model": profile.model}) for profile in Profile]
    turbo, *slower = [render_seconds(each, {}) for each in jobs]
    assert turbo >= render_seconds(job(), {}), "the documented time, or what is calculated"
    assert slower == [calculated_seconds(profile, job()) for profile in list(Profile)[1:]]
    assert slower[0] > 20 * render_seconds(job(), {}), "the documented times are not those of profile fast"
    observed = {render_kind(jobs[3]): 300.0}
    assert [render_seconds(each, observed) for each in jobs] == [turbo, *slower[:2], 300.0]


def test_observed_times_replace_the_documented_ones() -> None:
    assert render_seconds(job(), {render_kind(job()): 12.5}) == 12.5


def report(state: WorkerState, *seconds: float) -> WorkerReport:
    estimates = [
        RenderEstimate(model=job().model, resolution=job().resolution, duration=job().duration, seconds=each)
        for each in seconds
    ]
    return WorkerReport(state=state, model="any", estimates=tuple(estimates))


def test_what_ready_workers_expect_applies_before_the_first_render() -> None:
    reports = {
        "fast": report(WorkerState.READY, 70.0),
        "slow": report(WorkerState.READY, 90.0),
        "silent": report(WorkerState.READY),
        "loading": report(WorkerState.LOADING, 5000.0),
    }
    expected = Workers(3, 1, 0, reports).estimates
    assert render_seconds(job(), expected) == 90, "of several workers, the slowest"
    assert render_seconds(job(), {**expected, render_kind(job()): 80.0}) == 80
    assert Workers(0, 0, 0).estimates == {}


def test_the_jobs_ahead_are_added() -> None:
    observed = {render_kind(job()): 60.0, render_kind(job(Resolution.P720, 5)): 20.0}
    backlog = Backlog(waiting=[job(Resolution.P720, 5)], running=[job()], workers=1)
    assert estimated_time(job(), backlog, observed) == 30 + 20 + 60


def test_more_workers_wait_less() -> None:
    backlog = Backlog(waiting=[job()] * 4, running=[job(), job()], workers=2)
    assert estimated_time(job(), backlog, {render_kind(job()): 10.0}) == 10 / 2 + 40 / 2 + 10


def test_a_free_worker_takes_the_job_at_once() -> None:
    backlog = Backlog(waiting=(), running=[job()], workers=2)
    assert estimated_time(job(), backlog, {render_kind(job()): 10.0}) == 10


def test_a_job_with_a_hidden_input_counts_like_the_new_one() -> None:
    backlog = Backlog(waiting=[None], running=(), workers=0)
    assert estimated_time(job(), backlog, {render_kind(job()): 10.0}) == 20


@pytest.mark.parametrize(
    ("waiting", "running", "workers", "seconds"),
    [
        (1, 0, 2, 10),  # one free worker for each
        (2, 0, 2, 10 + 10),  # the third job waits for one render, not for the sum of two
        (2, 1, 2, 10 + 10),  # free at 5 and 0: the two waiting jobs end at 10 and at 15
        (0, 3, 2, 5 + 10),  # a third running job, whose worker is lost, needs one of the two workers
        (3, 0, 4, 10),
    ],
)
def test_each_job_goes_to_the_worker_that_is_free_first(waiting: int, running: int, workers: int, seconds: int) -> None:
    backlog = Backlog(waiting=[job()] * waiting, running=[job()] * running, workers=workers)
    assert estimated_time(job(), backlog, {render_kind(job()): 10.0}) == seconds


def test_a_long_job_ahead_keeps_one_worker_only() -> None:
    observed = {render_kind(job()): 100.0, render_kind(job(Resolution.P720, 5)): 10.0}
    short = job(Resolution.P720, 5)
    backlog = Backlog(waiting=[job(), short, short], running=(), workers=2)
    assert estimated_time(short, backlog, observed) == 10 + 10 + 10
