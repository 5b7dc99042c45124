"""Runs the other programs of this package. No other module of `hunyuan` imports them, and this one only when called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contract.job import Profile


class LaunchError(Exception):
    """The program failed; the message says why, in one line. `exit_code` is for the command."""

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def download_weights(profile: Profile, to: Path, *, images: bool) -> None:
    """Downloads the checkpoints that a profile needs into `to`.

    Raises:
        LaunchError: the worker's packages are not installed, or the download failed.
    """
    with _weights_errors():
        from handler.weights.download import download

        download(profile, to, images=images)


def convert_weights(source: Path, target: Path, name: str | None) -> None:
    """Converts a checkpoint of the original layout to `target`; None takes its name from the directories.

    Raises:
        LaunchError: the worker's packages are not installed, or the conversion failed.
    """
    with _weights_errors():
        from handler.weights.convert import checkpoint_name, convert_checkpoint

        convert_checkpoint(source, target, name or checkpoint_name(source, target))


@contextmanager
def _weights_errors() -> Iterator[None]:
    """Checks that the worker's packages are installed, and raises what goes wrong as LaunchError."""
    if find_spec("torch") is None or find_spec("huggingface_hub") is None:
        raise LaunchError("This command needs PyTorch: run pip install 'hunyuan-video-service[worker]'")
    from handler.weights.errors import UnknownNameError, WeightsError, one_line

    try:
        yield
    except UnknownNameError as exc:
        raise LaunchError(one_line(exc), exit_code=2) from exc
    except (WeightsError, OSError) as exc:
        raise LaunchError(one_line(exc)) from exc
