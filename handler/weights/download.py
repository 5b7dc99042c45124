"""Where each checkpoint comes from, and the download of those that a profile needs."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from contract.job import Profile
from handler.video_model.catalog import IMAGE_BASES, needed
from handler.weights.errors import WeightsError
from handler.weights.hub import Fetch, Files, fetch_from_hub
from handler.weights.layout import CONFIG_FILE, INDEX_FILES, PIPELINE_FILE, TRANSFORMER, UPSAMPLER, shards

#: The directory of unfinished checkpoints, inside the target. It stays after an interrupted download, to resume it.
_UNFINISHED: Final = ".download"


@dataclass(frozen=True)
class Recipe:
    """Where a checkpoint comes from.

    `pipeline` is a repository in diffusers' layout; super-resolution stages have none. `original` names files of the
    original layout; their transformer replaces the pipeline's.
    """

    pipeline: str | None = None
    original: Files | None = None


_DIFFUSERS: Final = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-"
_480P_T2V_DISTILLED: Final = f"{_DIFFUSERS}480p_t2v_distilled"
_FOUR_STEPS: Final = Files("lightx2v/Hy1.5-Distill-Models", ("hy1.5_t2v_480p_lightx2v_4step.safetensors",))


def _super_resolution(name: str) -> Files:
    return Files("tencent/HunyuanVideo-1.5", (f"transformer/{name}/*", f"upsampler/{name}/*"))


#: By the checkpoint's name in the catalog, which is also the name of its directory.
RECIPES: Final[Mapping[str, Recipe]] = {
    "480p_t2v_4step": Recipe(_480P_T2V_DISTILLED, _FOUR_STEPS),
    "480p_t2v_distilled": Recipe(_480P_T2V_DISTILLED),
    "720p_t2v": Recipe(f"{_DIFFUSERS}720p_t2v"),
    **{name: Recipe(f"{_DIFFUSERS}{name}") for name in IMAGE_BASES.values()},
    "720p_sr_distilled": Recipe(original=_super_resolution("720p_sr_distilled")),
    "1080p_sr_distilled": Recipe(original=_super_resolution("1080p_sr_distilled")),
}


def download(
    profile: Profile, to: Path, fetch: Fetch = fetch_from_hub, *, images: bool = False, first: int | None = None
) -> None:
    """Downloads every checkpoint that the profile needs into `to`, or the `first` ones, and skips complete ones.

    With `images` also the one for videos that start from an image. A checkpoint gets its name when it is complete.
    Checkpoints with the same text encoders and VAE share them as hard links. A checkpoint that is converted needs its
    disk space twice for that time.

    Raises:
        WeightsError, OSError: a file cannot be downloaded, converted or written. Another call resumes.
    """
    for name in sorted(needed(profile) | ({IMAGE_BASES[profile]} if images else set()))[:first]:
        final = to / name
        if _is_complete(final):
            print(f"{name}: already complete")
            continue
        if final.exists():
            raise WeightsError(f"{final} exists but is incomplete: move it away and run the same command again")
        print(f"{name}: downloading", flush=True)
        _download_checkpoint(name, to, fetch)
        print(f"{name}: ready")
    unfinished = to / _UNFINISHED
    if unfinished.is_dir() and not any(unfinished.iterdir()):
        unfinished.rmdir()


def _download_checkpoint(name: str, to: Path, fetch: Fetch) -> None:
    recipe, final = RECIPES[name], to / name
    stage, original = to / _UNFINISHED / name, to / _UNFINISHED / f"{name}.original"
    stage.parent.mkdir(parents=True, exist_ok=True)
    if recipe.pipeline is None:
        assert recipe.original is not None  # noqa: S101
        fetch(recipe.original, original)
        _convert(original, final, name)
    else:
        _add_shared_components(recipe.pipeline, stage, to, fetch)
        if recipe.original is None:
            fetch(Files(recipe.pipeline, allow=(f"{TRANSFORMER}/*",)), stage)
        elif not (stage / TRANSFORMER).exists():
            fetch(recipe.original, original)
            _add_converted_transformer(original, stage, name)
        shutil.rmtree(stage / ".cache", ignore_errors=True)  # of the hub's client
        if not _is_complete(stage):
            raise WeightsError(f"the hub repository {recipe.pipeline} is incomplete or has no pipeline")
        stage.rename(final)
    shutil.rmtree(original, ignore_errors=True)


def _add_shared_components(pipeline: str, stage: Path, to: Path, fetch: Fetch) -> None:
    """Adds all components but the transformer. Links them if a complete checkpoint has the same pipeline."""
    for name, recipe in RECIPES.items():
        if recipe.pipeline == pipeline and _is_complete(to / name):
            without = shutil.ignore_patterns(TRANSFORMER)
            shutil.copytree(to / name, stage, ignore=without, copy_function=_link, dirs_exist_ok=True)
            return
    fetch(Files(pipeline, ignore=(f"{TRANSFORMER}/*",)), stage)


def _link(source: str, target: str) -> None:
    """A hard link takes no space. Some file systems have none: there, copy."""
    if Path(target).exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _add_converted_transformer(original: Path, stage: Path, name: str) -> None:
    (source,) = sorted(original.glob("*.safetensors"))
    converted = stage.with_name(f"{name}.converted")
    shutil.rmtree(converted, ignore_errors=True)
    _convert(source, converted, name)
    (converted / TRANSFORMER).rename(stage / TRANSFORMER)
    converted.rmdir()


def _convert(source: Path, target: Path, name: str) -> None:
    from handler.weights.convert import convert_checkpoint  # torch and diffusers take seconds to import

    convert_checkpoint(source, target, name)


def _is_complete(directory: Path) -> bool:
    """Whether a checkpoint has every file that its recipe and its shard indices name."""
    recipe = RECIPES.get(directory.name, Recipe())
    wanted = [directory / TRANSFORMER / CONFIG_FILE]
    wanted.append(directory / PIPELINE_FILE if recipe.pipeline is not None else directory / UPSAMPLER / CONFIG_FILE)
    for index in directory.rglob(INDEX_FILES):
        wanted += shards(index)
    return all(path.is_file() for path in wanted) and any((directory / TRANSFORMER).glob("*.safetensors"))
