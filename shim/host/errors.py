"""Why the server or a worker can't start."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from contract.settings import explain


class StartError(Exception):
    """The server or a worker can't start; the message names the setting to change and what it takes."""


@contextmanager
def settings_errors() -> Iterator[None]:
    """Raises StartError for settings that are missing or wrong."""
    try:
        yield
    except ValidationError as exc:
        raise StartError(explain(exc)) from exc
