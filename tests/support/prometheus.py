"""Reads /metrics as a Prometheus server does."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families


class Scrape:
    """One parsed response of /metrics."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.families: Mapping[str, str] = {family.name: family.type for family in families}
        self.samples: Mapping[str, list[tuple[Mapping[str, str], float]]] = {}
        for family in families:
            for sample in family.samples:
                self.samples.setdefault(sample.name, []).append((sample.labels, sample.value))

    def value(self, name: str, **labels: str) -> float:
        """The one sample that has these labels and no others."""
        (value,) = [value for found, value in self.samples[name] if found == labels]
        return value

    def labels(self, name: str, label: str) -> set[str]:
        """Every value of one label."""
        return {found[label] for found, _ in self.samples.get(name, ())}


async def scrape(http: httpx.AsyncClient) -> Scrape:
    response = await http.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain")
    return Scrape(response.text)
