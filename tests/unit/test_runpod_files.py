"""The files that RunPod's Hub reads and the sizes of a deployment, against documented shapes and our own settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import SecretStr

from contract.job import DEFAULT_MODEL, MAX_DURATION, MIN_DURATION, Profile, Resolution, parse_input
from contract.render_times import SLOWEST, calculated_seconds
from contract.render_times import execution_timeout as timeout_of_job
from handler.settings import WorkerSettings
from handler.video_model.catalog import CHECKPOINTS, IMAGE_BASES, ROUTES, Route, image_routes
from handler.video_model.cost import GPUS, Speed, render_seconds
from handler.video_model.dimensions import HALF, TRANSFORMER
from handler.video_model.memory import DoesNotFitError, Placement, budget
from handler.video_model.planning import kind_of_video, published_weights
from handler.video_model.workload import kind_of_job, workload
from hunyuan.deploy.deployment import DEFAULT_VARIABLES, IncompleteError, worker_variables
from hunyuan.deploy.pools import DEFAULT_POOLS, OTHER_POOLS, POOLS, execution_timeout, pool_warnings
from hunyuan.settings import deployed_environment
from storage.settings import BucketSettings

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "infra" / "runpod"
HUB = json.loads((ROOT / ".runpod" / "hub.json").read_text())
TESTS = json.loads((ROOT / ".runpod" / "tests.json").read_text())
VARIABLES = {
    str(field.validation_alias)
    for settings in (WorkerSettings, BucketSettings)
    for field in settings.model_fields.values()
}


#: The slowest GPU of each pool that `handler.video_model.cost` knows.
SLOWEST_GPU = {
    "ADA_24": "RTX4090",
    "ADA_48_PRO": "L40",
    "AMPERE_80": "A100",
    "ADA_80_PRO": "H100",
    "HOPPER_141": "H200",
}
DURATIONS = range(MIN_DURATION, MAX_DURATION + 1)
#: Bytes a second of a download, and of a read from a network volume: slow days of both.
DOWNLOAD, READ = 25e6, 100e6
#: Seconds after which RunPod gives up a worker that loads, unless RUNPOD_INIT_TIMEOUT says more.
GIVEN_UP = 420

Kind = tuple[Resolution, int]


@lru_cache
def seconds_in(pool: str, profile: Profile) -> Mapping[Kind, float]:
    """Seconds of each kind of video, by the plan that a worker makes in this pool for all of them.

    Raises:
        DoesNotFitError: the worker would not start.
    """
    videos = {kind: kind_of_video(profile, *kind, from_image=False) for kind in product(Resolution, DURATIONS)}
    memory, host = int(POOLS[pool].memory * 1e9), int(POOLS[pool].host * 1e9)
    made = budget(memory, published_weights(profile, images=False), videos.values(), host=host)
    for video in videos.values():
        made.check(video)
    speed, streamed = Speed.of(GPUS[SLOWEST_GPU[pool]]), made.plan.transformers is Placement.STREAMED
    return {
        kind: sum(render_seconds(video, speed, streamed=streamed, tile=made.plan.tile).values())
        for kind, video in videos.items()
    }


def seconds_of(route: Route, resolution: Resolution, duration: int, gpu: str, *, from_image: bool = False) -> float:
    video = workload(kind_of_job(resolution, duration, from_image=from_image), route, CHECKPOINTS)
    return sum(render_seconds(video, Speed.of(GPUS[gpu])).values())


def validator(name: str) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / name).read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize(("content", "schema"), [(HUB, "hub.schema.json"), (TESTS, "tests.schema.json")])
def test_the_hubs_files_have_their_documented_shape(content: Any, schema: str) -> None:
    validator(schema).validate(content)


def test_an_undocumented_field_is_not_let_through() -> None:
    assert not validator("hub.schema.json").is_valid({**HUB, "colour": "blue"})
    assert not validator("hub.schema.json").is_valid({**HUB, "config": {**HUB["config"], "gpu": "4090"}})
    assert not validator("tests.schema.json").is_valid({**TESTS, "config": {}})


def test_every_variable_that_the_hub_offers_is_a_setting_and_takes_its_values() -> None:
    config = HUB["config"]
    inputs = {variable["key"]: variable.get("input", {}) for variable in config["env"]}
    assert inputs.keys() <= VARIABLES
    assert {field.validation_alias for field in BucketSettings.model_fields.values() if field.is_required()} == {
        key for key, wanted in inputs.items() if wanted.get("required")
    }
    assert [each["value"] for each in inputs["HUNYUAN_PROFILE"]["options"]] == [profile.value for profile in Profile]
    for preset in config["presets"]:
        assert preset["defaults"].keys() <= inputs.keys()


def test_the_hubs_tests_need_no_weights_and_ask_for_what_is_valid() -> None:
    env = {variable["key"]: variable["value"] for variable in TESTS["config"]["env"]}
    assert env.keys() <= VARIABLES
    assert env["HUNYUAN_MODEL_PATH"] == "demo"
    for case in TESTS["tests"]:
        parse_input(case["input"])


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("pool", POOLS)
def test_the_pools_of_a_profile_are_those_whose_gpu_and_host_hold_its_plan(pool: str, profile: Profile) -> None:
    try:
        fits = len(seconds_in(pool, profile)) > 0
    except DoesNotFitError:
        fits = False
    assert fits is (pool in (*DEFAULT_POOLS, *OTHER_POOLS[profile]))
    warned = list(pool_warnings(profile, [pool], "/runpod-volume/models"))
    assert len(warned) == (0 if fits else 1)


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("pool", POOLS)
def test_a_job_may_take_one_and_a_half_times_its_calculated_seconds(pool: str, profile: Profile) -> None:
    if pool not in (*DEFAULT_POOLS, *OTHER_POOLS[profile]):
        return
    endpoint = execution_timeout(profile, [pool], "/runpod-volume/models")
    for (resolution, duration), seconds in seconds_in(pool, profile).items():
        for job, served in (
            (kind_of_job(resolution, duration), profile),
            (kind_of_job(resolution, duration).model_copy(update={"model": profile.model}), None),
        ):
            of_job = timeout_of_job(job, served)
            assert 1.5 * seconds <= of_job <= max(1800, 16 * calculated_seconds(profile, job)), (resolution, duration)
            assert 1.5 * seconds <= endpoint
            assert timeout_of_job(job) >= of_job, "without a profile, the slowest one counts"


@pytest.mark.parametrize("pool", POOLS)
def test_no_pool_is_slower_than_stated(pool: str) -> None:
    gpu = SLOWEST_GPU[pool]
    for kind, route in ROUTES.items():
        times = seconds_of(route, kind[1], 10, gpu) / seconds_of(route, kind[1], 10, "H100")
        assert 0.9 * times <= POOLS[pool].slowdown <= SLOWEST
        assert times <= POOLS[pool].slowdown


@pytest.mark.parametrize("profile", Profile)
def test_the_table_of_seconds_is_the_cost_models(profile: Profile) -> None:
    for (resolution, duration), seconds in seconds_in("HOPPER_141", profile).items():
        stated = calculated_seconds(profile, kind_of_job(resolution, duration))
        assert seconds <= stated <= 1.125 * seconds
        if duration in (MIN_DURATION, MAX_DURATION):
            assert stated <= 1.02 * seconds, "the corners are not interpolated"


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("present", [tuple(IMAGE_BASES.values()), ("480p_i2v",)], ids=["own-base", "480p_i2v"])
def test_a_video_from_an_image_and_one_of_more_steps_have_more_time(profile: Profile, present: tuple[str, ...]) -> None:
    for resolution, duration in product(Resolution, DURATIONS):
        routes = image_routes({DEFAULT_MODEL: profile}, present)
        if routes:
            seconds = seconds_of(routes[DEFAULT_MODEL, resolution], resolution, duration, "RTX4090", from_image=True)
            assert timeout_of_job(kind_of_job(resolution, duration, from_image=True), profile) >= 1.5 * seconds
    long = kind_of_job(Resolution.P1080, 10).model_copy(update={"num_inference_steps": 100})
    assert timeout_of_job(long, profile) >= 1.5 * 2 * seconds_in("AMPERE_80", profile)[Resolution.P1080, 10]


@pytest.mark.parametrize("checkpoint", ["480p_t2v", "720p_t2v"])
def test_one_checkpoint_alone_has_the_time_that_it_needs(checkpoint: str) -> None:
    """The worker's default, and the Hub's presets: 50 steps with guidance, whatever HUNYUAN_PROFILE says."""
    for duration, pool in product(DURATIONS, DEFAULT_POOLS):
        seconds = seconds_of(Route(checkpoint), Resolution.P720, duration, SLOWEST_GPU[pool])
        assert timeout_of_job(kind_of_job(Resolution.P720, duration)) >= 1.5 * seconds
        for model_path in (None, f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{checkpoint}"):
            assert execution_timeout(Profile.TURBO, [pool], model_path) >= 1.5 * seconds


def cold_start(profile: Profile) -> tuple[float, float]:
    """Seconds to read a profile's weights from a network volume, and to download one checkpoint."""
    weights = published_weights(profile, images=True)
    one = weights.text_encoders.bytes + weights.vae_decoder.bytes + HALF * TRANSFORMER.parameters(65, meanflow=False)
    family = weights.text_encoders.bytes + weights.transformers.bytes + weights.vae_decoder.bytes
    return family / READ, one / DOWNLOAD


@pytest.mark.parametrize("profile", Profile)
def test_runpod_waits_for_a_load_of_seven_minutes_and_for_the_longest_one(profile: Profile) -> None:
    sent = {**DEFAULT_VARIABLES, **worker_variables({}, profile, [])}
    hub = {variable["key"]: variable.get("value") for variable in HUB["config"]["env"]}
    for environment in (sent, hub):
        waits = int(environment.get("RUNPOD_INIT_TIMEOUT") or GIVEN_UP)
        assert waits > 7 * 60
        assert GIVEN_UP < max(cold_start(profile)) < waits
    assert worker_variables({"RUNPOD_INIT_TIMEOUT": "900"}, profile, [])["RUNPOD_INIT_TIMEOUT"] == "900"


def test_the_hub_takes_the_same_pools() -> None:
    assert HUB["config"]["gpuIds"].split(",") == list(DEFAULT_POOLS)


def test_workers_get_what_is_theirs_and_nothing_that_is_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HUNYUAN_MODEL_PATH", "HUNYUAN_VRAM_LIMIT", "BUCKET_NAME", "HUNYUAN_PLATFORM_TOKEN", "RUNPOD_API_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("HUNYUAN_CACHE_DIR", "")
    given = deployed_environment()
    assert {"HUNYUAN_MODEL_PATH", "HUNYUAN_VRAM_LIMIT", "BUCKET_NAME"} <= given.keys() <= VARIABLES


def test_no_other_setting_of_a_worker_is_secret() -> None:
    """`Deployment.secrets` knows of one; the platform's key is not ours to set."""
    secret = {
        str(field.validation_alias)
        for settings in (WorkerSettings, BucketSettings)
        for field in settings.model_fields.values()
        if SecretStr in (field.annotation, *getattr(field.annotation, "__args__", ()))
    }
    assert secret == {"BUCKET_SECRET_ACCESS_KEY", "RUNPOD_AI_API_KEY"}


@pytest.mark.parametrize("reference", ["KEY", "key=name", "KEY=", "KEY=a b", "KEY=}}"])
def test_a_reference_that_is_none_is_refused(reference: str) -> None:
    with pytest.raises(IncompleteError, match="--secret"):
        worker_variables({}, Profile.FAST, [reference])


def rows(heading: str) -> list[list[str]]:
    """The table's cells under a heading of docs/deploy-runpod.md, without its head."""
    section = (ROOT / "docs" / "deploy-runpod.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_documented_limits_are_those_that_are_deployed() -> None:
    documented = {name: int(timeout.removesuffix(" s").replace(",", "")) for name, timeout in rows("3. Deploy")}
    assert documented == {
        profile.value: execution_timeout(profile, DEFAULT_POOLS, "/runpod-volume/models") for profile in Profile
    }


def test_the_documented_pools_are_those_of_the_code() -> None:
    documented = {
        pool.strip("`"): (int(gpu.removesuffix(" GB")), int(host.removesuffix(" GB")), profiles)
        for pool, _, gpu, host, profiles, _ in rows("GPU pools")
    }
    assert documented == {
        name: (
            pool.memory,
            pool.host,
            ", ".join(profile for profile in Profile if name in (*DEFAULT_POOLS, *OTHER_POOLS[profile])) or "none",
        )
        for name, pool in POOLS.items()
    }


def test_a_video_is_cheapest_in_the_default_pools() -> None:
    """By the price per second and the slowest GPU of the pool, among the pools that hold every profile."""
    prices = {pool.strip("`"): float(price) for pool, *_, price in rows("GPU pools")}
    of_video = {name: prices[name] * pool.slowdown for name, pool in POOLS.items()}
    able = [name for name in POOLS if all(name in (*DEFAULT_POOLS, *OTHER_POOLS[profile]) for profile in Profile)]
    assert tuple(sorted(able, key=of_video.__getitem__)) == DEFAULT_POOLS


def test_the_documented_costs_are_calculated_seconds_times_price() -> None:
    table = rows("What it costs")
    price = next(float(price) for pool, *_, price in rows("GPU pools") if pool.strip("`") == DEFAULT_POOLS[0])
    routes = {profile.value: {size: ROUTES[profile, size] for size in Resolution} for profile in Profile}
    routes["480p_t2v alone"] = dict.fromkeys(Resolution, Route("480p_t2v"))
    seen = set()
    for name, video, seconds, cost in table:
        resolution, duration = video.removesuffix(" s").split(", ")
        size = Resolution(resolution)
        calculated = seconds_of(routes[name][size], size, int(duration), "H100")
        assert seconds == f"{calculated:,.0f}"
        assert cost == f"{calculated * price:.2f}"
        seen.add((name, resolution, duration))
    assert len(seen) == len(table) == len(routes) * len(Resolution) * 2
