"""The dashboard and the alert rules that are shipped speak of metrics that there are, and of all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from vmsnap.model.alarms import Ledger
from vmsnap.model.facts import Facts
from vmsnap.monitoring.metrics import Metric, metrics_of

FOLDER = Path(__file__).parents[2] / "monitoring"
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in metrics_of(Facts(at=datetime(2026, 11, 21, tzinfo=UTC), guests=()), ledger=Ledger())
}
NAME = re.compile(r"\bvmsnap_[a-z_]+")
SELECTOR = re.compile(r"(vmsnap_[a-z_]+)\{([^}]*)\}")
MATCHER = re.compile(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"')
SCRAPED = frozenset({"instance", "job"})
"""Labels that Prometheus adds to what it scrapes."""


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "grafana.json").read_text(encoding="utf-8"))
    return found


def expressions() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]


def rules() -> list[str]:
    text = (FOLDER / "vmsnap-alerts.yml").read_text(encoding="utf-8")
    return re.findall(r"^\s+expr: (.+)$", text, re.MULTILINE)


@pytest.mark.parametrize(("where", "expression"), [*expressions(), *(("alert", rule) for rule in rules())])
def test_an_expression_is_about_metrics_and_labels_that_there_are(where: str, expression: str) -> None:
    named = NAME.findall(expression)
    assert named, where
    assert set(named) <= set(METRICS)
    for name, matchers in SELECTOR.findall(expression):
        assert set(MATCHER.findall(matchers)) <= {*METRICS[name].label_names, *SCRAPED}, where
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        known = {label for name in named for label in METRICS[name].label_names} | SCRAPED
        assert {label.strip() for label in labels.split(",")} <= known, where


def test_legends_are_of_labels_that_there_are() -> None:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            known = {label for name in NAME.findall(target["expr"]) for label in METRICS[name].label_names} | SCRAPED
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known, panel["title"]


def test_everything_that_is_measured_is_shown_or_watched() -> None:
    used = {name for _, expression in expressions() for name in NAME.findall(expression)}
    used |= {name for rule in rules() for name in NAME.findall(rule)}
    # For queries of one's own: the dashboard shows what follows from them.
    spare = {"vmsnap_alarms", "vmsnap_guest_overdue", "vmsnap_guest_enabled"}
    assert set(METRICS) - used == spare


def test_the_choice_of_guests_is_of_a_metric_that_there_is() -> None:
    (choice,) = (item for item in dashboard()["templating"]["list"] if item["name"] == "guest")
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", choice["definition"]).groups()  # type: ignore[union-attr]
    assert label in METRICS[name].label_names


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_metric_is_described_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert set(NAME.findall(text)) >= set(METRICS)
