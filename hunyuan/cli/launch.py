"""Runs the other programs of this package. No other module of `hunyuan` imports them, and this one only when called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LaunchError(Exception):
    """The program failed; the message says why, in one line. `exit_code` is for the command."""

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def serve(**overrides: object) -> None:
    """Runs the server until SIGINT or SIGTERM. `overrides` replace environment variables, unless None.

    Raises:
        LaunchError: the server can't start.
    """
    with _start_errors():
        from shim.host.serve import main

        main(**_given(overrides))


def worker(**overrides: object) -> None:
    """Replaces this process by a worker of a server on another host. `overrides` as in `serve`.

    Raises:
        LaunchError: a setting is missing or wrong.
    """
    with _start_errors():
        from shim.host.remote_worker import main

        main(**_given(overrides))


def _given(overrides: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in overrides.items() if value is not None}


@contextmanager
def _start_errors() -> Iterator[None]:
    from shim.host.errors import StartError

    try:
        yield
    except StartError as exc:
        raise LaunchError(str(exc), exit_code=2) from exc
