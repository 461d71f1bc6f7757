"""vmsnap's metrics, alert rules and dashboard as Prometheus itself reads them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.unit.test_monitoring_metrics import DB, FACTS, LEDGER
from tests.unit.test_monitoring_shipped import FOLDER, expressions, rules
from vmsnap.model.alarms import Breach, Ledger
from vmsnap.model.facts import Facts
from vmsnap.model.freshness import Expected
from vmsnap.monitoring.exposition import Endpoint, Shelf, text_of
from vmsnap.monitoring.metrics import metrics_of

HOUR = timedelta(hours=1)
PROMTOOL = "promtool"


def promtool(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([PROMTOOL, *arguments], input=stdin, capture_output=True, timeout=60, check=False)


def test_promtool_finds_nothing_to_criticise_in_the_metrics() -> None:
    checked = promtool("check", "metrics", stdin=text_of(metrics_of(FACTS, ledger=LEDGER)))
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_the_alert_rules_are_right_and_fire_when_they_must() -> None:
    checked = promtool("check", "rules", str(FOLDER / "vmsnap-alerts.yml"))
    assert checked.returncode == 0, checked.stderr
    assert f"{len(rules())} rules found".encode() in checked.stdout
    tested = promtool("test", "rules", str(FOLDER / "vmsnap-alerts-test.yml"))
    assert tested.returncode == 0, tested.stdout + tested.stderr


class Prometheus:
    """A Prometheus server that scrapes one endpoint each second."""

    def __init__(self, folder: Path, *, target: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        config = folder / "prometheus.yml"
        shutil.copy(FOLDER / "vmsnap-alerts.yml", folder)
        config.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": ["vmsnap-alerts.yml"],
                    "scrape_configs": [
                        {"job_name": "vmsnap", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
                    ],
                }
            ),
            encoding="utf-8",
        )
        self.log = folder / "prometheus.log"
        self.command = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urlencode(parameters)}"
        with urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def wait(self, true: Callable[[], bool], *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if true():
                    return
            except OSError:
                pass  # it is not up yet
            assert time.monotonic() < deadline, self.log.read_text(encoding="utf-8")[-2000:]
            time.sleep(0.2)


@contextmanager
def scraping(folder: Path, *, target: int) -> Iterator[Prometheus]:
    prometheus = Prometheus(folder, target=target)
    with (
        prometheus.log.open("wb") as log,
        subprocess.Popen(prometheus.command, stdout=log, stderr=log) as process,
    ):
        try:
            yield prometheus
        finally:
            process.terminate()
            process.wait(30)


def present(now: datetime) -> tuple[Facts, Ledger]:
    """Return facts of now in which everything is known of a guest, and much of it is wrong."""
    late = Expected(start=now - 3 * HOUR, deadline=now - 2 * HOUR, closes=now - HOUR)
    facts = replace(FACTS, at=now, guests=(replace(DB, expected=late, verified=now - HOUR),))
    return facts, replace(LEDGER, breaches={"db": Breach(at=now - HOUR, text="a frame")}, message=now - HOUR)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    shelf = Shelf()
    facts, ledger = present(datetime.now(UTC))
    shelf.put(metrics_of(facts, ledger=ledger))
    endpoint = Endpoint(IPv4Address("127.0.0.1"), port=0, shelf=shelf)
    try:
        with scraping(tmp_path_factory.mktemp("prometheus"), target=endpoint.port) as server:
            server.wait(lambda: bool(server.query("vmsnap_build_info")))
            yield server
    finally:
        endpoint.close()


def test_prometheus_takes_every_metric(prometheus: Prometheus) -> None:
    (up,) = prometheus.query('up{job="vmsnap"}')
    assert up["value"][1] == "1"
    known = {item["metric"]["__name__"] for item in prometheus.query('{__name__=~"vmsnap_.+"}')}
    facts, ledger = present(datetime.now(UTC))
    assert known == {metric.name for metric in metrics_of(facts, ledger=ledger) if metric.samples}
    said = prometheus.ask("targets/metadata", metric="vmsnap_guest_overdue")
    assert said[0]["type"] == "gauge"


@pytest.mark.parametrize(("panel", "expression"), [*expressions()], ids=lambda value: value.split("{")[0][:40])
def test_every_panel_of_the_dashboard_shows_something(prometheus: Prometheus, panel: str, expression: str) -> None:
    found = prometheus.query(expression.replace("$guest", ".*"))
    assert found, panel


def test_the_panels_at_the_top_count_what_is_wrong(prometheus: Prometheus) -> None:
    first = dict(list(expressions())[:6])
    shown = {name: float(prometheus.query(text.replace("$guest", ".*"))[0]["value"][1]) for name, text in first.items()}
    assert shown == dict.fromkeys(first, 1)


def test_alerts_fire_for_what_is_wrong_and_for_nothing_else(prometheus: Prometheus) -> None:
    expected = {
        "VmsnapNoFreshBackup",
        "VmsnapMissedWindow",
        "VmsnapBackupFails",
        "VmsnapIsolationBreach",
        "VmsnapDamagedSnapshots",
        "VmsnapLittleRoomForOverlays",
    }

    def firing() -> set[str]:
        return {item["labels"]["alertname"] for item in prometheus.ask("alerts")["alerts"] if item["state"] == "firing"}

    prometheus.wait(lambda: firing() == expected)
    groups = prometheus.ask("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    (alert,) = (
        item for item in prometheus.ask("alerts")["alerts"] if item["labels"]["alertname"] == "VmsnapNoFreshBackup"
    )
    assert alert["annotations"]["summary"] == "db has no backup as fresh as its policy asks"
