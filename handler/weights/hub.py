"""The Hugging Face hub, behind `Fetch`."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, XetDownloadError  # type: ignore[attr-defined] # the HTTP client's own

from handler.weights.errors import WeightsError, one_line


@dataclass(frozen=True)
class Files:
    """Files of a hub repository: those that match a pattern of `allow` (all, if empty) and none of `ignore`."""

    repository: str
    allow: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


#: Downloads files into a directory, under their paths in the repository, and resumes an interrupted download.
#: Raises WeightsError unless every file is there and complete.
Fetch: TypeAlias = Callable[[Files, Path], None]


def fetch_from_hub(files: Files, to: Path, endpoint: str | None = None) -> None:
    """Downloads from the Hugging Face hub, with the client's progress bars. The client reads HF_TOKEN.

    `endpoint` is the hub's address; None takes HF_ENDPOINT. The client compares sizes only, so this function also
    compares each large file's SHA-256 with the hub's.
    """
    which: dict[str, Any] = {
        "local_dir": to,
        "endpoint": endpoint,
        "allow_patterns": list(files.allow) or None,
        "ignore_patterns": list(files.ignore) or None,
    }
    try:
        # 1. List the files. This fails without a connection, where the download would accept what is in `to`.
        listed = snapshot_download(files.repository, dry_run=True, **which)
        if not listed:
            raise WeightsError(f"{files.repository} has no {', '.join(files.allow) or 'files'}")
        _check_space(to, sum(file.file_size or 0 for file in listed if file.will_download))
        # 2. Download them, all of one commit.
        commit = listed[0].commit_hash
        snapshot_download(files.repository, revision=commit, **which)
        published = HfApi(endpoint).model_info(files.repository, revision=commit, files_metadata=True)
    except (OSError, ValueError, RuntimeError, HTTPError, XetDownloadError) as exc:
        raise WeightsError(f"{files.repository}: {one_line(exc.__cause__ or exc)}") from exc
    # 3. Check sizes first, then hashes, which take minutes.
    for file in listed:
        _check_size(to / file.filename, file.file_size, f"{files.repository}: {file.filename}")
    hashes = {file.rfilename: file.lfs.sha256 for file in published.siblings or () if file.lfs is not None}
    for name in hashes.keys() & {file.filename for file in listed}:
        _check_hash(to / name, hashes[name], f"{files.repository}: {name}")


def _check_space(to: Path, size: int) -> None:
    existing = next(path for path in (to, *to.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise WeightsError(f"{to} needs {size / 1e9:.1f} GB more, but its disk has {free / 1e9:.1f} GB free")


def _check_size(path: Path, expected: int | None, name: str) -> None:
    if not path.is_file() or expected not in (None, path.stat().st_size):
        raise WeightsError(f"{name} is incomplete after its download; run the same command again")


def _check_hash(path: Path, expected: str, name: str) -> None:
    """Deletes a file with another SHA-256, so that the next call downloads it again."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise WeightsError(
            f"{name} was damaged in its download: its SHA-256 is {found}, not {expected}; run the same command again"
        )
