"""Alert rules, dashboard and runbook agree with each other and with what a server exports and logs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from contract.errors import ErrorCode
from contract.worker import Gpu
from storage.errors import StorageUnavailableError
from tests.support.prometheus import Scrape, scrape
from tests.support.queues import platform_bench, result

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "infra" / "monitoring"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
QUERIES = [rule["expr"] for rule in RULES] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
]


@pytest.fixture
async def exported(tmp_path: Path) -> Scrape:
    """The metrics of a server in which every kind of event has happened."""
    async with (
        platform_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench,
        httpx.AsyncClient(base_url=bench.address, timeout=30) as http,
    ):
        gpu = Gpu(name="H100", memory_total=80, memory_free=70)
        await bench.worker(gpu=gpu, load_seconds={"total": 30.0})
        await http.post("/generate", json=result("x").input.wire())
        task_id = await bench.take()
        timings = {"total": 30.0, "denoising": 25.0, "storing": 5.0}
        output = result(task_id).model_copy(update={"timings": timings})
        await bench.dispatcher.complete("w1", task_id, output.model_dump(mode="json"))
        bench.metrics.supervise("worker 0")()
        with pytest.raises(StorageUnavailableError), bench.metrics.s3_request("get_object"):
            raise StorageUnavailableError("away")
        return await scrape(http)


def selectors(query: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields each metric of a query with the labels that it must equal."""
    for name, matchers in re.findall(r"\b((?:hunyuan|process)_\w+)(\{[^}]*\})?", query):
        yield name, dict(re.findall(r'(\w+)="([^"]*)"', matchers))


async def test_every_metric_of_a_query_is_exported_with_its_labels(exported: Scrape) -> None:
    for query in QUERIES:
        named = list(selectors(query))
        assert named, query
        for name, labels in named:
            samples = exported.samples.get(name, [])
            assert any(labels.items() <= found.items() for found, _ in samples), (query, name, labels)
        known = {label for name, _ in named for found, _ in exported.samples[name] for label in found}
        for grouping in re.findall(r"\b(?:by|on|group_left) \(([^)]*)\)", query):
            assert set(grouping.split(", ")) <= known | {"instance"}, query


async def test_every_metric_of_the_runbook_is_exported(exported: Scrape) -> None:
    named = set(re.findall(r"hunyuan_\w+", RUNBOOK))
    assert len(named) >= 12
    assert named <= exported.samples.keys() | exported.families.keys()


async def test_every_metric_of_ours_is_shown_or_alerted_on(exported: Scrape) -> None:
    queries = " ".join(QUERIES)
    ours = {name for name in exported.families if name.startswith("hunyuan_")}
    assert {name for name in ours if name not in queries} == set()


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    sections = set(re.findall(r"^## (Hunyuan\w+)$", RUNBOOK, re.M))
    assert sections == {rule["alert"] for rule in RULES}
    for section in RUNBOOK.split("\n## Hunyuan")[1:]:
        assert all(f"**{word}**" in section for word in ("Means", "See", "Do")), section


def test_every_rule_is_complete() -> None:
    for rule in RULES:
        assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}, rule
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]


def test_every_log_line_of_the_runbook_is_logged_by_the_code() -> None:
    code = "".join(
        path.read_text() for package in ("contract", "handler", "shim") for path in (ROOT / package).rglob("*.py")
    )
    quoted = re.findall(r"Log:\s+`([^`]+)`", RUNBOOK)
    assert len(quoted) >= 12
    assert [line for line in quoted if line not in code] == []


def test_every_error_code_of_a_failed_task_that_a_rule_names_exists() -> None:
    codes = re.findall(r'error_code="(\w+)"', " ".join(QUERIES))
    assert len(codes) == 3
    assert set(codes) <= {code.value for code in ErrorCode}


def test_the_dashboard_is_valid_for_grafana() -> None:
    """Ids and positions of panels are unique, and each panel uses the data source that the reader picks."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    (variable,) = DASHBOARD["templating"]["list"]
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_links_to_the_monitoring_files_exist() -> None:
    for target in re.findall(r"\]\((\.\./[^)]+)\)", RUNBOOK):
        assert (ROOT / "docs" / target).exists(), target
