"""`hunyuan deploy` against a stand-in of RunPod's management API on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from typer.testing import CliRunner

from contract.job import Profile
from contract.render_times import longest_timeout
from hunyuan.cli.main import app
from hunyuan.deploy.pools import DEFAULT_POOLS, POOLS
from tests.support.http_server import serving
from tests.support.runpod_account import KEY, Account, Fault

SECRET = "a-secret-nobody-may-read"
BUCKET = {
    "BUCKET_ENDPOINT_URL": "https://s3.example.com",
    "BUCKET_ACCESS_KEY_ID": "an-id",
    "BUCKET_SECRET_ACCESS_KEY": SECRET,
}
IMAGE = "registry.example.com/hunyuan-worker:1.5.0"
UP = ("runpod", "--image", IMAGE)
#: Settings that the machine of the tests may have.
OURS = [name for name in os.environ if name.startswith(("BUCKET_", "RUNPOD_", "HUNYUAN_", "HF_"))]


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@dataclass
class Bench:
    account: Account
    address: str

    def environment(self, **environment: str) -> dict[str, str]:
        return {
            "RUNPOD_API_KEY": KEY,
            "RUNPOD_API_URL": f"{self.address}/manage",
            "RUNPOD_ENDPOINT_BASE_URL": f"{self.address}/endpoints",
            **BUCKET,
            **environment,
        }

    async def deploy(self, *arguments: str, answer: str = "", **environment: str) -> Run:
        """The command in a thread of this process, which starts in no time."""
        run = await asyncio.to_thread(
            CliRunner().invoke,
            app,
            ["deploy", *arguments],
            input=answer,
            env={**dict.fromkeys(OURS), **self.environment(**environment)},
        )
        assert run.exception is None or isinstance(run.exception, SystemExit), run.exception
        return checked(Run(run.exit_code, run.stdout, run.stderr))

    async def deploy_in_a_process(self, *arguments: str, **environment: str) -> Run:
        """The command as its users start it."""
        clean = {name: value for name, value in os.environ.items() if name not in OURS}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hunyuan", "deploy", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**clean, **self.environment(**environment)},
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        return checked(Run(process.returncode, out.decode(), err.decode()))


def checked(run: Run) -> Run:
    """No run prints a secret or a traceback."""
    for secret in (KEY, SECRET):
        assert secret not in run.out + run.err
    assert "Traceback" not in run.err
    return run


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    account = Account()
    async with serving(account.app()) as address:
        yield Bench(account, address)


async def test_the_first_run_creates_template_and_endpoint_with_what_video_needs(bench: Bench) -> None:
    run = await bench.deploy_in_a_process(
        *UP, HUNYUAN_OFFLOAD_CPU="true", HUNYUAN_PORT="9000", HUNYUAN_SERVER="http://elsewhere"
    )
    assert run.code == 0, run.err
    assert bench.account.writes() == ["POST /templates", "POST /serverless"]
    template, endpoint = bench.account.template, bench.account.endpoint
    assert template["serverless"] is True
    assert template["public"] is False
    assert endpoint["env"] == {
        **BUCKET,
        "HUNYUAN_OFFLOAD_CPU": "true",
        "HUNYUAN_PROFILE": "turbo",
        "RUNPOD_INIT_TIMEOUT": "1800",
    }
    assert (endpoint["image"], endpoint["disk"]) == (IMAGE, 100)
    assert endpoint["type"] == "QUEUE"
    assert endpoint["timeout"] == 1000 * longest_timeout(Profile.QUALITY, POOLS["AMPERE_80"].slowdown), (
        "without HUNYUAN_MODEL_PATH the worker has one checkpoint, which takes 50 steps with guidance"
    )
    assert endpoint["flashboot"] == "FLASHBOOT"
    assert endpoint["gpu"]["pools"] == list(DEFAULT_POOLS)
    assert endpoint["workers"] == {"min": 0, "max": 3, "idleTimeout": 60}
    assert run.out == f"endpoint_id: {endpoint['id']}\n"


async def test_the_same_again_changes_nothing(bench: Bench) -> None:
    first = await bench.deploy(*UP)
    bench.account.writes()
    again = await bench.deploy(*UP)
    assert again.code == 0, again.err
    assert bench.account.writes() == []
    assert "template hunyuan-video: no change" in again.err
    assert again.out == first.out


async def test_only_the_fields_that_differ_are_updated(bench: Bench) -> None:
    await bench.deploy(*UP)
    del bench.account.endpoint["type"]  # RunPod may omit it
    bench.account.endpoint["workers"]["max"] = 0  # as RunPod does after seven days without a request
    bench.account.requests.clear()
    run = await bench.deploy(*UP[:-1], "registry.example.com/hunyuan-worker:1.6.0", "--network-volume", "vol1")
    assert run.code == 0, run.err
    written = {line.rpartition("/")[0]: body for line, body in bench.account.requests if not line.startswith("GET")}
    assert written["PATCH /templates"].keys() == {"image"}
    assert written["PATCH /serverless"].keys() == {"templateId", "workers", "networkVolumes"}
    endpoint = bench.account.endpoint
    assert endpoint["image"].endswith(":1.6.0")
    assert endpoint["workers"]["max"] == 3
    assert endpoint["networkVolumes"] == ["vol1"]
    assert '  networkVolumes: [] -> ["vol1"]' in run.err


async def test_what_others_have_set_stays_until_it_is_removed(bench: Bench) -> None:
    """RunPod's console changes the endpoint alone."""
    await bench.deploy(*UP, HUNYUAN_ENABLE_SAGE_ATTN="true")
    in_console = {"SET_IN_THE_CONSOLE": "yes", "RUNPOD_INIT_TIMEOUT": "3600", "HUNYUAN_PROFILE": "fast"}
    bench.account.endpoint["env"] |= {**in_console, "HUNYUAN_LOG_LEVEL": "DEBUG"}
    run = await bench.deploy(*UP, "--env", "HUNYUAN_LOG_LEVEL=INFO", "--env", "HUNYUAN_ENABLE_SAGE_ATTN=")
    assert run.code == 0, run.err
    for resource in (bench.account.template, bench.account.endpoint):
        assert resource["env"] == {**BUCKET, **in_console, "HUNYUAN_LOG_LEVEL": "INFO"}
    assert "  env: -HUNYUAN_ENABLE_SAGE_ATTN ~HUNYUAN_LOG_LEVEL" in run.err
    again = await bench.deploy(*UP, **dict.fromkeys(BUCKET, ""))
    assert again.code == 0, "the endpoint has the bucket's settings"
    assert "no BUCKET_* is set" not in again.err
    bench.account.endpoint["env"]["HUNYUAN_PROFILE"] = "best"
    assert "HUNYUAN_PROFILE: the endpoint has 'best'; pass --profile" in (await bench.deploy(*UP)).err


async def test_variables_of_the_hub_and_of_runpod_are_passed_on_without_paths_of_this_machine(bench: Bench) -> None:
    passed = {"HF_TOKEN": "hf_a-token-of-the-hub", "HF_HUB_OFFLINE": "1", "RUNPOD_INIT_TIMEOUT": "900"}
    run = await bench.deploy(*UP, "--env", "ANYTHING=a=b", **passed, HF_HOME="/home/me", HF_HUB_CACHE="/home/me/hub")
    assert run.code == 0, run.err
    own = {"ANYTHING": "a=b", "HUNYUAN_PROFILE": "turbo"}
    assert bench.account.endpoint["env"] == {**BUCKET, **passed, **own}
    assert "contain HF_TOKEN in clear text" in run.err
    assert passed["HF_TOKEN"] not in run.err
    bench.account.faults = [Fault("PATCH", 400, detail=f"odd: {passed['HF_TOKEN']}")]
    run = await bench.deploy(*UP, "--env", "ANYTHING=c")
    assert "RunPod answered 400: odd: …" in run.err, "also a value that the endpoint had before"


@pytest.mark.parametrize("profile", Profile)
async def test_profile_and_slowest_pool_decide_how_long_a_job_may_run(bench: Bench, profile: Profile) -> None:
    weights = {"HUNYUAN_MODEL_PATH": "/runpod-volume/models"}
    assert (await bench.deploy(*UP, HUNYUAN_PROFILE="quality", **weights)).code == 0
    assert (await bench.deploy(*UP, "--profile", profile, HUNYUAN_PROFILE="fast")).code == 0
    endpoint = bench.account.endpoint
    assert endpoint["timeout"] == 1000 * longest_timeout(profile, POOLS["AMPERE_80"].slowdown)
    assert endpoint["env"]["HUNYUAN_PROFILE"] == profile
    run = await bench.deploy(*UP, "--profile", profile, "--gpu", "ADA_24", "--gpu", "HOPPER_141")
    assert endpoint["timeout"] < bench.account.endpoint["timeout"] or profile is Profile.TURBO
    assert "warning: workers in ADA_24 can count on 41 GB of host memory only" in run.err
    assert "HOPPER_141 can" not in run.err


async def test_options_override_the_profile(bench: Bench) -> None:
    options = ("--gpu", "HOPPER_141", "--gpu", "AMPERE_80", "--execution-timeout", "600", "--min-cuda", "12.8")
    assert (await bench.deploy(*UP, *options, "--name", "another")).code == 0
    endpoint = bench.account.endpoint
    assert endpoint["name"] == "another"
    assert endpoint["gpu"]["pools"] == ["HOPPER_141", "AMPERE_80"]
    assert endpoint["gpu"]["minCudaVersion"] == "12.8"
    assert endpoint["timeout"] == 600_000


async def test_a_worker_has_the_gpus_that_share_a_video(bench: Bench) -> None:
    assert (await bench.deploy(*UP)).code == 0
    assert bench.account.endpoint["gpu"]["count"] == 1
    assert (await bench.deploy(*UP, "--env", "HUNYUAN_GPUS_PER_JOB=4")).code == 0
    assert bench.account.endpoint["gpu"]["count"] == 4
    assert bench.account.endpoint["env"]["HUNYUAN_GPUS_PER_JOB"] == "4"


async def test_a_dry_run_prints_the_changes_and_makes_none(bench: Bench) -> None:
    run = await bench.deploy(*UP, "--dry-run")
    assert run.code == 0
    assert "endpoint hunyuan-video: create" in run.err
    assert "+BUCKET_SECRET_ACCESS_KEY" in run.err
    assert bench.account.writes() == []
    assert run.out == ""


async def test_a_secret_stored_at_runpod_is_sent_as_a_placeholder(bench: Bench) -> None:
    run = await bench.deploy(*UP, "--secret", "BUCKET_SECRET_ACCESS_KEY=s3-key", BUCKET_SECRET_ACCESS_KEY="")
    assert run.code == 0, run.err
    assert bench.account.endpoint["env"]["BUCKET_SECRET_ACCESS_KEY"] == "{{ RUNPOD_SECRET_s3-key }}"
    assert "warning" not in run.err
    assert "in clear text" in (await bench.deploy(*UP)).err


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (UP, {"RUNPOD_API_KEY": ""}, "RUNPOD_API_KEY: Field required"),
        (UP, {"BUCKET_SECRET_ACCESS_KEY": ""}, "BUCKET_SECRET_ACCESS_KEY: Field required"),
        (UP, {"HUNYUAN_PROFILE": "best"}, "HUNYUAN_PROFILE: "),
        (UP, {"HUNYUAN_GPUS_PER_JOB": "3"}, "HUNYUAN_GPUS_PER_JOB takes 1, 2, 4 or 8"),
        ((*UP, "--secret", f"KEY={SECRET}!"), {}, "--secret takes VARIABLE=SECRET"),
        ((*UP, "--env", SECRET), {}, "--env takes VARIABLE=VALUE"),
        ((*UP, "--env", "HUNYUAN_PROFILE=fast"), {}, "--env HUNYUAN_PROFILE: pass --profile"),
        (UP, {"RUNPOD_API_KEY": "rpa_a-wrong-key"}, "RUNPOD_API_KEY was refused. RunPod answered 401"),
    ],
)
async def test_a_setting_that_is_missing_or_wrong_is_named(
    bench: Bench, arguments: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    run = await bench.deploy(*arguments, **environment)
    assert run.code == 2
    assert run.err.startswith(f"error: {said}")
    assert bench.account.writes() == []


async def test_a_deployment_without_a_bucket_is_warned_about(bench: Bench) -> None:
    run = await bench.deploy(*UP, **dict.fromkeys(BUCKET, ""))
    assert run.code == 0
    assert "warning: no BUCKET_* is set" in run.err


async def test_a_validation_error_of_runpod_is_shown_and_the_next_run_continues(bench: Bench) -> None:
    run = await bench.deploy(*UP, "--min-cuda", "newest")
    assert run.code == 1
    assert "RunPod answered 422: Request validation failed.: $.gpu.minCudaVersion: 'newest'" in run.err
    assert bench.account.writes() == ["POST /templates", "POST /serverless"]
    assert (await bench.deploy(*UP)).code == 0
    assert bench.account.writes() == ["POST /serverless"]


async def test_a_secret_in_an_error_of_runpod_is_removed(bench: Bench) -> None:
    bench.account.faults = [Fault("POST", 400, detail=f"env is odd: {SECRET}")]
    run = await bench.deploy(*UP)
    assert run.code == 1
    assert "RunPod answered 400: env is odd: …" in run.err


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", 429, {"Retry-After": "0"}),
        Fault("GET", 503),
        Fault("POST", 502, {"Retry-After": "0"}),
        Fault("POST", 504, {"Retry-After": "0"}, late=True),
    ],
    ids=lambda fault: f"{fault.method}-{fault.status}",
)
async def test_a_temporary_failure_is_retried_and_nothing_is_created_twice(bench: Bench, fault: Fault) -> None:
    bench.account.faults = [fault]
    run = await bench.deploy(*UP)
    assert run.code == 0, run.err
    assert bench.account.faults == []
    assert bench.account.endpoint["image"] == bench.account.template["image"] == IMAGE


async def test_a_lasting_failure_exits_as_busy(bench: Bench) -> None:
    bench.account.faults = [Fault("GET", 429, {"Retry-After": "0"}) for _ in range(4)]
    run = await bench.deploy(*UP)
    assert run.code == 5
    assert "RunPod answered 429: later" in run.err
    assert bench.account.faults == []


async def test_an_unreachable_api_exits_as_unreachable(bench: Bench) -> None:
    run = await bench.deploy_in_a_process("status", RUNPOD_API_URL="http://127.0.0.1:9")
    assert run.code == 3
    assert run.err.startswith("error: no answer from 127.0.0.1")


async def test_an_answer_that_is_no_json_object_is_an_error(bench: Bench) -> None:
    run = await bench.deploy("status", RUNPOD_API_URL=f"{bench.address}/docs#")
    assert run.code == 1
    assert "no JSON object" in run.err


async def test_two_endpoints_of_one_name_are_not_changed(bench: Bench) -> None:
    for resource_id in ("a", "b"):
        bench.account.resources["serverless"][resource_id] = {"id": resource_id, "name": "hunyuan-video"}
    for command in (UP, ("destroy", "--yes")):
        run = await bench.deploy(*command)
        assert run.code == 1
        assert "2 endpoints named hunyuan-video (a, b)" in run.err
        assert bench.account.writes() == []


async def test_an_endpoint_without_a_queue_is_not_changed(bench: Bench) -> None:
    bench.account.resources["serverless"]["a"] = {"id": "a", "name": "hunyuan-video", "type": "LOAD_BALANCER"}
    run = await bench.deploy(*UP)
    assert run.code == 1
    assert "LOAD_BALANCER" in run.err
    assert bench.account.writes() == []


async def test_status_shows_workers_and_jobs(bench: Bench) -> None:
    assert (await bench.deploy("status")).code == 4
    await bench.deploy(*UP)
    run = await bench.deploy("status", "--json")
    assert run.code == 0, run.err
    status: dict[str, Any] = json.loads(run.out)
    assert status == {
        "endpoint_id": bench.account.endpoint["id"],
        "name": "hunyuan-video",
        "image": IMAGE,
        "gpu": "ADA_80_PRO, HOPPER_141, AMPERE_80",
        "limits": {"min": 0, "max": 3, "idleTimeout": 60},
        "workers": {"idle": 0, "running": 1},
        "jobs": {"completed": 3, "failed": 0, "inProgress": 1, "inQueue": 2, "retried": 0},
    }


async def test_destroy_asks_for_confirmation_and_deletes_only_the_named_resources(bench: Bench) -> None:
    await bench.deploy(*UP)
    await bench.deploy(*UP, "--name", "another")
    bench.account.writes()
    refused = await bench.deploy("destroy", answer="n\n")
    assert refused.code == 1
    assert bench.account.writes() == []
    bench.account.faults = [Fault("DELETE", 500, {"Retry-After": "0"}, late=True)]
    done = await bench.deploy("destroy", answer="y\n")
    assert done.code == 0, done.err
    assert bench.account.template["name"] == bench.account.endpoint["name"] == "another"
    again = await bench.deploy("destroy", "--yes")
    assert (again.code, again.out) == (0, "there is nothing named hunyuan-video\n")
