"""Pause against plain virsh, new bytes of a second backup, time to a running test VM, the source's throughput.

Every ratio compares things measured in this one run, on the same guest under the same load, in turn.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console

from integration.bench.plain import plain_capture
from integration.installation import Installation, default_policy
from integration.lab.domain import GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from vmsnap.hypervisors.libvirt.overlays import create_overlay

ROUNDS = 2
GUEST = "bench1"
SETTLE_S = 8
TIB = 1 << 40


def measure(lab: Lab, console: Console) -> dict[str, object]:
    """Return the figures. Takes about eight minutes under software emulation."""
    store = lab.reflink / "bench-store"
    store.mkdir()
    vmsnap = Installation(lab, name="bench", store=store)
    try:
        with LabGuest(lab, GuestSpec(name=GUEST, memory_mib=2048)) as guest:
            figures = _pauses(guest, vmsnap=vmsnap, console=console)
            figures |= _throughput(guest, vmsnap=vmsnap, console=console)
            figures |= _second_backup(guest, vmsnap=vmsnap, console=console)
            figures |= _provision(vmsnap, console=console)
        figures |= _overlay(lab)
        return figures
    finally:
        shutil.rmtree(store)
        shutil.rmtree(vmsnap.folder)


def _policy(lab: Lab, *, cpu_shares: int) -> str:
    text = default_policy(lab, extra="[retention]\nkeep_last = 1\n")
    return text.replace("[clone]\n", f"[clone]\ncpu_shares = {cpu_shares}\n")


def _pauses(guest: LabGuest, *, vmsnap: Installation, console: Console) -> dict[str, object]:
    """The pause of vmsnap and of plain virsh with the memory file on disk, in turn, under pgbench."""
    vmsnap.policy(GUEST, _policy(guest.lab, cpu_shares=64))
    guest.start_pgbench(clients=4)
    ours, plain = [], []
    for number in range(ROUNDS):
        time.sleep(SETTLE_S)
        plain.append(_virsh_pause_ms(guest))
        time.sleep(SETTLE_S)
        ours.append(float(vmsnap.ok("backup", GUEST)["capture"]["pause_ms"]))
        console.print(f"round {number + 1}: virsh {plain[-1]:.0f} ms, vmsnap {ours[-1]:.0f} ms")
    guest.stop_pgbench()
    return {
        "pause_ms": [round(value, 1) for value in ours],
        "pause_ms_virsh": [round(value, 1) for value in plain],
        "pause_ratio_vs_virsh": round(median(ours) / median(plain), 3),
    }


def _virsh_pause_ms(guest: LabGuest) -> float:
    pause = plain_capture(guest).pause
    assert pause is not None
    return (pause.resumed - pause.stopped).total_seconds() * 1000


def _throughput(guest: LabGuest, *, vmsnap: Installation, console: Console) -> dict[str, object]:
    """The source's transactions per second during whole runs against before, with the clone's CPU limited and not."""
    figures: dict[str, object] = {}
    for name, shares in (("tps_during_ratio", 64), ("tps_during_ratio_equal_shares", 1024)):
        vmsnap.policy(GUEST, _policy(guest.lab, cpu_shares=shares))
        guest.start_pgbench(clients=4)
        began = time.monotonic()
        time.sleep(20)
        run_began = time.monotonic() - began
        vmsnap.ok("backup", GUEST)
        run_ended = time.monotonic() - began
        time.sleep(2)
        progress = guest.stop_pgbench()
        before = mean(item.tps for item in progress if 5 < item.at_s < run_began)
        during = mean(item.tps for item in progress if run_began <= item.at_s <= run_ended)
        console.print(f"{shares} CPU shares for the clone: {before:.0f} TPS before, {during:.0f} during")
        figures[name] = round(during / before, 3)
    return figures


def _second_backup(guest: LabGuest, *, vmsnap: Installation, console: Console) -> dict[str, object]:
    """New bytes of a backup after 1 % of the stored data was overwritten, over the bytes of a full one."""
    stored = _stored_bytes(vmsnap)
    changed_mib = max(1, round(stored * 0.01) >> 20)
    guest.run(["dd", "if=/dev/urandom", "of=/var/tmp/changed", "bs=1M", f"count={changed_mib}", "conv=fsync"])
    vmsnap.ok("backup", GUEST)
    guest.run(["dd", "if=/dev/urandom", "of=/var/tmp/changed", "bs=1M", f"count={changed_mib}", "conv=fsync,notrunc"])
    second = vmsnap.ok("backup", GUEST)
    stored = _stored_bytes(vmsnap)
    console.print(f"{changed_mib} MiB of {stored >> 20} MiB changed: {second['store']['new_bytes'] >> 20} MiB new")
    return {
        "second_backup_changed_ratio": round((changed_mib << 20) / stored, 4),
        "second_backup_new_bytes_ratio": round(second["store"]["new_bytes"] / stored, 4),
    }


def _stored_bytes(vmsnap: Installation) -> int:
    manifest: dict[str, Any] = vmsnap.ok("show", f"{GUEST}@latest")["manifest"]
    return sum(int(disk["data_bytes"]) for disk in manifest["disks"])


def _provision(vmsnap: Installation, *, console: Console) -> dict[str, object]:
    running, written = [], []
    for _ in range(ROUNDS):
        made = vmsnap.ok("provision", f"{GUEST}@latest")
        running.append(float(made["running_ms"]))
        written.append(int(made["overlay_bytes"]))
        assert vmsnap.run("env", "destroy", made["environment"]).exit_code == 0
    console.print(f"test VM running after {', '.join(f'{value:.0f}' for value in running)} ms")
    return {"provision_running_ms": round(median(running), 1), "provision_overlay_bytes": max(written)}


def _overlay(lab: Lab) -> dict[str, object]:
    """What an overlay over a disk of 1 TiB occupies."""
    base = lab.reflink / "tib.raw"
    overlay = lab.reflink / "tib.qcow2"
    with base.open("wb") as file:
        file.truncate(TIB)
    began = time.monotonic()
    create_overlay(overlay, base=str(base), base_format="raw", size_bytes=TIB)
    seconds = time.monotonic() - began
    occupied = _occupied(overlay)
    base.unlink()
    overlay.unlink()
    return {"overlay_bytes_1tib": occupied, "overlay_ms_1tib": round(seconds * 1000, 1)}


def _occupied(path: Path) -> int:
    return path.stat().st_blocks * 512
