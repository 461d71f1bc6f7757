"""`make demo`: two backups of a PostgreSQL guest under load, retention, and a test VM from the first snapshot.

Runs inside the lab and leaves nothing. What it shows is checked with eyes that are not vmsnap's: a client outside the
guest knows which commits were acknowledged before the capture, and the test VM's own PostgreSQL log says how it started.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from integration.demo.graph import draw
from integration.installation import Installation, RunningVm, default_policy
from integration.lab.client import LabClient
from integration.lab.domain import GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.lab.leaks import left_behind, look

REPORT = Path("build/demo/report.json")
BEFORE_S = 20
GUEST = "db1"
RECOVERY_SIGNS = ("was interrupted", "not properly shut down", "redo starts", "recovered")


@dataclass
class Facts:
    """What the demonstration found, for its table and its report."""

    steps: list[tuple[str, float]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    spans: list[tuple[float, float]] = field(default_factory=list)


class Demo:
    """One run of the demonstration."""

    def __init__(self, lab: Lab, console: Console) -> None:
        self.lab = lab
        self.console = console
        self.facts = Facts()
        self.began = time.monotonic()
        store = lab.reflink / "demo-store"
        store.mkdir()
        self.vmsnap = Installation(lab, name="demo", store=store)
        self.vmsnap.policy(GUEST, default_policy(lab, extra="[retention]\nkeep_last = 2\n"))

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self.began:6.1f} s[/]  {text}")

    def timed(self, name: str, began: float) -> None:
        self.facts.steps.append((name, time.monotonic() - began))

    def run(self) -> bool:
        began = time.monotonic()
        self.say(f"booting a Debian guest with PostgreSQL 15 ({self.lab.accelerator})")
        with LabGuest(self.lab, GuestSpec(name=GUEST)) as guest:
            self.timed("guest booted", began)
            self.show(guest)
        return self.verdict()

    def show(self, guest: LabGuest) -> None:
        before_definition = guest.domain.XMLDesc()
        guest.start_pgbench(clients=4)
        self.load_began = time.monotonic()
        self.say(f"pgbench runs in the guest; {BEFORE_S} s undisturbed first")
        with LabClient(guest.address()) as client:
            time.sleep(BEFORE_S)
            self.say("a client outside the guest commits a numbered marker every 100 ms")
            first = self.backup("first")
            self.backup("second")
            client.stop()
            progress = guest.stop_pgbench()
            self.graph([(item.at_s, item.tps) for item in progress])
            self.prune()
            self.test_vm(guest, client=client, snapshot=first)
        self.facts.report["source_disk_restored"] = _disks(guest.domain.XMLDesc()) == _disks(before_definition)

    def backup(self, which: str) -> dict[str, Any]:
        began = time.monotonic()
        self.say(f"[bold]vmsnap backup {GUEST}[/] ({which})")
        document: dict[str, Any] = self.vmsnap.ok("backup", GUEST)
        ended = time.monotonic()
        self.facts.spans.append((began - self.load_began, ended - self.load_began))
        self.timed(f"{which} backup", began)
        capture, drain, store = document["capture"], document["drain"], document["store"]
        self.say(
            f"  snapshot {document['snapshot']}: the guest stood still for [bold]{capture['pause_ms']:.0f} ms[/]; "
            f"{drain['in_flight_at_start']} transactions in flight, {drain['finished']} finished, "
            f"{drain['rolled_back']} rolled back; {store['new_bytes'] >> 20} MiB stored; proven clean"
        )
        for step in document["steps"]:
            self.console.print(f"[dim]            {step['name']:<18} {step['seconds']:6.1f} s[/]")
        return document

    def graph(self, progress: list[tuple[float, float]]) -> None:
        values = [tps for _, tps in progress]
        spans = [(int(begin), int(end)) for begin, end in self.facts.spans]
        inside = [tps for at, tps in progress if any(begin <= at <= end for begin, end in self.facts.spans)]
        before = [tps for at, tps in progress if at < self.facts.spans[0][0]]
        self.facts.report["tps_before"] = round(mean(before), 1)
        self.facts.report["tps_during"] = round(mean(inside), 1)
        graph = draw(values, spans=spans, seconds=progress[-1][0])
        self.console.print(Panel(graph, title="pgbench in the source guest; yellow: a backup runs", expand=False))

    def prune(self) -> None:
        began = time.monotonic()
        decisions = self.vmsnap.run("prune", GUEST)
        assert decisions.exit_code == 0, decisions.explain()
        self.console.print(decisions.stdout.rstrip())
        self.timed("prune", began)

    def test_vm(self, guest: LabGuest, *, client: LabClient, snapshot: dict[str, Any]) -> None:
        began = time.monotonic()
        self.say(f"[bold]vmsnap provision {snapshot['snapshot']} --wait[/] (the first snapshot)")
        made = self.vmsnap.ok("provision", snapshot["snapshot"], "--name", "demo-test", "--wait")
        self.say(f"  running after {made['running_ms']:.0f} ms, its overlay is {made['overlay_bytes'] >> 10} KiB")
        self.timed("test VM answers", began)
        vm = RunningVm(guest, name=made["environment"])
        vm.wait_for_postgresql()
        found = {int(line) for line in vm.psql("SELECT n FROM markers ORDER BY n").splitlines()}
        recovered = [line for line in _last_start(vm) if any(sign in line for sign in RECOVERY_SIGNS)]
        stopped = datetime.fromisoformat(snapshot["capture"]["captured"])
        resumed = stopped + timedelta(milliseconds=snapshot["capture"]["pause_ms"])
        expected = {m.number for m in client.markers if m.acknowledged_at is not None and m.acknowledged_at < stopped}
        impossible = {m.number for m in client.markers if m.began_at > resumed}
        self.say(
            f"  markers acknowledged before the capture: {len(expected)}, of them in the test VM: "
            f"{len(expected & found)}; begun after it: {len(impossible)}, in the test VM: {len(impossible & found)}"
        )
        self.say(
            f"  PostgreSQL in the test VM {'recovered: ' + recovered[0] if recovered else 'started without recovery'}"
        )
        self.facts.report.update(
            pause_ms=snapshot["capture"]["pause_ms"],
            provision_running_ms=made["running_ms"],
            overlay_bytes=made["overlay_bytes"],
            markers_expected=len(expected),
            markers_found=len(expected & found),
            markers_impossible_found=len(impossible & found),
            recovery_needed=bool(recovered),
        )
        began = time.monotonic()
        destroyed = self.vmsnap.run("env", "destroy", made["environment"])
        assert destroyed.exit_code == 0, destroyed.explain()
        self.timed("test VM destroyed", began)

    def verdict(self) -> bool:
        report = self.facts.report
        report["total_seconds"] = round(time.monotonic() - self.began, 1)
        return (
            report["markers_found"] == report["markers_expected"] > 0
            and report["markers_impossible_found"] == 0
            and not report["recovery_needed"]
            and report["source_disk_restored"]
        )


def _disks(xml: str) -> list[str]:
    return [line.strip() for line in xml.splitlines() if "<source file=" in line]


def _last_start(vm: LabGuest) -> list[str]:
    """The lines of PostgreSQL's log since its last start."""
    lines = vm.run(["sh", "-c", "cat /var/log/postgresql/postgresql-15-main.log"]).splitlines()
    starts = [index for index, line in enumerate(lines) if "starting PostgreSQL" in line]
    return lines[starts[-1] :] if starts else lines


def main() -> int:
    console = Console(width=max(110, Console().width)) if not sys.stdout.isatty() else Console()
    lab = Lab.current()
    before = look(lab)
    demo = Demo(lab, console)
    good = demo.run()
    shutil.rmtree(demo.vmsnap.store)
    shutil.rmtree(demo.vmsnap.folder)
    shutil.rmtree(demo.vmsnap.runtime, ignore_errors=True)
    leftovers, _ = left_behind(lab, before)
    demo.facts.report["leftovers"] = leftovers
    table = Table(title="What happened", title_justify="left")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    for name, seconds in demo.facts.steps:
        table.add_row(name, f"{seconds:.1f}")
    console.print(table)
    facts = Table(title="What was found", title_justify="left")
    facts.add_column("fact")
    facts.add_column("value", justify="right")
    for name, value in demo.facts.report.items():
        facts.add_row(name, str(value))
    console.print(facts)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(demo.facts.report, indent=2) + "\n", encoding="utf-8")
    good = good and not leftovers
    console.print("[bold green]All as promised.[/]" if good else "[bold red]Not as promised: see above.[/]")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
