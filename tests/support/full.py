"""What `make test` leaves out and `make test-full` runs: a mechanism's other sizes, backends and models."""

from typing import Any

import pytest


def full(*values: Any) -> Any:
    """These parameters of a test, marked `full`."""
    return pytest.param(*values, marks=pytest.mark.full)
