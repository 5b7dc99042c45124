"""compose.yaml by its specification's schema, and every name in it held against what exists."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from shim.settings import ShimSettings
from tests.infra.offered import (
    COMPOSE,
    ENV_EXAMPLE,
    OUR_PREFIXES,
    ROOT,
    SCRIPTS,
    SETTINGS,
    STAGES,
    VERSION,
    check_command,
)

TEXT = COMPOSE.read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]

EACH = pytest.mark.parametrize("name", SERVICES)


def environment(name: str) -> dict[str, str | None]:
    given: dict[str, str | None] = SERVICES[name].get("environment", {})
    return given


def examples() -> dict[str, str]:
    """What .env.example names, with that which is commented out."""
    return dict(re.findall(r"^#?([A-Z_]+)=(.*)$", ENV_EXAMPLE.read_text(), re.M))


def test_it_is_what_the_compose_specification_admits() -> None:
    command = [str(SCRIPTS / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@EACH
def test_images_are_built_here_or_have_an_exact_tag(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert service["build"]["target"] in STAGES
        assert (COMPOSE.parent / service["build"]["context"]).resolve() == ROOT
    else:
        assert service["image"].startswith("docker.io/"), "podman searches no registry for a short name"
        assert re.search(r":(\d+\.\d+-\w+$|RELEASE\.\d{4}-\d\d-\d\dT[\d-]+Z@sha256:[0-9a-f]{64}$)", service["image"])


@EACH
def test_settings_and_commands_exist(name: str) -> None:
    assert {variable for variable in environment(name) if variable.startswith(OUR_PREFIXES)} <= SETTINGS
    check_command(SERVICES[name].get("command", []))


def test_podman_knows_the_servers_health_check() -> None:
    """Podman ignores the HEALTHCHECK of an OCI image, so compose.yaml says it again."""
    checks = [str(STAGES["shim"].last("HEALTHCHECK").argument), str(SERVICES["shim"]["healthcheck"])]
    for check in checks:
        assert "/health" in check
        assert "8000" in check
    interval, timeout, start = (SERVICES["shim"]["healthcheck"][key] for key in ("interval", "timeout", "start_period"))
    assert f"--interval={interval} --timeout={timeout} --start-period={start} --retries=3" in checks[0]


def test_the_root_key_of_minio_is_in_no_presigned_url() -> None:
    """A presigned URL names its access key. Only MinIO and the service that creates the other key know the root's."""
    holders = {name for name, service in SERVICES.items() if "MINIO_ROOT_USER" in str(service.get("environment"))}
    assert holders == {"minio", "bucket"}
    policy = json.loads(environment("bucket")["POLICY"] or "")
    assert {statement["Resource"].removesuffix("/*") for statement in policy["Statement"]} == {
        f"arn:aws:s3:::{environment('shim')['BUCKET_NAME']}"
    }
    assert not [action for statement in policy["Statement"] for action in statement["Action"] if "*" in action]


@pytest.mark.parametrize("attached", [True, False])
def test_the_bucket_and_its_key_are_created_at_the_first_start_and_kept_at_the_next(
    attached: bool, tmp_path: Path
) -> None:
    """The script of the service, with a stand-in for mc that refuses to attach a policy twice, as mc does."""
    words = tmp_path / "words"
    script = f"""#!/bin/sh
echo "$@" >> {words}
[ "$3" = info ] && {"echo PolicyName: hunyuan-videos" if attached else "echo AccessKey"}
[ "$2 $3" = "policy attach" ] && {"exit 1" if attached else "exit 0"}
exit 0
"""
    (tmp_path / "mc").write_text(script)
    (tmp_path / "mc").chmod(0o755)
    service = SERVICES["bucket"]
    command = service["command"][0].replace("$$", "$").replace("/tmp/policy.json", f"{tmp_path}/policy.json")
    described = {name: value for name, value in environment("bucket").items() if value is not None}
    given = {**described, "BUCKET_ACCESS_KEY_ID": "key", "BUCKET_SECRET_ACCESS_KEY": "secret"}
    given["PATH"] = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run([*service["entrypoint"], command], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "policy.json").read_text()) == json.loads(given["POLICY"])
    called = words.read_text().splitlines()
    assert "admin user add store key secret" in called
    assert ("admin policy attach store hunyuan-videos --user key" in called) is not attached


@EACH
def test_services_can_do_no_more_than_they_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service["restart"] == ("on-failure" if name == "bucket" else "unless-stopped")


@EACH
def test_what_is_waited_for_can_happen(name: str) -> None:
    for other, wait in SERVICES[name].get("depends_on", {}).items():
        awaited = SERVICES[other]
        assert "profiles" not in awaited, "it would not be there in each profile"
        if wait["condition"] == "service_healthy":
            target = awaited.get("build", {}).get("target")
            assert "healthcheck" in awaited or STAGES[target].all("HEALTHCHECK")
        else:
            assert wait["condition"] == "service_completed_successfully"
            assert awaited["restart"] == "on-failure", "one that is always started again never completes"


def test_only_the_server_and_the_videos_are_open_and_on_loopback_unless_asked() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    port = ShimSettings.model_fields["port"].default
    assert ports == {
        "minio": ["${BIND_ADDRESS:-127.0.0.1}:9000:9000"],
        "shim": [f"${{BIND_ADDRESS:-127.0.0.1}}:{port}:{port}"],
    }


@pytest.mark.parametrize("name", ["shim", "worker", "worker-gpu"])
def test_the_bucket_is_reached_inside_by_its_service_and_outside_by_its_port(name: str) -> None:
    given = environment(name)
    assert given["BUCKET_ENDPOINT_URL"] == "http://minio:9000"
    assert given["BUCKET_PUBLIC_ENDPOINT_URL"] == "${BUCKET_PUBLIC_ENDPOINT_URL:-http://localhost:9000}"
    assert examples()["BUCKET_PUBLIC_ENDPOINT_URL"] == "http://localhost:9000"
    assert f"mc mb --ignore-existing store/{given['BUCKET_NAME']}\n" in SERVICES["bucket"]["command"][0]
    assert set(SERVICES[name]["networks"]) & set(SERVICES["minio"]["networks"])


def test_one_worker_in_each_profile_and_the_rest_in_all() -> None:
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert {name: profile for name, profile in profiles.items() if profile} == {
        "worker": ["cpu"],
        "worker-gpu": ["gpu"],
    }
    assert examples()["COMPOSE_PROFILES"] in ("cpu", "gpu")
    assert environment("worker")["HUNYUAN_MODEL_PATH"] == "demo"
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
def test_workers_ask_the_server_by_its_service(name: str) -> None:
    assert environment(name)["HUNYUAN_PLATFORM_URL"] == "http://shim:8000"


def test_volumes_and_networks_are_declared_and_used() -> None:
    whole = yaml.safe_load(TEXT)
    mounted = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    joined = {network for service in SERVICES.values() for network in service["networks"]}
    assert (mounted, joined) == (set(whole["volumes"]), set(whole["networks"]))


def test_each_variable_stands_in_the_example_and_secrets_have_no_default() -> None:
    named = set(re.findall(r"\$\{(\w+)", TEXT))
    passed_on = {variable for name in SERVICES for variable, value in environment(name).items() if value is None}
    known = examples()
    assert named | passed_on == set(known) - {"COMPOSE_PROFILES"}
    required = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert {variable for variable, value in known.items() if not value} == required
    assert required == {
        "MINIO_ROOT_USER",
        "MINIO_ROOT_PASSWORD",
        "BUCKET_ACCESS_KEY_ID",
        "BUCKET_SECRET_ACCESS_KEY",
        "POSTGRES_PASSWORD",
        "HUNYUAN_PLATFORM_TOKEN",
    }


def test_images_of_ours_have_the_names_that_kubernetes_looks_for() -> None:
    base = yaml.safe_load((ROOT / "infra" / "kubernetes" / "base" / "kustomization.yaml").read_text())
    assert {image["name"] for image in base["images"]} == {
        service["image"] for service in SERVICES.values() if "build" in service
    }
    assert {image["newTag"] for image in base["images"]} == {VERSION}
