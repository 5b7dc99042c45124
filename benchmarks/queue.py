"""Measures the job queue's calls with an empty table and with a long history: `make bench-queue`.

The two databases take turns, job by job, so that other load on the machine slows both alike. Prints a Markdown table
and writes `benchmarks/results/queue-<date>.json`. PostgreSQL runs without fsync here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from shim.queue.job import JobStatus
from tests.support.postgres import running_postgres
from tests.support.queues import JOB, Bench, add_history, result, sql_bench

RESULTS: Final = Path(__file__).parent / "results"
CALLS: Final = ("submit", "status", "list", "take", "complete")
#: More cycles than tasks of a page, so that both databases list full pages.
_WARM_UP: Final = 20
_PAGE: Final = 10

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """The median seconds of one call, without history and with it."""

    empty: float
    full: float

    @property
    def ratio(self) -> float:
        """The cost with history, as a multiple of the cost without."""
        return self.full / self.empty


async def measure(empty_url: str, full_url: str, *, history: int, cycles: int) -> Mapping[str, Cost]:
    """Measures each of `CALLS` in two new databases. In the second one `history` jobs have ended."""
    async with AsyncExitStack() as stack:
        benches = [await stack.enter_async_context(sql_bench(url, max_queue_size=10)) for url in (empty_url, full_url)]
        await add_history(benches[1].database, history)
        seconds: list[Mapping[str, list[float]]] = [{call: [] for call in CALLS} for _ in benches]
        for bench in benches:
            await bench.worker()
        for _ in range(_WARM_UP + cycles):
            for bench, into in zip(benches, seconds, strict=True):
                await _cycle(bench, into)
    medians = [{call: statistics.median(taken[_WARM_UP:]) for call, taken in into.items()} for into in seconds]
    return {call: Cost(medians[0][call], medians[1][call]) for call in CALLS}


async def _cycle(bench: Bench, into: Mapping[str, list[float]]) -> None:
    task_id = (await _timed(into["submit"], lambda: bench.queue.submit(JOB))).task_id
    await _timed(into["status"], lambda: bench.queue.get(task_id))
    await _timed(into["list"], lambda: bench.queue.list_jobs("", status=JobStatus.COMPLETED, limit=_PAGE))
    await _timed(into["take"], lambda: bench.dispatcher.take("w1"))
    output = result(task_id).model_dump(mode="json")
    await _timed(into["complete"], lambda: bench.dispatcher.complete("w1", task_id, output))


async def _timed(into: list[float], call: Callable[[], Awaitable[T]]) -> T:
    started = time.perf_counter()
    answer = await call()
    into.append(time.perf_counter() - started)
    return answer


def table(costs: Mapping[str, Mapping[str, Cost]], history: int) -> str:
    """A Markdown table of the costs by database and call."""
    rows = [f"| | call | empty, ms | {history:,} ended, ms | ratio |", "|---|---|---|---|---|"]
    for database, calls in costs.items():
        rows += [
            f"| {database} | {call} | {cost.empty * 1000:.2f} | {cost.full * 1000:.2f} | {cost.ratio:.2f} |"
            for call, cost in calls.items()
        ]
    return "\n".join(rows)


async def _both(history: int, cycles: int) -> Mapping[str, Mapping[str, Cost]]:
    with tempfile.TemporaryDirectory() as directory, running_postgres(in_memory=False) as server:
        files = [f"sqlite:///{directory}/{name}.sqlite3" for name in ("empty", "full")]
        return {
            "SQLite": await measure(*files, history=history, cycles=cycles),
            "PostgreSQL": await measure(
                server.create_database(), server.create_database(), history=history, cycles=cycles
            ),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both databases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history", type=int, default=1_000_000, help="jobs that have ended")
    parser.add_argument("--cycles", type=int, default=500, help="jobs from submit to complete, in each table")
    options = parser.parse_args(arguments)
    costs = asyncio.run(_both(options.history, options.cycles))
    print(table(costs, options.history))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"queue-{datetime.now(UTC):%Y-%m-%d}.json"
    figures = {
        database: {call: {"empty": cost.empty, "full": cost.full, "ratio": cost.ratio} for call, cost in calls.items()}
        for database, calls in costs.items()
    }
    path.write_text(json.dumps({"history": options.history, "cycles": options.cycles, "seconds": figures}, indent=2))


if __name__ == "__main__":
    main()
