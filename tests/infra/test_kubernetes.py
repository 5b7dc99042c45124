"""The manifests by Kubernetes' schemas, and every name in them held against what exists."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateTable

from handler.video_model import planning
from handler.video_model.cost import GPUS
from shim.queue.job import JobState
from shim.queue.schema import jobs
from shim.settings import ShimSettings
from tests.infra.offered import COMPOSE, KUBERNETES, OUR_PREFIXES, ROOT, SCRIPTS, SETTINGS, VERSION, check_command

SCHEMA_OF_CUSTOM_RESOURCES = Path(__file__).with_name("custom_resources.schema.json")
CUSTOM_GROUPS = ("keda.sh/", "monitoring.coreos.com/")
OVERLAYS = ("cpu-demo", "gpu")
NAME = "app.kubernetes.io/name"

Resource = dict[str, Any]


def kustomizations() -> dict[Path, Resource]:
    return {path: yaml.safe_load(path.read_text()) for path in sorted(KUBERNETES.rglob("kustomization.yaml"))}


def patches() -> set[Path]:
    return {
        path.parent / patch["path"]
        for path, kustomization in kustomizations().items()
        for patch in kustomization.get("patches", [])
    }


def manifests() -> dict[str, Resource]:
    """Each whole resource of the files, by file, kind and name."""
    left_out = {*kustomizations(), *patches()}
    return {
        f"{path.relative_to(KUBERNETES)}:{resource['kind']}/{resource['metadata']['name']}": resource
        for path in sorted(KUBERNETES.rglob("*.yaml"))
        if path not in left_out
        for resource in yaml.safe_load_all(path.read_text())
    }


def rendered(overlay: str) -> list[Resource]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which has kustomize in it, is not installed")
    command = [kubectl, "kustomize", str(KUBERNETES / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def check_by_schema(resources: list[Resource], directory: Path) -> None:
    """Kubernetes' own kinds strictly, by its published schemas; custom ones by the fields that are documented."""
    kinds: dict[bool, list[Path]] = {False: [], True: []}
    for number, resource in enumerate(resources):
        path = directory / f"{number}-{resource['kind']}.json"
        path.write_text(json.dumps(resource))
        kinds[resource["apiVersion"].startswith(CUSTOM_GROUPS)].append(path)
    checks: dict[bool, list[str | Path]] = {
        False: [SCRIPTS / "kubernetes-validate", "--strict"],
        True: [SCRIPTS / "check-jsonschema", "--schemafile", SCHEMA_OF_CUSTOM_RESOURCES],
    }
    for custom, paths in kinds.items():
        if paths:
            done = subprocess.run([*checks[custom], *paths], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
            assert "WARN" not in done.stdout, "a kind that it has no schema for"


def pod_specs() -> dict[str, Resource]:
    return {
        name: resource["spec"]["template"]["spec"]
        for name, resource in manifests().items()
        if resource["kind"] in ("Deployment", "Job")
    }


def containers() -> dict[str, Resource]:
    return {
        f"{name}/{container['name']}": container
        for name, pod in pod_specs().items()
        for container in (*pod.get("initContainers", []), *pod["containers"])
    }


def of_kind(kind: str) -> dict[str, Resource]:
    return {name: resource for name, resource in manifests().items() if resource["kind"] == kind}


def referenced(container: Mapping[str, Any], kind: str) -> set[tuple[str, str | None]]:
    """Names, and keys where one is named, of the secrets or config maps that a container's environment comes from."""
    whole = {(source[f"{kind}Ref"]["name"], None) for source in container.get("envFrom", []) if f"{kind}Ref" in source}
    single = {
        (source["name"], source["key"])
        for variable in container.get("env", [])
        if (source := variable.get("valueFrom", {}).get(f"{kind}KeyRef"))
    }
    return whole | single


def generated_settings(kustomization: Path) -> dict[str, set[str]]:
    """The variables of each config map that it generates."""
    found: dict[str, set[str]] = {}
    for generator in yaml.safe_load(kustomization.read_text()).get("configMapGenerator", []):
        lines = list(generator.get("literals", []))
        for name in generator.get("envs", []):
            lines += (kustomization.parent / name).read_text().split()
        found[generator["name"]] = {line.partition("=")[0] for line in lines}
    return found


def test_the_files_are_what_kubernetes_admits(tmp_path: Path) -> None:
    check_by_schema(list(manifests().values()), tmp_path)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_render_to_what_kubernetes_admits(overlay: str, tmp_path: Path) -> None:
    resources = rendered(overlay)
    check_by_schema(resources, tmp_path)
    assert {resource["metadata"].get("namespace") for resource in resources if resource["kind"] != "Namespace"} == {
        "hunyuan-video"
    }


def test_the_gpu_overlay_asks_for_a_gpu_and_mounts_the_claim() -> None:
    resources = {(resource["kind"], resource["metadata"]["name"]): resource for resource in rendered("gpu")}
    pod = resources["Deployment", "worker"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert [("PersistentVolumeClaim", claim["claimName"]) in resources for claim in claims] == [True]


@pytest.mark.parametrize("path", kustomizations(), ids=lambda path: str(path.parent.relative_to(KUBERNETES)))
def test_kustomizations_name_what_exists(path: Path) -> None:
    kustomization = kustomizations()[path]
    named = [*kustomization.get("resources", []), *kustomization.get("components", [])]
    named += [patch["path"] for patch in kustomization.get("patches", [])]
    named += [name for generator in kustomization.get("configMapGenerator", []) for name in generator.get("envs", [])]
    assert named
    for name in named:
        found = path.parent / name
        assert found.is_file() or (found / "kustomization.yaml").is_file(), name


@pytest.mark.parametrize("name", containers())
def test_containers_can_do_no_more_than_they_must(name: str) -> None:
    """Pod Security's `restricted`, which the namespace enforces, and no writing to the image."""
    assert containers()[name]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert ":" in containers()[name]["image"] or containers()[name]["image"].startswith("hunyuan-video-")


@pytest.mark.parametrize("name", pod_specs())
def test_pods_are_not_root_and_hold_no_key_of_the_cluster(name: str) -> None:
    pod = pod_specs()[name]
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.mark.parametrize("name", containers())
def test_settings_and_commands_of_containers_exist(name: str) -> None:
    container = containers()[name]
    variables = {variable["name"] for variable in container.get("env", [])}
    assert {variable for variable in variables if variable.startswith(OUR_PREFIXES)} <= SETTINGS
    check_command(container.get("command", []))


def test_every_secret_and_its_keys_stand_in_the_example() -> None:
    known = {secret["metadata"]["name"]: secret["stringData"] for secret in of_kind("Secret").values()}
    assert all("CHANGE-ME" in value for values in known.values() for value in values.values())
    ours = {key for values in known.values() for key in values if key.startswith(OUR_PREFIXES)}
    assert ours <= SETTINGS
    named = set().union(*(referenced(container, "secret") for container in containers().values()))
    (authentication,) = of_kind("TriggerAuthentication").values()
    named |= {(ref["name"], ref["key"]) for ref in authentication["spec"]["secretTargetRef"]}
    (monitor,) = of_kind("ServiceMonitor").values()
    credentials = [endpoint["authorization"]["credentials"] for endpoint in monitor["spec"]["endpoints"]]
    named |= {(reference["name"], reference["key"]) for reference in credentials}
    assert {name for name, _ in named} == set(known)
    assert all(key is None or key in known[name] for name, key in named)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_bring_the_config_maps_with_settings_in_them(overlay: str) -> None:
    maps = generated_settings(KUBERNETES / "overlays" / overlay / "kustomization.yaml")
    named = set().union(*(referenced(container, "configMap") for container in containers().values()))
    assert {(name, None) for name in maps} == named
    assert set().union(*maps.values()) <= SETTINGS


def test_selectors_select_something() -> None:
    labels = [deployment["spec"]["template"]["metadata"]["labels"] for deployment in of_kind("Deployment").values()]
    for name, deployment in of_kind("Deployment").items():
        assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"], (
            name
        )
    for name, service in of_kind("Service").items():
        assert service["spec"]["selector"] in labels, name
    for name, budget in of_kind("PodDisruptionBudget").items():
        assert budget["spec"]["selector"]["matchLabels"] in labels, name
    for name, monitor in of_kind("ServiceMonitor").items():
        services = [service["metadata"]["labels"] for service in of_kind("Service").values()]
        assert monitor["spec"]["selector"]["matchLabels"] in services, name


def test_ports_are_those_that_are_listened_on() -> None:
    ports = {port["name"]: port["containerPort"] for c in containers().values() for port in c.get("ports", [])}
    assert ports["http"] == ShimSettings.model_fields["port"].default
    used = {port["targetPort"] for service in of_kind("Service").values() for port in service["spec"]["ports"]}
    for container in containers().values():
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            used |= {container[probe]["httpGet"]["port"]} if "httpGet" in container.get(probe, {}) else set()
    assert used == set(ports)
    for policy in of_kind("NetworkPolicy").values():
        for rule in policy["spec"].get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= set(ports)


def test_workers_reach_servers_that_are_not_ready_yet() -> None:
    """A server is ready once a worker has reported itself to it: by a service of ready ones alone, none ever could."""
    worker = containers()["base/worker.yaml:Deployment/worker/worker"]
    url = next(variable["value"] for variable in worker["env"] if variable["name"] == "HUNYUAN_PLATFORM_URL")
    service = of_kind("Service")["base/shim.yaml:Service/platform"]["spec"]
    assert url == f"http://platform:{service['ports'][0]['port']}"
    assert service["publishNotReadyAddresses"] is True


def test_nothing_goes_in_or_out_but_what_is_named() -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind("NetworkPolicy").values()}
    assert policies.pop("deny-by-default") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule["from"], name
        for rule in (*policy.get("ingress", []), *policy.get("egress", [])):
            assert rule["ports"], name
    assert "Ingress" not in policies["worker"]["policyTypes"], "nobody calls a worker"


def test_a_worker_may_finish_the_slowest_video_of_the_plan_before_it_is_killed() -> None:
    slowest = max(row.seconds for gpu in GPUS.values() for row in planning.rows(gpu))
    (worker,) = (pod for name, pod in pod_specs().items() if name.endswith("Deployment/worker"))
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    unit = re.search(r"^TimeoutStopSec=(\d+)$", (ROOT / "docs" / "deploy-on-prem.md").read_text(), re.M)
    assert unit is not None
    allowed = int(unit[1])
    assert slowest <= allowed <= 1.5 * slowest
    assert worker["terminationGracePeriodSeconds"] == allowed
    assert services["worker-gpu"]["stop_grace_period"] == f"{allowed // 3600}h"
    for page in ("deploy-docker.md", "deploy-kubernetes.md"):
        assert f"needs {slowest / 3600:.1f} hours on an RTX 4090" in re.sub(
            r"\s+", " ", (ROOT / "docs" / page).read_text()
        )


def test_workers_reach_the_demos_bucket_by_its_pods() -> None:
    """Cilium applies a rule with ipBlock to no pod."""
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind("NetworkPolicy").values()}
    (rule,) = policies["worker-to-minio"]["egress"]
    (deployment,) = (d for name, d in of_kind("Deployment").items() if name.endswith("Deployment/minio"))
    assert rule["to"] == [{"podSelector": deployment["spec"]["selector"]}]
    assert policies["worker-to-minio"]["podSelector"]["matchLabels"] == {NAME: "worker"}


def test_pods_of_ours_name_the_registrys_secret() -> None:
    for name, pod in pod_specs().items():
        ours = any(container["image"].startswith("hunyuan-video-") for container in pod["containers"])
        assert pod.get("imagePullSecrets", []) == ([{"name": "registry"}] if ours else []), name


def test_foreign_images_are_those_of_compose() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"].values()
    foreign = {c["image"] for c in containers().values() if not c["image"].startswith("hunyuan-video-")}
    assert foreign <= {service["image"] for service in services}


def test_the_demos_bucket_is_set_up_as_in_compose() -> None:
    """The root key stays in MinIO's own secret, and the other key reaches one bucket."""
    minio = containers()["overlays/cpu-demo/minio.yaml:Deployment/minio/minio"]
    bucket = yaml.safe_load(COMPOSE.read_text())["services"]["bucket"]
    policy = next(variable["value"] for variable in minio["env"] if variable["name"] == "POLICY")
    assert json.loads(policy) == json.loads(bucket["environment"]["POLICY"])
    script = minio["lifecycle"]["postStart"]["exec"]["command"][-1]
    assert set(bucket["command"][0].replace("$$", "$").splitlines()) <= set(script.splitlines())
    for name, container in containers().items():
        assert (("minio", None) in referenced(container, "secret")) is False
        root = {key for secret, key in referenced(container, "secret") if secret == "minio"}
        assert bool(root) == (container is minio or name.endswith("/minio/minio")), name


def test_the_pages_waits_end() -> None:
    """A server is ready after a worker has loaded the model, so nothing waits for servers before the weights."""
    page = (ROOT / "docs" / "deploy-kubernetes.md").read_text()
    assert "rollout status" not in page, "it fails at once if a deployment has missed its progress deadline before"
    real = page.partition("## The real model")[2]
    steps = [
        "overlays/gpu",
        "job/download-weights",
        "rollout restart deployment/worker",
        "wait --for=condition=Available",
    ]
    places = [real.index(step) for step in steps]
    assert places == sorted(places)


def test_the_scalers_query_counts_what_waits_and_runs() -> None:
    (scaled,) = of_kind("ScaledObject").values()
    (trigger,) = scaled["spec"]["triggers"]
    with sqlite3.connect(":memory:") as connection:
        connection.execute(str(CreateTable(jobs).compile(dialect=sqlite.dialect())))
        for state in JobState:
            row = {"task_id": state.value, "state": state.value, "input": "{}", "created_at": 0.0}
            row |= {"attempts": 0, "progress": 0, "stop_requested": False}
            row |= {"lost_attempts": 0, "deliveries_not_begun": 0, "client": "", "turn": 0, "last_event": 0}
            columns, marks = ", ".join(row), ", ".join("?" * len(row))
            connection.execute(f"INSERT INTO jobs ({columns}) VALUES ({marks})", tuple(row.values()))
        counted = connection.execute(trigger["metadata"]["query"]).fetchone()
    connection.close()
    assert counted == (sum(not state.is_terminal for state in JobState),)


def test_the_scaler_scales_the_workers_and_keeps_one() -> None:
    (scaled,) = of_kind("ScaledObject").values()
    spec = scaled["spec"]
    deployments = {deployment["metadata"]["name"] for deployment in of_kind("Deployment").values()}
    assert spec["scaleTargetRef"]["name"] in deployments
    assert spec["minReplicaCount"] >= 1, "with no worker the server takes no task, and none would ever be started"
    authentications = {resource["metadata"]["name"] for resource in of_kind("TriggerAuthentication").values()}
    assert {trigger["authenticationRef"]["name"] for trigger in spec["triggers"]} == authentications


def test_one_version_of_our_images() -> None:
    base = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())
    tags = {image["name"]: image["newTag"] for image in base["images"]}
    assert tags == {"hunyuan-video-shim": VERSION, "hunyuan-video-worker": VERSION}
    ours = {c["image"] for c in containers().values() if c["image"].startswith("hunyuan-video-")}
    assert ours <= {*tags, *(f"{name}:{tag}" for name, tag in tags.items())}
