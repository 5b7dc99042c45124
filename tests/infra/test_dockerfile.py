"""The Dockerfile by its linter, and what it promises to those who run its images."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from contract.job import Profile
from handler.video_model.catalog import needed
from tests.infra.dockerfile import Stage
from tests.infra.offered import DOCKERFILE, OUR_PREFIXES, ROOT, SCRIPTS, SETTINGS, STAGES, check_command
from tools.cuda_constraints import added, normal

#: What PyPI's Linux wheel of a torch requires of NVIDIA's `cuda-toolkit` package, by the versions that both begin with.
CUDA_OF_TORCH = {"2.13": "13.0"}

TARGETS = pytest.mark.parametrize("stage", [STAGES["shim"], STAGES["worker"]], ids=lambda stage: stage.name)


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([SCRIPTS / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_every_base_image_is_named_by_its_exact_version(stage: Stage) -> None:
    assert re.search(r":\d+\.\d+\.\d+-", stage.base)


def test_the_workers_cuda_is_the_one_that_its_torch_is_built_for() -> None:
    torch = re.search(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert torch is not None
    assert f"nvidia/cuda:{CUDA_OF_TORCH[torch[1]]}." in STAGES["worker"].base


@TARGETS
def test_process_1_is_python_and_not_root(stage: Stage) -> None:
    """The exec form: else a shell is process 1 and keeps SIGTERM to itself."""
    assert stage.last("CMD").argument.startswith("[")
    check_command(stage.last("CMD").words)
    assert [entrypoint.words for entrypoint in stage.all("ENTRYPOINT")] in ([], [[]])
    assert stage.last("STOPSIGNAL").argument == "SIGTERM"
    user, group = stage.last("USER").argument.split(":")
    assert int(user) > 0
    assert int(group) > 0, "numbers: Kubernetes can't tell otherwise that it is not root"


@TARGETS
def test_images_say_what_they_are(stage: Stage) -> None:
    labels = dict(word.split("=", 1) for label in stage.all("LABEL") for word in label.words)
    wanted = {"title", "description", "licenses", "base.name", "version", "revision"}
    assert {name.removeprefix("org.opencontainers.image.") for name in labels} == wanted
    assert labels["org.opencontainers.image.base.name"].endswith(stage.base)


@TARGETS
def test_code_that_changes_leaves_the_layers_of_the_dependencies_alone(stage: Stage) -> None:
    steps = [f"{instruction.keyword} {instruction.argument}" for instruction in stage.instructions]
    dependencies = next(i for i, step in enumerate(steps) if "--requirement" in step)
    code = next(i for i, step in enumerate(steps) if step.startswith("COPY --from=wheel"))
    copied = {name for step in steps[:dependencies] if step.startswith("COPY") for name in step.split()[1:-1]}
    given = {"constraints.txt", "constraints-cuda.txt"} if stage.name == "worker" else {"constraints.txt"}
    assert copied == {"--from=requirements", f"/opt/hunyuan/requirements/{stage.name}.txt", *given}
    assert dependencies < code


def test_the_requirements_are_those_of_the_package_without_the_settings_of_tools(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    written: list[dict[str, str]] = []
    for number, addition in enumerate(("", "\n[tool.another]\nline-length = 99\n")):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + addition)
        (run,) = STAGES["requirements"].all("RUN")
        command = ["sh", "-ec", run.argument.replace("python3", sys.executable)]
        subprocess.run(command, cwd=directory, check=True)
        written.append({name: (directory / f"{name}.txt").read_text() for name in ("shim", "worker")})
    assert written[0] == written[1]
    assert written[0]["shim"].split("\n") == project["dependencies"]
    assert written[0]["worker"].split("\n") == project["dependencies"] + project["optional-dependencies"]["worker"]


def test_the_workers_image_pins_the_packages_of_cuda_too() -> None:
    files = ((ROOT / name).read_text() for name in ("constraints.txt", "constraints-cuda.txt"))
    general, cuda = (
        {normal(line.partition("==")[0]) for line in re.findall(r"^\S+==\S+$", text, re.M)} for text in files
    )
    assert not general & cuda, "one place for each version"
    assert {"triton", "cuda-toolkit", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-nccl-cu13"} <= cuda
    assert not any(name.startswith(("nvidia-c", "cuda-")) for name in general)


def test_the_packages_of_cuda_are_those_that_the_other_file_lacks() -> None:
    names = ("hunyuan-video-service", "torch", "nvidia_cudnn_cu13", "huggingface-hub")
    report = {"install": [{"metadata": {"name": name, "version": "1.2"}} for name in names]}
    assert added(report, "torch==1.2\nhuggingface_hub==1.2\n") == ["nvidia_cudnn_cu13==1.2"]


def test_baked_weights_have_a_layer_for_each_checkpoint() -> None:
    runs = [run.argument for run in STAGES["worker"].all("RUN") if "download-weights" in run.argument]
    assert len(runs) == max(len(needed(profile)) for profile in Profile)
    assert [re.findall(r"--first (\d)", run) for run in runs] == [*([str(n)] for n in range(1, len(runs))), []]


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*", "nothing goes to the builder but what is named"
    admitted = {line.removeprefix("!/") for line in lines if line.startswith("!/")}
    copied = {
        name.removeprefix("./")
        for stage in STAGES.values()
        for copy in stage.all("COPY")
        if not copy.words[0].startswith("--from=")
        for name in copy.words[:-1]
    }
    assert copied == admitted
    assert all((ROOT / name).exists() for name in copied)
    assert not any(fnmatch.fnmatch(".env", pattern) for pattern in admitted)


def test_stages_copy_from_stages() -> None:
    named = re.findall(r"--from=(\w+)", DOCKERFILE.read_text())
    assert named
    assert set(named) <= set(STAGES)


@TARGETS
def test_variables_of_ours_are_settings(stage: Stage) -> None:
    names = {word.partition("=")[0] for env in stage.all("ENV") for word in env.words}
    assert {name for name in names if name.startswith(OUR_PREFIXES)} <= SETTINGS
    assert "PYTHONUNBUFFERED" in names
