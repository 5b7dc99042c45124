"""The memory plan: arithmetic at the model's real sizes."""

import pytest

from handler.video_model.memory import PLANS, SMALLEST, DoesNotFitError, Weights, Workload, budget, peak

GB = 1_000_000_000
#: One base model and its two super-resolution stages in bf16, from the parameter counts of the real checkpoints.
REAL = Weights(
    text_encoders=int(14.6 * GB), transformers=[int(16.65 * GB)] * 3, vae=int(2.5 * GB), block=int(0.31 * GB)
)
SIZES = {"720p": (1280, 720), "1080p": (1904, 1072)}


def workload(resolution: str, duration: int) -> Workload:
    return Workload(num_frames=24 * duration + 1, size=SIZES[resolution])


def test_tokens_are_counted_as_the_models_patches() -> None:
    assert workload("720p", 5).tokens == 31 * 45 * 80
    assert workload("1080p", 10).tokens == 61 * 67 * 119


CELLS = [workload(resolution, duration) for resolution in SIZES for duration in range(5, 11)]


@pytest.mark.parametrize(
    ("resolution", "duration", "documented"), [("720p", 5, 12), ("720p", 10, 14), ("1080p", 5, 16), ("1080p", 10, 20)]
)
def test_the_documented_memory_is_enough_for_each_cell(resolution: str, duration: int, documented: int) -> None:
    budget(documented * GB, REAL, CELLS).check(workload(resolution, duration))


def test_a_large_gpu_holds_everything_but_the_text_encoders() -> None:
    plan = budget(72 * GB, REAL, [workload("1080p", 5)]).plan
    assert (plan.text_encoders, plan.transformers, plan.vae) == ("streamed", "resident", "resident")


def test_a_larger_gpu_never_gets_a_slower_plan() -> None:
    chosen = [PLANS.index(budget(free * GB, REAL, [workload("720p", 5)]).plan) for free in range(12, 141, 4)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[-1] == 0, "140 GB hold it all"


@pytest.mark.parametrize("each", CELLS)
def test_no_plan_takes_less_than_the_smallest(each: Workload) -> None:
    assert min(peak(plan, REAL, each) for plan in PLANS) == peak(SMALLEST, REAL, each)


def test_the_gpu_holds_one_tile_and_seams_of_the_decoded_video() -> None:
    longest = workload("1080p", 10)
    whole = 1904 * 1072 * 241 * 3 * 2
    assert longest.decoding(128) - 128 * 128 * 241 * longest.channels * 2 * 4 < whole / 5


def test_offloading_can_be_forced() -> None:
    assert budget(140 * GB, REAL, CELLS, offload=True).plan == SMALLEST


def test_a_small_gpu_serves_what_fits_and_refuses_the_rest() -> None:
    made = budget(14 * GB, REAL, CELLS)
    made.check(workload("720p", 10))
    made.check(workload("1080p", 5))
    with pytest.raises(DoesNotFitError, match=r"takes \d+\.\d GB of GPU memory, 14\.0 GB are free"):
        made.check(workload("1080p", 10))
    with pytest.raises(DoesNotFitError):
        budget(3 * GB, REAL, CELLS)


def test_a_plan_reads_as_a_sentence() -> None:
    assert "transformers streamed" in str(SMALLEST)


#: The weights with `Fp8Linear`: the blocks, nearly all of a transformer, take one byte a number.
IN_8_BITS = Weights(
    text_encoders=REAL.text_encoders,
    transformers=[size // 2 for size in REAL.transformers],
    vae=REAL.vae,
    block=REAL.block // 2,
)


def test_with_8_bit_weights_transformers_stay_on_a_gpu_that_would_stream_them() -> None:
    free, cells = 48 * GB, [workload("1080p", 5)]
    assert budget(free, REAL, cells).plan.transformers == "streamed"
    assert budget(free, IN_8_BITS, cells).plan.transformers == "resident"
