"""The benchmark of polls measures every path with every number of connections, and its table says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import http


@pytest.mark.full
def test_the_benchmark_compares_polls_with_a_bare_route(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    http.main(["--seconds", "0.2", "--rounds", "1", "--connections", "1", "4", "--output", str(tmp_path)])
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert len({len(row) for row in rows[1:]}) == 1
    assert [tuple(row[:3]) for row in rows[1:]] == [
        (database, connections, path)
        for database in ("SQLite", "PostgreSQL")
        for connections in ("1", "4")
        for path in ("bare", "/status", "/health")
    ]
    (written,) = tmp_path.glob("http-*.json")
    for paths in json.loads(written.read_text())["figures"].values():
        for path in http.PATHS:
            for load in paths[path].values():
                assert load["failures"] == 0
                assert load["requests_per_second"] > 0
                assert 0 < load["p50"] <= load["p99"]
