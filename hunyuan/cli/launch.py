"""Runs the other programs of this package. No other module of `hunyuan` imports them, and this one only when called.

An error of theirs ends the command: with exit code 2 if a setting or an argument is wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

from contract.imports import without_collections
from contract.job import Profile
from hunyuan.cli.exits import INTERRUPTED, ExitCode, end, fail


def serve(**overrides: object) -> None:
    """Runs the server until SIGINT or SIGTERM. `overrides` replace environment variables, unless None."""
    with _start_errors():
        with without_collections():
            from shim.host.serve import main

        main(**_given(overrides))


def worker(**overrides: object) -> None:
    """Replaces this process by a worker of a server on another host. `overrides` as in `serve`."""
    with _start_errors():
        from shim.host.remote_worker import main

        main(**_given(overrides))


def prune(*, older_than: timedelta, dry_run: bool) -> list[str]:
    """Deletes the videos that are older than that; returns the ids of their tasks. `dry_run` deletes nothing."""
    with _start_errors():
        from shim.host.prune import main

        return main(older_than=older_than, dry_run=dry_run)


def downgrade_queue(revision: str) -> None:
    """Migrates the queue's database back to `revision`."""
    with _start_errors():
        from shim.host.downgrade import main

        main(revision)


def plan(gpu: str, *, vram: float | None, share: float | None, sage: bool, from_image: bool) -> list[dict[str, object]]:
    """What every kind of job needs on a GPU. Loads no PyTorch."""
    from handler.video_model.planning import GPUS, gpu_named, rows

    found = gpu_named(gpu)
    if found is None:
        fail(f"--gpu must be one of {', '.join(GPUS)}; got {gpu}", ExitCode.USAGE)
    return [asdict(row) for row in rows(found, vram=vram, share=share, sage=sage, from_image=from_image)]


def _given(overrides: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in overrides.items() if value is not None}


@contextmanager
def _start_errors() -> Iterator[None]:
    from shim.host.errors import StartError

    try:
        yield
    except StartError as exc:
        fail(str(exc), ExitCode.USAGE)


def download_weights(profile: Profile, to: Path, *, images: bool, first: int | None = None) -> None:
    """Downloads the checkpoints that a profile needs into `to`, or the `first` ones."""
    with _weights_errors():
        from handler.weights.download import download

        download(profile, to, images=images, first=first)


def convert_weights(source: Path, target: Path, name: str | None) -> None:
    """Converts a checkpoint to `target`; None takes its name from the directories."""
    with _weights_errors():
        from handler.weights.convert import checkpoint_name, convert_checkpoint

        convert_checkpoint(source, target, name or checkpoint_name(source, target))


@contextmanager
def _weights_errors() -> Iterator[None]:
    if find_spec("torch") is None or find_spec("huggingface_hub") is None:
        end("This command needs PyTorch: run pip install 'hunyuan-video-service[worker]'", ExitCode.FAILED)
    from handler.weights.errors import UnknownNameError, WeightsError, one_line

    try:
        yield
    except KeyboardInterrupt:
        end("Interrupted; run the same command again to resume", INTERRUPTED)
    except UnknownNameError as exc:
        end(one_line(exc), ExitCode.USAGE)
    except (WeightsError, OSError) as exc:
        end(one_line(exc), ExitCode.FAILED)
