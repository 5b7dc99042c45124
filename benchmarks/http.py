"""Measures what a poll costs: GET /status and GET /health beside a bare FastAPI route, in one run: `make bench-http`.

The server runs in its own process as `hunyuan serve` runs it: uvloop, our HTTP server, every middleware. It serves the
bare route on a second port. This process sends the requests over keep-alive connections. The paths take turns, round by
round, so that other load on the machine slows all of them alike. Prints a Markdown table of each path's median round
and writes `benchmarks/results/http-<date>.json`. PostgreSQL runs without fsync here; no request writes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import uvloop
from fastapi import FastAPI

from contract.log_fields import LogOptions, configure
from shim.app import create_app
from shim.http.server import HttpServer
from storage.bucket import Bucket
from tests.support.postgres import running_postgres
from tests.support.queues import JOB, NOWHERE, sql_bench

RESULTS: Final = Path(__file__).parent / "results"
CONNECTIONS: Final = (1, 32, 500)
PATHS: Final = ("bare", "/status", "/health")
#: Seconds before each round is counted.
_WARM_UP: Final = 0.5


@dataclass(frozen=True)
class Load:
    """One round of one path. Latencies in milliseconds. Answers other than 200 are failures and count nowhere else."""

    requests_per_second: float
    p50: float
    p99: float
    failures: int


@dataclass(frozen=True)
class Target:
    """A path to ask."""

    port: int
    path: str


async def _serve(url: str, started: Connection) -> None:
    """Serves the app over a queue with one waiting job, and a bare route."""
    configure(LogOptions())
    async with sql_bench(url, max_queue_size=10) as bench:
        await bench.worker()
        task_id = (await bench.queue.submit(JOB)).task_id
        app = create_app(bench.queue, Bucket(NOWHERE), metrics=bench.metrics)
        bare = FastAPI()

        @bare.get("/bare")
        async def _bare() -> dict[str, str]:
            return {"status": "processing"}

        listeners = [socket.create_server(("127.0.0.1", 0), backlog=2048) for _ in range(2)]
        servers = [HttpServer(each, grace=1) for each in (app, bare)]
        started.send((task_id, *(listener.getsockname()[1] for listener in listeners)))
        await asyncio.gather(
            *(server.serve(sockets=[listener]) for server, listener in zip(servers, listeners, strict=True))
        )


def _process(url: str, started: Connection) -> None:
    uvloop.run(_serve(url, started))


@contextmanager
def served(url: str) -> Iterator[Mapping[str, Target]]:
    """The targets of a server process over the queue at `url`, by the names in `PATHS`."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_process, args=(url, there))
    process.start()
    try:
        if not here.poll(60):
            raise RuntimeError("the server did not start within 60 s")
        task_id, port, bare_port = here.recv()
        yield {
            "bare": Target(bare_port, "/bare"),
            "/status": Target(port, f"/status/{task_id}"),
            "/health": Target(port, "/health"),
        }
    finally:
        process.terminate()
        process.join(10)


_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _connect(target: Target, number: int) -> _Streams:
    """Ten connections share an address of the loopback network: the server limits the connections of one address."""
    address = f"127.0.0.{1 + number // 10}"
    return await asyncio.open_connection("127.0.0.1", target.port, local_addr=(address, 0))


async def _ask(target: Target, streams: _Streams, begin: float, until: float, latencies: list[float]) -> int:
    """Asks over one connection, once at least, until `until`. Records the latencies of the 200s after `begin`.

    Returns the failures.
    """
    reader, writer = streams
    request = f"GET {target.path} HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n\r\n".encode()
    failures, asked = 0, time.perf_counter()
    try:
        while True:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
            answered = time.perf_counter()
            if asked >= begin and head.startswith(b"http/1.1 200"):
                latencies.append(answered - asked)
            elif asked >= begin:
                failures += 1
            if answered >= until:
                return failures
            asked = answered
    finally:
        writer.close()


async def load(target: Target, connections: int, seconds: float, warm_up: float = _WARM_UP) -> Load:
    """Asks `target` over `connections` connections for `warm_up`, which does not count, and `seconds`."""
    latencies: list[float] = []
    opened = await asyncio.gather(*(_connect(target, number) for number in range(connections)))
    begin = time.perf_counter() + warm_up
    end = begin + seconds
    failures = await asyncio.gather(*(_ask(target, streams, begin, end, latencies) for streams in opened))
    ordered = sorted(latencies) or [float("inf")]
    return Load(
        requests_per_second=len(latencies) / seconds,
        p50=statistics.median(ordered) * 1000,
        p99=ordered[int(0.99 * (len(ordered) - 1))] * 1000,
        failures=sum(failures),
    )


def measure(
    url: str, *, seconds: float, rounds: int, connections: Sequence[int] = CONNECTIONS
) -> Mapping[str, Mapping[int, Load]]:
    """The median round of each of `PATHS`, by number of connections."""
    with served(url) as targets:
        measured: Mapping[str, Mapping[int, list[Load]]] = {
            path: {count: [] for count in connections} for path in PATHS
        }
        for count in connections:
            for _ in range(rounds):
                for path in PATHS:
                    measured[path][count].append(uvloop.run(load(targets[path], count, seconds)))
    return {path: {count: _median(loads) for count, loads in counts.items()} for path, counts in measured.items()}


def _median(loads: Sequence[Load]) -> Load:
    ordered = sorted(loads, key=lambda each: each.requests_per_second)
    return ordered[len(ordered) // 2]


def table(figures: Mapping[str, Mapping[str, Mapping[int, Load]]]) -> str:
    """A Markdown table of the figures by database, number of connections and path."""
    rows = [
        "| | connections | path | requests/s | of bare | p50, ms | p99, ms | of bare | failures |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for database, paths in figures.items():
        for count, bare in paths["bare"].items():
            for path in PATHS:
                each = paths[path][count]
                rows.append(
                    f"| {database} | {count} | {path} "
                    f"| {each.requests_per_second:,.0f} | {each.requests_per_second / bare.requests_per_second:.2f} "
                    f"| {each.p50:.2f} | {each.p99:.2f} | {each.p99 / bare.p99:.2f} | {each.failures} |"
                )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both databases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each path; the median one is printed")
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS, help="numbers of connections")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the JSON file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory, running_postgres() as server:
        urls = {"SQLite": f"sqlite:///{directory}/queue.sqlite3", "PostgreSQL": server.create_database()}
        figures = {
            name: measure(url, seconds=options.seconds, rounds=options.rounds, connections=options.connections)
            for name, url in urls.items()
        }
    print(table(figures))
    options.output.mkdir(exist_ok=True)
    written = {
        database: {path: {count: asdict(each) for count, each in loads.items()} for path, loads in paths.items()}
        for database, paths in figures.items()
    }
    path = options.output / f"http-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps({"seconds": options.seconds, "rounds": options.rounds, "figures": written}, indent=2))


if __name__ == "__main__":
    main()
