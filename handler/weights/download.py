"""`python -m handler.weights`: get the checkpoints that a profile needs, or convert one of the original layout.

Exit codes: 0 done, 1 it failed, 2 a wrong argument or the licence not accepted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from contract.job import Profile
from handler.video_model.base import ModelError
from handler.video_model.catalog import IMAGE_BASES, known_name, needed

LICENCE: Final = """\
The weights of HunyuanVideo-1.5 come under the Tencent Hunyuan Community License Agreement. It does not cover the
European Union, the United Kingdom and South Korea: there, it permits no use.
https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5/blob/main/LICENSE"""

_DONE: Final = 0
_FAILED: Final = 1
_USAGE: Final = 2
_INTERRUPTED: Final = 130  # as a shell says it

_TRANSFORMER: Final = "transformer"
_INDEX: Final = "model_index.json"
#: Beneath the target: what is under way. Kept when a download breaks off, so that the next one goes on from there.
_UNDER_WAY: Final = ".download"


class WeightsError(Exception):
    """The weights can't be had; the message says why."""


@dataclass(frozen=True)
class Files:
    """Files of a hub repository: those that match a pattern of `allow` (all, if empty) and none of `ignore`."""

    repository: str
    allow: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


#: Puts files into a directory, under their paths in the repository; goes on where an earlier call broke off.
#: Raises WeightsError unless each of them is there and whole.
Fetch: TypeAlias = Callable[[Files, Path], None]


@dataclass(frozen=True)
class Recipe:
    """Where a checkpoint comes from.

    `pipeline` is a repository in diffusers' layout; super-resolution stages take none. `original` are files of the
    original layout whose transformer goes in its transformer's place.
    """

    pipeline: str | None = None
    original: Files | None = None


_DIFFUSERS: Final = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-"
_480P_T2V_DISTILLED: Final = f"{_DIFFUSERS}480p_t2v_distilled"
_FOUR_STEPS: Final = Files("lightx2v/Hy1.5-Distill-Models", ("hy1.5_t2v_480p_lightx2v_4step.safetensors",))


def _super_resolution(name: str) -> Files:
    return Files("tencent/HunyuanVideo-1.5", (f"transformer/{name}/*", f"upsampler/{name}/*"))


#: By the checkpoint's name in the catalog, which is its directory's name, too. Which a profile needs, the catalog says.
RECIPES: Final[Mapping[str, Recipe]] = {
    "480p_t2v_4step": Recipe(_480P_T2V_DISTILLED, _FOUR_STEPS),
    "480p_t2v_distilled": Recipe(_480P_T2V_DISTILLED),
    "720p_t2v": Recipe(f"{_DIFFUSERS}720p_t2v"),
    **{name: Recipe(f"{_DIFFUSERS}{name}") for name in IMAGE_BASES.values()},
    "720p_sr_distilled": Recipe(original=_super_resolution("720p_sr_distilled")),
    "1080p_sr_distilled": Recipe(original=_super_resolution("1080p_sr_distilled")),
}


def fetch_from_hub(files: Files, to: Path) -> None:
    """Fetch from the Hugging Face hub, with its progress bars; HF_TOKEN and HF_ENDPOINT are heeded.

    The hub's client looks at sizes alone, so each large file's SHA-256 is held against the hub's own.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, XetDownloadError  # type: ignore[attr-defined] # the HTTP client's own

    allow, ignore = list(files.allow) or None, list(files.ignore) or None
    try:
        # Listed beforehand: without a connection, the hub client takes what lies in `to` for the whole.
        listed = snapshot_download(
            files.repository, local_dir=to, allow_patterns=allow, ignore_patterns=ignore, dry_run=True
        )
        if not listed:
            raise WeightsError(f"{files.repository} has no {', '.join(files.allow) or 'files'}")
        _check_space(to, sum(file.file_size or 0 for file in listed if file.will_download))
        snapshot_download(
            files.repository,
            revision=listed[0].commit_hash,
            local_dir=to,
            allow_patterns=allow,
            ignore_patterns=ignore,
        )
        published = HfApi().model_info(files.repository, revision=listed[0].commit_hash, files_metadata=True)
    except (OSError, ValueError, RuntimeError, HTTPError, XetDownloadError) as exc:
        raise WeightsError(f"{files.repository}: {_one_line(exc.__cause__ or exc)}") from exc
    for file in listed:
        path = to / file.filename
        if not path.is_file() or file.file_size not in (None, path.stat().st_size):
            raise WeightsError(f"{files.repository}: {file.filename} did not come through whole, try again")
    sums = {file.rfilename: file.lfs.sha256 for file in published.siblings or () if file.lfs is not None}
    for file in listed:
        if file.filename in sums:
            _check_sum(to / file.filename, sums[file.filename], f"{files.repository}: {file.filename}")


def _check_sum(path: Path, expected: str, name: str) -> None:
    """A file with another SHA-256 is removed, so that the next call gets it again."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise WeightsError(f"{name} came through changed: its SHA-256 is {found}, not {expected}; try again")


def download(profile: Profile, to: Path, fetch: Fetch = fetch_from_hub, *, images: bool = False) -> None:
    """Make `to` hold every checkpoint that the profile needs. Those that are there already are left alone.

    With `images` also the one for videos that start from an image.

    Each appears under its name when it is complete. Where two share their text encoders and VAE, these are fetched
    once and linked. While a checkpoint is converted, the disk holds it twice.

    Raises:
        WeightsError, ModelError, OSError: something can't be had, converted or written. Calling again goes on.
    """
    for name in sorted(needed(profile) | ({IMAGE_BASES[profile]} if images else set())):
        final = to / name
        if _is_complete(final):
            print(f"{name}: is there")
            continue
        if final.exists():
            raise WeightsError(f"{final} is there, but not complete: move it away")
        print(f"{name}: on its way", flush=True)
        _make(name, to, fetch)
        print(f"{name}: ready")
    under_way = to / _UNDER_WAY
    if under_way.is_dir() and not any(under_way.iterdir()):
        under_way.rmdir()


def _make(name: str, to: Path, fetch: Fetch) -> None:
    recipe, final = RECIPES[name], to / name
    stage, original = to / _UNDER_WAY / name, to / _UNDER_WAY / f"{name}.original"
    stage.parent.mkdir(parents=True, exist_ok=True)
    if recipe.pipeline is None:
        assert recipe.original is not None  # noqa: S101
        fetch(recipe.original, original)
        _convert(original, final, name)
    else:
        _add_components(recipe.pipeline, stage, to, fetch)
        if recipe.original is None:
            fetch(Files(recipe.pipeline, allow=(f"{_TRANSFORMER}/*",)), stage)
        elif not (stage / _TRANSFORMER).exists():
            fetch(recipe.original, original)
            _add_converted(original, stage, name)
        shutil.rmtree(stage / ".cache", ignore_errors=True)  # the hub client's notes
        if not _is_complete(stage):
            raise WeightsError(f"{recipe.pipeline} is not complete, or no pipeline")
        stage.rename(final)
    shutil.rmtree(original, ignore_errors=True)


def _add_components(pipeline: str, stage: Path, to: Path, fetch: Fetch) -> None:
    """All but the transformer; from a neighbour that has the same."""
    for name, recipe in RECIPES.items():
        if recipe.pipeline == pipeline and _is_complete(to / name):
            without = shutil.ignore_patterns(_TRANSFORMER)
            shutil.copytree(to / name, stage, ignore=without, copy_function=_link, dirs_exist_ok=True)
            return
    fetch(Files(pipeline, ignore=(f"{_TRANSFORMER}/*",)), stage)


def _link(source: str, target: str) -> None:
    """Hard links cost no space; not each file system has them."""
    if Path(target).exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _add_converted(original: Path, stage: Path, name: str) -> None:
    (source,) = sorted(original.glob("*.safetensors"))
    converted = stage.with_name(f"{name}.converted")
    shutil.rmtree(converted, ignore_errors=True)
    _convert(source, converted, name)
    (converted / _TRANSFORMER).rename(stage / _TRANSFORMER)
    converted.rmdir()


def _convert(source: Path, target: Path, name: str) -> None:
    from handler.weights.convert import convert_checkpoint  # torch and diffusers take seconds to import

    convert_checkpoint(source, target, name)


def _is_complete(directory: Path) -> bool:
    """Whether a checkpoint has all that its recipe and its own indices of shards tell of."""
    recipe = RECIPES.get(directory.name, Recipe())
    wanted = [directory / _TRANSFORMER / "config.json"]
    wanted.append(directory / (_INDEX if recipe.pipeline is not None else "upsampler/config.json"))
    for index in directory.rglob("*.safetensors.index.json"):
        wanted += _shards(index)
    return all(path.is_file() for path in wanted) and any((directory / _TRANSFORMER).glob("*.safetensors"))


def _shards(index: Path) -> list[Path]:
    try:
        return [index.parent / shard for shard in set(json.loads(index.read_text())["weight_map"].values())]
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise WeightsError(f"{index} is no index of shards: remove it") from exc


def _check_space(to: Path, size: int) -> None:
    existing = next(path for path in (to, *to.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise WeightsError(f"{to} needs {size / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free")


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


def main(arguments: Sequence[str] | None = None, fetch: Fetch = fetch_from_hub) -> int:
    """Run the command; its exit code."""
    given = _parser().parse_args(arguments)
    if given.command == "download":
        print(LICENCE)
        if not given.accept_licence:
            print("Say that you accept it with --accept-licence.", file=sys.stderr)
            return _USAGE
    try:
        if given.command == "download":
            download(given.profile, given.to, fetch, images=given.images)
        else:
            name = given.name or known_name(given.target.name) or known_name(given.source.name)
            if name is None:
                print("Neither directory is called like a checkpoint: give its --name.", file=sys.stderr)
                return _USAGE
            _convert(given.source, given.target, name)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return _INTERRUPTED
    except (WeightsError, ModelError, OSError) as exc:
        print(_one_line(exc), file=sys.stderr)
        return _FAILED
    return _DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m handler.weights", description="Get and convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("download", help="get every checkpoint that a profile needs")
    get.add_argument("profile", type=Profile, choices=list(Profile), help="fast, balanced or quality")
    get.add_argument("--to", type=Path, required=True, help="directory for them; HUNYUAN_MODEL_PATH later on")
    get.add_argument("--images", action="store_true", help="and what videos that start from an image take")
    get.add_argument("--accept-licence", action="store_true", help="you have read the licence, and accept it")
    convert = commands.add_parser("convert", help="convert a checkpoint of the original layout")
    convert.add_argument("source", type=Path, help="a .safetensors file, or a directory with one or with its shards")
    convert.add_argument("target", type=Path, help="directory to make")
    convert.add_argument("--name", help="its name in the catalog, where no directory's name tells")
    return parser


if __name__ == "__main__":
    sys.exit(main())
