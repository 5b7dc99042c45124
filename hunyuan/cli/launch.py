"""Runs the other programs of this package. No other module of `hunyuan` imports them, and this one only when called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import typer

from contract.job import Profile


def download_weights(profile: Profile, to: Path, *, images: bool) -> None:
    """Downloads the checkpoints that a profile needs into `to`. An error ends the command with one line."""
    with _errors_end_the_command():
        from handler.weights.download import download

        download(profile, to, images=images)


def convert_weights(source: Path, target: Path, name: str | None) -> None:
    """Converts a checkpoint to `target`; None takes its name from the directories. An error ends the command."""
    with _errors_end_the_command():
        from handler.weights.convert import checkpoint_name, convert_checkpoint

        convert_checkpoint(source, target, name or checkpoint_name(source, target))


@contextmanager
def _errors_end_the_command() -> Iterator[None]:
    """Exit code 1 for a failure, 2 for a wrong argument, 130 for an interrupt, as a shell reports it."""
    if find_spec("torch") is None or find_spec("huggingface_hub") is None:
        _fail("This command needs PyTorch: run pip install 'hunyuan-video-service[worker]'", 1)
    from handler.weights.errors import UnknownNameError, WeightsError, one_line

    try:
        yield
    except KeyboardInterrupt:
        _fail("Interrupted; run the same command again to resume", 130)
    except UnknownNameError as exc:
        _fail(one_line(exc), 2)
    except (WeightsError, OSError) as exc:
        _fail(one_line(exc), 1)


def _fail(text: str, exit_code: int) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(exit_code)
