"""Limits and error codes of a job's input, over REST and over RunPod's API."""

import json
import math
from typing import Any

import pytest

from contract.errors import ErrorCode, JobFailure
from contract.job import (
    DEFAULT_MODEL,
    KNOWN_MODELS,
    AspectRatio,
    InvalidInputError,
    JobInput,
    Resolution,
    num_frames,
    parse_input,
    parse_request,
)
from contract.lora import Lora
from contract.offer import SamplingLimits, check_offered
from contract.result import Progress, Stage
from tests.support.queues import result

PROMPT = "A paper boat on a rainy street"


def refusal(raw: object) -> JobFailure:
    with pytest.raises(InvalidInputError) as caught:
        parse_input(raw)
    return caught.value.failure


def body(**fields: object) -> bytes:
    return json.dumps({"prompt": PROMPT, **fields}).encode()


def test_a_prompt_alone_gets_the_documented_defaults() -> None:
    job_input = parse_input(json.dumps({"prompt": PROMPT}).encode())
    assert job_input == JobInput(prompt=PROMPT, duration=10, resolution=Resolution.P1080, model=DEFAULT_MODEL)


def test_the_prompt_is_trimmed_before_it_is_counted_and_kept() -> None:
    assert parse_input(body(prompt=f" \n\t{'x' * 10}　 ")).prompt == "x" * 10
    assert refusal(body(prompt=f"{' ' * 20}{'x' * 9}{' ' * 20}")).error_code is ErrorCode.INVALID_PROMPT


@pytest.mark.parametrize("length", [10, 11, 499, 500])
@pytest.mark.parametrize("character", ["x", "é", "漢", "🦊"])
def test_prompts_of_10_to_500_characters_are_valid(length: int, character: str) -> None:
    assert len(parse_input(body(prompt=character * length)).prompt) == length


@pytest.mark.parametrize(
    "prompt", ["", "   ", "x" * 9, "x" * 501, "🦊" * 9, None, 12, ["a prompt in a list"], {}, True]
)
def test_any_other_prompt_is_invalid_prompt(prompt: object) -> None:
    failure = refusal(body(prompt=prompt))
    assert failure.error_code is ErrorCode.INVALID_PROMPT
    assert "10-500 characters" in failure.error


def test_a_missing_prompt_is_invalid_prompt() -> None:
    assert refusal(b"{}").error_code is ErrorCode.INVALID_PROMPT


def test_a_prompt_that_no_database_can_store_is_refused() -> None:
    assert refusal(body(prompt="a fox\0jumps over")).error_code is ErrorCode.INVALID_PROMPT
    assert refusal({"prompt": "half a surrogate pair \ud83e"}).error_code is ErrorCode.INVALID_PROMPT


@pytest.mark.parametrize("duration", [5, 6, 7, 8, 9, 10])
def test_durations_of_5_to_10_seconds_are_valid(duration: int) -> None:
    assert parse_input(body(duration=duration)).duration == duration


@pytest.mark.parametrize("duration", [4, 11, 0, -5, 10**30, "5", 5.0, 5.5, True, False, None, [5], {"s": 5}])
def test_any_other_duration_is_invalid_duration(duration: object) -> None:
    assert refusal(body(duration=duration)).error_code is ErrorCode.INVALID_DURATION
    assert refusal({"prompt": PROMPT, "duration": duration}).error_code is ErrorCode.INVALID_DURATION


@pytest.mark.parametrize("resolution", ["480p", "720P", "1080", "", 720, None, True, ["720p"]])
def test_any_other_resolution_is_invalid_resolution(resolution: object) -> None:
    failure = refusal(body(resolution=resolution))
    assert failure.error_code is ErrorCode.INVALID_RESOLUTION
    assert '"720p"' in failure.error
    assert '"1080p"' in failure.error


@pytest.mark.parametrize("model", ["HunyuanVideo", "hunyuanvideo-1.5", "", 1.5, None])
def test_an_unknown_model_is_refused_naming_the_known_ones(model: object) -> None:
    failure = refusal(body(model=model))
    assert failure.error_code is ErrorCode.INVALID_MODEL
    assert DEFAULT_MODEL in failure.error


def test_an_unknown_field_is_named() -> None:
    failure = refusal(body(fps=30))
    assert failure.error_code is ErrorCode.INVALID_REQUEST
    assert '"fps"' in failure.error


def test_a_webhook_is_part_of_a_request_and_of_no_input_that_a_worker_gets() -> None:
    raw = body(webhook_url="https://r\u00e4ceiver.example/x")
    asked = parse_request(raw)
    assert asked.webhook_url == "https://xn--rceiver-5wa.example/x", "any name resolver takes it"
    assert asked.job_input == parse_input(body())
    assert '"webhook_url"' in refusal(raw).error


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"text"', b"[" * 5000, None, 5, []])
def test_a_body_that_is_no_json_object_is_invalid_request(raw: object) -> None:
    assert refusal(raw).error_code is ErrorCode.INVALID_REQUEST


def test_a_long_wrong_value_is_cut_in_the_error() -> None:
    assert len(refusal(body(resolution="x" * 10_000)).error) < 200


@pytest.mark.parametrize("field", JobInput.model_fields)
def test_a_wrong_value_of_any_field_is_refused_naming_the_field(field: str) -> None:
    assert refusal({"prompt": PROMPT, field: object()}).error.startswith(f"{field} must be ")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, None),
        ({"guidance_scale": 1.0, "num_inference_steps": 50}, None),
        ({"guidance_scale": 1, "negative_prompt": "blurry"}, None),
        ({"guidance_scale": 6.0}, "guidance_scale must be 1 "),
        ({"num_inference_steps": 20}, "num_inference_steps must be 50 "),
        ({"guidance_scale": 6.0, "image": "https://host/x.png"}, None),
        ({"guidance_scale": 6.0, "model": "HunyuanVideo-1.5-quality"}, None),
    ],
)
def test_a_distilled_checkpoint_limits_what_a_request_for_its_model_may_change(
    fields: dict[str, Any], word: str | None
) -> None:
    limit = SamplingLimits(model=DEFAULT_MODEL, from_image=False, guidance_scale=1.0, num_inference_steps=50)
    job_input = JobInput(prompt=PROMPT, **fields)
    if word is None:
        check_offered(job_input, KNOWN_MODELS, takes_images=True, limits=[limit])
        return
    with pytest.raises(InvalidInputError) as caught:
        check_offered(job_input, KNOWN_MODELS, takes_images=True, limits=[limit])
    failure = caught.value.failure
    assert failure.error_code is ErrorCode.INVALID_REQUEST
    assert failure.error.startswith(word)
    assert f'"{DEFAULT_MODEL}"' in failure.error


def test_adapters_have_a_strength_of_1_unless_told_otherwise_and_older_workers_see_no_field_without_them() -> None:
    asked = parse_input(body(loras=[{"name": "film"}, {"name": "Anime v1.2 (new)", "scale": -2}]))
    assert asked.loras == (Lora(name="film", scale=1.0), Lora(name="Anime v1.2 (new)", scale=-2.0))
    assert asked.wire()["loras"] == [{"name": "film", "scale": 1.0}, {"name": "Anime v1.2 (new)", "scale": -2.0}]
    assert "loras" not in parse_input(body(loras=[])).wire()
    assert Lora.parse("film:0.5") == Lora(name="film", scale=0.5)


NAMES = ["", "../film", "a/b", "a\\b", "/etc/film", ".hidden", "..", "a:b", "a\0", "a\n", "é", "x" * 101, 1, None]
SCALES: list[object] = [4.1, -4.1, "1", None, True, []]


@pytest.mark.parametrize(
    "loras",
    [
        *([{"name": name}] for name in NAMES),
        *([{"name": "film", "scale": scale}] for scale in SCALES),
        [{"name": "film", "weight": 1}],
        [{"scale": 1}],
        ["film"],
        "film",
        {"name": "film"},
        [{"name": "film"}, {"name": "film", "scale": 0.5}],
        [{"name": f"film{number}"} for number in range(5)],
    ],
)
def test_a_wrong_list_of_adapters_is_refused_saying_what_it_takes(loras: object) -> None:
    failure = refusal(body(loras=loras))
    assert failure.error_code is ErrorCode.INVALID_REQUEST
    assert failure.error.startswith('loras must be a list of at most 4 objects like {"name": "NAME", "scale": 1.0}')
    assert "; got " in failure.error


def test_an_adapter_that_no_worker_has_is_refused_saying_which_exist() -> None:
    job_input = JobInput(prompt=PROMPT, loras=(Lora(name="film"),))
    check_offered(job_input, KNOWN_MODELS, takes_images=True)
    check_offered(job_input, KNOWN_MODELS, takes_images=True, loras=["anime", "film"])
    for known, says in (
        (["noir", "anime"], 'the workers have "anime", "noir"'),
        ([], "the workers have none (HUNYUAN_LORA_DIR)"),
        ([f"a{number:03}" for number in range(100)], '"a019" and 80 more'),
    ):
        with pytest.raises(InvalidInputError) as caught:
            check_offered(job_input, KNOWN_MODELS, takes_images=True, loras=known)
        assert caught.value.failure.error_code is ErrorCode.INVALID_REQUEST
        assert caught.value.failure.error.startswith('loras: there is no adapter "film"; the workers have ')
        assert caught.value.failure.error.endswith(says)


@pytest.mark.parametrize("resolution", Resolution)
def test_every_resolution_has_even_sizes_for_every_aspect_ratio(resolution: Resolution) -> None:
    for aspect_ratio in AspectRatio:
        width, height = JobInput(prompt=PROMPT, resolution=resolution, aspect_ratio=aspect_ratio).size
        ratio = [int(side) for side in aspect_ratio.split(":")]
        assert width * ratio[1] == height * ratio[0]
        assert width % 4 == height % 4 == 0, "yuv420p needs even sides"


def test_there_are_24_frames_a_second_and_one() -> None:
    assert [num_frames(duration) for duration in range(5, 11)] == [121, 145, 169, 193, 217, 241]


def test_progress_is_never_100() -> None:
    with pytest.raises(ValueError, match="less than or equal to 99"):
        Progress(progress=100, stage=Stage.STORING)


def test_a_failure_is_read_back_unchanged() -> None:
    failure = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)
    assert JobFailure.from_wire(failure.model_dump_json()) == failure


@pytest.mark.parametrize(
    "text", [None, "", "Traceback (most recent call last): ...", '{"error_type": "ValueError"}', "[1]"]
)
def test_an_error_text_of_another_origin_shows_a_client_no_traceback(text: str | None) -> None:
    failure = JobFailure.from_wire(text)
    assert failure.error_code is ErrorCode.GENERATION_FAILED
    assert "Traceback" not in failure.error


def test_a_result_contains_only_numbers_that_json_can_express() -> None:
    """The SDK would send NaN, which is no JSON."""
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            result("task", seconds=number)
