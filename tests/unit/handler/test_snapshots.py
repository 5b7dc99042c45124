"""Checkpoints of the hub that are on this machine, and where a download may go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from handler.weights.snapshots import RUNPOD_CACHE, caches, download_directory, find_snapshot
from tests.support.unprivileged import make_read_only, make_writable, respect_permissions

REPOSITORY = "owner/a-checkpoint"
COMPONENTS = {"transformer": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"}


def snapshot(cache: Path, commit: str, *, main: bool = False) -> Path:
    """A complete snapshot as the hub's client leaves it: files are links to blobs."""
    folder = cache / "models--owner--a-checkpoint"
    made = folder / "snapshots" / commit
    index = {"_class_name": "HunyuanVideo15Pipeline", **{name: ["diffusers", "X"] for name in COMPONENTS}}
    contents = {"model_index.json": json.dumps({**index, "feature_extractor": [None, None]})}
    for name, config in COMPONENTS.items():
        contents[f"{name}/{config}"] = "{}"
    contents["vae/model.safetensors"] = "weights"
    contents["transformer/model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "model-1.safetensors"}})
    contents["transformer/model-1.safetensors"] = f"weights of {commit}"
    for number, (name, content) in enumerate(contents.items()):
        blob = folder / "blobs" / f"{commit}-{number}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).symlink_to(blob)
    if main:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
    return made


def test_the_snapshot_that_main_was_is_found_without_asking_the_hub(tmp_path: Path) -> None:
    wanted = snapshot(tmp_path, "aaa", main=True)
    newer = snapshot(tmp_path, "bbb")
    os.utime(newer, (2e9, 2e9))
    assert find_snapshot(REPOSITORY, [tmp_path / "absent", tmp_path]) == wanted
    assert find_snapshot("owner/another", [tmp_path]) is None


def test_without_a_reference_the_newest_complete_snapshot_is_found(tmp_path: Path) -> None:
    """RunPod's page on cached models takes a snapshot from the directory, and names no reference."""
    older, newer = snapshot(tmp_path, "aaa"), snapshot(tmp_path, "bbb")
    os.utime(older, (1e9, 1e9))
    os.utime(newer, (2e9, 2e9))
    assert find_snapshot(REPOSITORY, [tmp_path]) == newer
    (newer / "vae" / "model.safetensors").unlink()
    assert find_snapshot(REPOSITORY, [tmp_path]) == older


@pytest.mark.parametrize(
    "absent",
    [
        *("model_index.json", "transformer/config.json", "transformer/model-1.safetensors", "vae/model.safetensors"),
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize("as_link", [False, True], ids=["absent", "without-its-blob"])
def test_an_interrupted_download_is_not_taken_for_a_checkpoint(tmp_path: Path, absent: str, as_link: bool) -> None:
    path = snapshot(tmp_path, "aaa", main=True) / absent
    if as_link:
        path.resolve().unlink()
    else:
        path.unlink()
    assert find_snapshot(REPOSITORY, [tmp_path]) is None


@pytest.mark.parametrize("content", ["", "[]", '{"vae": 3}', "\xff"])
def test_a_damaged_index_is_not_taken_for_a_checkpoint(tmp_path: Path, content: str) -> None:
    index = snapshot(tmp_path, "aaa") / "model_index.json"
    index.resolve().write_bytes(content.encode("latin-1"))
    found = find_snapshot(REPOSITORY, [tmp_path])
    assert found is None or content == '{"vae": 3}', "an index without components names nothing that is absent"


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["readable", "closed"])
def test_a_download_goes_elsewhere_if_the_directory_belongs_to_another_user(tmp_path: Path, mode: int) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    make_read_only(cache)
    cache.chmod(mode)
    script = (
        "from pathlib import Path; from handler.weights.snapshots import *; "
        f"print(find_snapshot('{REPOSITORY}', caches(None)), download_directory('{REPOSITORY}', None), sep='\\n')"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_CACHE": str(cache), "HOME": str(tmp_path)},
        preexec_fn=respect_permissions,
        capture_output=True,
        text=True,
        check=False,
    )
    make_writable(cache)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["None", str(tmp_path / ".cache/huggingface/hub")]


def test_the_configured_directory_comes_first_and_runpods_is_always_looked_into(tmp_path: Path) -> None:
    assert caches(tmp_path)[0] == tmp_path
    assert RUNPOD_CACHE in caches(tmp_path)
    assert RUNPOD_CACHE in caches(None)
    assert download_directory(REPOSITORY, tmp_path / "not" / "there") == tmp_path / "not" / "there"
