"""The memory plan: arithmetic at the model's real sizes."""

import pytest

from contract.job import Profile, Resolution
from handler.video_model.memory import (
    PLANS,
    SMALLEST,
    WHOLE,
    DoesNotFitError,
    Part,
    Weights,
    budget,
    decoding_bytes,
    host_memory,
    peak,
)
from handler.video_model.planning import kind_of_video, published_weights
from handler.video_model.workload import Workload

GB = 1_000_000_000
FAST = published_weights(Profile.FAST, images=False)
P720, P1080 = Resolution.P720, Resolution.P1080


def video(resolution: Resolution, duration: int, profile: Profile = Profile.FAST) -> Workload:
    return kind_of_video(profile, resolution, duration, from_image=False)


CELLS = [video(resolution, duration) for resolution in Resolution for duration in range(5, 11)]


def test_tokens_are_counted_as_the_models_patches() -> None:
    assert video(P720, 5).stages[-1].tokens == 31 * 45 * 80
    assert video(P1080, 10).stages[-1].tokens == 61 * 67 * 119


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("from_image", [False, True])
@pytest.mark.parametrize(
    ("resolution", "duration", "documented"), [(P720, 5, 12), (P720, 10, 14), (P1080, 5, 16), (P1080, 10, 20)]
)
def test_the_documented_memory_is_enough_for_each_cell(
    resolution: Resolution, duration: int, documented: int, profile: Profile, from_image: bool
) -> None:
    weights = published_weights(profile, images=from_image)
    cell = kind_of_video(profile, resolution, duration, from_image=from_image)
    budget(documented * GB, weights, [cell]).check(cell)


def test_a_large_gpu_holds_everything_but_the_text_encoders() -> None:
    plan = budget(72 * GB, FAST, [video(P1080, 5)]).plan
    assert (plan.text_encoders, plan.transformers, plan.vae) == ("streamed", "resident", "resident")
    assert budget(140 * GB, FAST, CELLS).plan == PLANS[0]


def test_a_larger_gpu_never_gets_a_slower_plan() -> None:
    chosen = [PLANS.index(budget(free * GB, FAST, [video(P720, 5)]).plan) for free in range(12, 141, 4)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[-1] == 0, "140 GB hold it all"


@pytest.mark.parametrize("each", CELLS)
def test_no_plan_takes_less_than_the_smallest(each: Workload) -> None:
    assert min(peak(plan, FAST, each) for plan in PLANS) == peak(SMALLEST, FAST, each)


@pytest.mark.parametrize("resolution", Resolution)
def test_decoding_takes_the_same_memory_at_every_duration(resolution: Resolution) -> None:
    short, long = (decoding_bytes(video(resolution, duration), WHOLE) for duration in (5, 10))
    assert short < long < 1.02 * short


def test_offloading_can_be_forced() -> None:
    assert budget(140 * GB, FAST, CELLS, offload=True).plan == SMALLEST


def test_a_small_gpu_serves_what_fits_and_refuses_the_rest() -> None:
    made = budget(10 * GB, FAST, CELLS)
    made.check(video(P720, 10))
    with pytest.raises(DoesNotFitError, match=r"takes \d+\.\d GB of GPU memory, 10\.0 GB are free"):
        made.check(video(P1080, 10))
    with pytest.raises(DoesNotFitError):
        budget(3 * GB, FAST, CELLS)


def test_a_plan_reads_as_a_sentence() -> None:
    assert "transformers streamed" in str(SMALLEST)
    assert "the whole picture at once" in str(PLANS[0])


def test_streamed_weights_are_pinned_in_host_memory_and_rounding_takes_more() -> None:
    streamed = PLANS[-4]
    found = host_memory(streamed, FAST, video(P720, 5))
    assert found.pinned == FAST.text_encoders.bytes + FAST.transformers.bytes == pytest.approx(64.6 * GB, rel=0.01)
    assert found.rounded == pytest.approx(83 * GB, rel=0.01)
    assert host_memory(PLANS[0], FAST, video(P720, 5)).pinned == 0


def test_a_host_with_too_little_memory_is_refused_with_a_sentence() -> None:
    with pytest.raises(DoesNotFitError, match=r"it takes 6\d\.\d GB of host memory .* may use 41\.0 GB; give"):
        budget(24 * GB, FAST, [video(P720, 5)], host=41 * GB)
    assert budget(80 * GB, FAST, [video(P720, 5)], host=41 * GB).plan == PLANS[0], "nothing is streamed"


def test_with_8_bit_weights_transformers_stay_on_a_gpu_that_would_stream_them() -> None:
    halved = Part(FAST.transformers.bytes // 2, FAST.transformers.passing // 2)
    in_8_bits = Weights(FAST.text_encoders, halved, FAST.vae_decoder, small=FAST.small)
    free, cells = 48 * GB, [video(P1080, 5)]
    assert budget(free, FAST, cells).plan.transformers == "streamed"
    assert budget(free, in_8_bits, cells).plan.transformers == "resident"
