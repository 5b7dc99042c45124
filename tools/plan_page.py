"""`make plan-page`: the calculated tables of docs/performance.md, from the worker's own memory plan and cost model.

The text around them is written by hand. Each table stands between two comments with its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from handler.video_model.planning import GPUS, Row, rows

PAGE: Final = Path(__file__).parents[1] / "docs" / "performance.md"
#: GPU memory in GB that the API reference promises for a video.
_PROMISED: Final = {("720p", 5): 12.0, ("720p", 10): 14.0, ("1080p", 5): 16.0, ("1080p", 10): 20.0}


def page(current: str) -> str:
    """`current` with each table written anew."""
    for name, table in _TABLES.items():
        block = re.compile(rf"<!-- {name} -->\n.*?<!-- end -->", re.S)
        head, body, tail = block.split(current)[0], "\n".join(table()), block.split(current)[-1]
        current = f"{head}<!-- {name} -->\n{body}\n<!-- end -->{tail}"
    return current


def _memory() -> Iterator[str]:
    """Every video with the GPU memory that the API reference promises for it, from text and from an image."""
    yield "| profile | video | GPU memory | taken | host memory, rounded | on the GPU |"
    yield "|---|---|---|---|---|---|"
    for from_image in (False, True):
        plans = {vram: list(rows(GPUS["H100"], vram=vram, from_image=from_image)) for vram in _PROMISED.values()}
        for index in range(len(plans[12.0])):
            kind = plans[12.0][index]
            vram = _PROMISED[kind.resolution, kind.duration]
            yield _memory_row(plans[vram][index], vram, " from an image" if from_image else "")


def _memory_row(row: Row, vram: float, source: str) -> str:
    tile = f"tiles of {row.tile}" if row.tile else "one tile"
    return (
        f"| {row.profile} | {row.resolution} {row.duration} s{source} | {vram:.0f} GB | {row.vram:.1f} GB{_no(row)} | "
        f"{row.host:.1f} GB, {row.host_rounded:.1f} GB | {row.resident}, {tile} |"
    )


def _no(row: Row) -> str:
    return "" if row.fits else " (does not fit)"


def _seconds() -> Iterator[str]:
    """Every video on every GPU, with the GPU's own memory."""
    yield f"| profile | video | {' | '.join(GPUS)} |"
    yield "|---|---|" + "---|" * len(GPUS)
    for sage, attention in ((False, ""), (True, ", 8-bit attention")):
        for of_one in zip(*(rows(gpu, sage=sage) for gpu in GPUS.values()), strict=True):
            kind = of_one[0]
            seconds = " | ".join(f"{row.seconds:,.0f}{_no(row)}" for row in of_one)
            yield f"| {kind.profile}{attention} | {kind.resolution} {kind.duration} s | {seconds} |"


_TABLES: Final[Mapping[str, Callable[[], Iterator[str]]]] = {"memory plan": _memory, "seconds": _seconds}


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
