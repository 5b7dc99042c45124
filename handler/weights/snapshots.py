"""Checkpoints of the Hugging Face hub that are on this machine already, and where a download may go.

The hub's client keeps `models--OWNER--NAME/snapshots/COMMIT` with links to its files, and `refs/main` with the commit
that `main` had. RunPod fills a directory of that layout as root before a worker starts. The client itself would ask the
hub first, and download what `main` has now into a directory that it may not be allowed to write.
Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache,
https://docs.runpod.io/serverless/endpoints/model-caching.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from huggingface_hub import constants

from handler.machine import VOLUME, is_writable
from handler.weights.errors import WeightsError
from handler.weights.layout import CONFIG_FILE, INDEX_FILES, PIPELINE_FILE, shards

#: Where RunPod keeps the cached model of an endpoint.
RUNPOD_CACHE: Final = VOLUME / "huggingface-cache" / "hub"
#: Where a download goes if the configured directory cannot be written: to the disk of the container.
_OWN_CACHE: Final = Path("~/.cache/huggingface/hub")


def caches(configured: Path | None) -> Sequence[Path]:
    """The directories to look into: HUNYUAN_CACHE_DIR, else that of the hub's client (HF_HUB_CACHE), and RunPod's."""
    own = Path(constants.HF_HUB_CACHE)
    return tuple(dict.fromkeys((configured or own, own, RUNPOD_CACHE, _OWN_CACHE.expanduser())))


def find_snapshot(repository: str, directories: Sequence[Path]) -> Path | None:
    """The first complete snapshot of a checkpoint: the one that `main` was, else the newest. Asks nobody."""
    for directory in directories:
        for snapshot in _snapshots(directory / _folder(repository)):
            if _is_complete(snapshot):
                return snapshot
    return None


def download_directory(repository: str, configured: Path | None) -> Path:
    """Where to download to: the configured directory, else one on the disk of the container if it can't be written."""
    wanted = configured or Path(constants.HF_HUB_CACHE)
    needed = (wanted / _folder(repository), wanted / ".locks")
    return wanted if all(map(is_writable, needed)) else _OWN_CACHE.expanduser()


def _folder(repository: str) -> str:
    return f"models--{repository.replace('/', '--')}"


def _snapshots(folder: Path) -> Iterator[Path]:
    try:
        found = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return
    try:
        main = (folder / "refs" / "main").read_text().strip()
    except OSError:
        main = ""
    yield from sorted(found, key=lambda path: path.name != main)


def _is_complete(snapshot: Path) -> bool:
    """Whether every component that the index names has its configuration and all of its weights."""
    try:
        index = json.loads((snapshot / PIPELINE_FILE).read_text())
        components = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
        return all(_is_complete_component(snapshot / name) for name in components)
    except (OSError, ValueError, AttributeError, WeightsError):
        return False


def _is_complete_component(directory: Path) -> bool:
    files = [path for path in directory.glob("*") if path.is_file()]  # no link whose file has not arrived
    names = {path.name for path in files}
    is_model, has_weights = CONFIG_FILE in names, any(path.suffix == ".safetensors" for path in files)
    wanted = [shard for index in directory.glob(INDEX_FILES) for shard in shards(index)]
    return len(files) > 0 and is_model is has_weights and all(path.is_file() for path in wanted)
