"""A wall clock that a test moves: `python -m tests.support.stepped_clock FILE serve` runs `hunyuan serve` with it.

`time.time()` of the process is the machine's clock plus the seconds in FILE, which the test writes while the process
runs. The machine's own clock, `time.monotonic()` and the signatures of S3 requests stay as they are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path


def follow(path: Path, *, monotonic: bool = False) -> None:
    """From now on `time.time()` of this process adds the seconds in `path`; 0 if there is no such file.

    With `monotonic` also `time.monotonic()`, as in a process that was restored on another machine.
    """

    def stepped(real: Callable[[], float]) -> Callable[[], float]:
        def clock() -> float:
            try:
                return real() + float(path.read_text() or 0)
            except FileNotFoundError:
                return real()

        return clock

    time.time = stepped(time.time)
    if monotonic:
        time.monotonic = stepped(time.monotonic)


if __name__ == "__main__":
    follow(Path(sys.argv.pop(1)))
    from hunyuan.cli.main import main

    main()
