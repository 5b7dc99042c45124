"""A wall clock that a test moves: `python -m tests.support.stepped_clock FILE serve` runs `hunyuan serve` with it.

`time.time()` of the process is the machine's clock plus the seconds in FILE, which the test writes while the process
runs. The machine's own clock, `time.monotonic()` and the signatures of S3 requests stay as they are.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path


def follow(path: Path) -> None:
    """From now on `time.time()` of this process adds the seconds in `path`; 0 if there is no such file."""
    real = time.time

    def stepped() -> float:
        try:
            return real() + float(path.read_text() or 0)
        except FileNotFoundError:
            return real()

    time.time = stepped


if __name__ == "__main__":
    follow(Path(sys.argv.pop(1)))
    from hunyuan.cli.main import main

    main()
