"""The files that RunPod's Hub reads and the sizes of a deployment, against documented shapes and our own settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import SecretStr

from contract.job import MAX_DURATION, Profile, Resolution, parse_input
from handler.settings import WorkerSettings
from handler.video_model import planning
from handler.video_model.cost import GPUS
from hunyuan.deploy.deployment import SIZES, IncompleteError, worker_variables
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
POOLS = {"ADA_24": "RTX4090", "ADA_48_PRO": "L40S", "AMPERE_80": "A100", "ADA_80_PRO": "H100", "HOPPER_141": "H200"}


def seconds_on(gpu: str, profile: Profile, resolution: Resolution, duration: int) -> float:
    kind = (profile, resolution, duration)
    return next(row.seconds for row in planning.rows(GPUS[gpu]) if (row.profile, row.resolution, row.duration) == kind)


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
def test_the_execution_timeout_leaves_room_for_the_longest_video(profile: Profile) -> None:
    sizing = SIZES[profile]
    assert 1 <= len(sizing.pools) <= 3
    for pool in sizing.pools:
        assert sizing.execution_timeout >= 2 * seconds_on(POOLS[pool], profile, Resolution.P1080, MAX_DURATION)


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


def test_the_documented_sizes_are_those_that_are_deployed() -> None:
    documented = {
        name: (tuple(re.findall(r"`(\w+)`", pools)), int(timeout.removesuffix(" s")))
        for name, pools, timeout in rows("3. Deploy")
    }
    assert documented == {
        profile.value: (SIZES[profile].pools, SIZES[profile].execution_timeout) for profile in Profile
    }


def test_the_documented_costs_are_calculated_seconds_times_price() -> None:
    table = rows("What it costs")
    assert len(table) == len(Profile) * len(Resolution) * 2
    for name, _, price, video, seconds, cost in table:
        resolution, duration = video.removesuffix(" s").split(", ")
        profile = Profile(name)
        gpu = POOLS[SIZES[profile].pools[0]]
        calculated = seconds_on(gpu, profile, Resolution(resolution), int(duration))
        assert seconds == f"{calculated:,.0f}"
        assert cost == f"{calculated * float(price):.2f}"
