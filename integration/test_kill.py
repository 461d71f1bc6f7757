"""kill -9 at every step of backup and provision on a real guest: reconcile leaves nothing, and the source is home."""

from __future__ import annotations

import random
import re
import signal
import time
from typing import Any

import libvirt
import pytest

from integration.installation import Installation
from integration.lab.commands import run as host_run
from integration.lab.guest import LabGuest
from integration.lab.services import start_libvirt, stop_libvirtd

BACKUP_STEPS = (
    "prepare",
    "capture",
    "restore clone",
    "prove fence",
    "resume clone",
    "reach clone",
    "find databases",
    "drain",
    "stop databases",
    "shut down clone",
    "open disks",
    "prove clean",
    "store",
    "discard",
)
# What QEMU allows unless somebody changed it; a dead capture must not leave its own.
MAX_DOWNTIME_MS = 300
PROVISION_STEPS = ("define", "attach", "start")


def _is_step(line: str, step: str) -> bool:
    return re.search(rf"\] {re.escape(step)}\s*$", line) is not None


def _kill_at(vmsnap: Installation, *arguments: str, step: str, delay_s: float) -> None:
    """Start a command and kill -9 it `delay_s` after it said that it begins the step."""
    seen = []
    with vmsnap.start(*arguments) as process:
        assert process.stdout is not None
        for line in process.stdout:
            seen.append(line)
            if _is_step(line, step):
                time.sleep(delay_s)
                process.kill()
                return
    pytest.fail(f"the step {step!r} never began:\n{''.join(seen)}")


def _write(guest: LabGuest, number: int) -> None:
    """Commit a marker, whatever the guest is going through: libvirt refuses agent commands while it stands still."""
    deadline = time.monotonic() + 10 * guest.lab.time_factor
    while True:
        try:
            guest.psql(f"INSERT INTO markers VALUES ({number}) ON CONFLICT DO NOTHING")
        except libvirt.libvirtError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _require_home(guest: LabGuest, *, counter: int) -> None:
    assert guest.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    assert guest.domain.migrateGetMaxDowntime() == MAX_DOWNTIME_MS
    for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
        xml = guest.domain.XMLDesc(flags)
        assert ".source.qcow2" not in xml
        assert all(str(disk.source) in xml for disk in guest.disks)
    assert guest.psql("SELECT max(n) FROM markers") == str(counter), "every acknowledged write is there"


def _reconcile(vmsnap: Installation) -> None:
    outcome = vmsnap.run("reconcile")
    assert outcome.exit_code == 0, outcome.explain()


def _newest_run(vmsnap: Installation, guest: str) -> dict[str, Any]:
    found: dict[str, Any] = vmsnap.ok("history", guest, "--limit", "1")["runs"][0]
    return found


@pytest.mark.parametrize("step", BACKUP_STEPS)
def test_backup_killed_in_a_step(guest: LabGuest, vmsnap: Installation, step: str) -> None:
    vmsnap.policy(guest.name)
    guest.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
    _kill_at(vmsnap, "backup", guest.name, step=step, delay_s=random.uniform(0, 0.4))
    # What the guest writes while it is on an overlay that nobody looks after must not be lost.
    _write(guest, 2)
    before = _newest_run(vmsnap, guest.name)
    _reconcile(vmsnap)
    _require_home(guest, counter=2)
    told = _newest_run(vmsnap, guest.name)
    assert before["outcome"] == told["outcome"]
    assert told["outcome"] == "died" or step in ("store", "discard"), "only then it may have ended before the kill"
    assert step in [one["name"] for one in told["steps"]]
    assert told["ended"] is not None
    # Everything else that a run can leave is found by the leak check.
    assert not list(vmsnap.store.glob("*/.staging-*"))
    for snapshot in vmsnap.ok("list")["snapshots"]:
        assert vmsnap.run("verify", snapshot["snapshot"]).exit_code == 0


@pytest.mark.parametrize("step", PROVISION_STEPS)
def test_provision_killed_in_a_step(guest: LabGuest, vmsnap: Installation, step: str) -> None:
    vmsnap.policy(guest.name)
    vmsnap.ok("backup", guest.name)
    arguments = ("provision", f"{guest.name}@latest", "--name", f"killed-{step}")
    _kill_at(vmsnap, *arguments, step=step, delay_s=random.uniform(0, 0.1))
    _reconcile(vmsnap)
    for environment in vmsnap.ok("env", "list")["environments"]:
        # The kill came after the last step: the environment is whole, and its owner can destroy it.
        assert vmsnap.run("env", "destroy", environment["environment"]).exit_code == 0
    assert not list(vmsnap.store.glob(".environments/*"))
    assert not list(vmsnap.store.glob("*/*/holds/*"))


def test_a_run_whose_state_directory_was_lost_is_adopted_once_it_is_dead(guest: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(guest.name)
    guest.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
    with vmsnap.start("backup", guest.name) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if _is_step(line, "find databases"):
                break
        # Stopped, it is alive, and does not come to its end meanwhile.
        process.send_signal(signal.SIGSTOP)
        vmsnap.state.rename(vmsnap.state.with_name("lost"))
        (unknown,) = vmsnap.ok("reconcile")["unknown"]
        assert {"clone", "fence", "source-overlays"} <= {thing["kind"] for thing in unknown["things"]}
        outcome = vmsnap.run("reconcile", "--adopt", unknown["run"])
        assert outcome.exit_code == 4, outcome.explain()
        assert f"process {process.pid} " in outcome.stderr
        process.kill()
    _write(guest, 2)
    outcome = vmsnap.run("backup", guest.name)
    assert outcome.exit_code == 3, outcome.explain()
    assert "vmsnap reconcile --adopt" in outcome.stderr
    planned = vmsnap.ok("reconcile", "--adopt", unknown["run"], "--dry-run")
    assert planned["undone"] == []
    assert [told["run"] for told in planned["adopted"]] == [unknown["run"]]
    report = vmsnap.ok("reconcile", "--adopt", unknown["run"])
    assert report["complete"] is True
    assert [item["kind"] for item in report["undone"]][:2] == ["clone", "fence"]
    assert vmsnap.ok("reconcile")["unknown"] == []
    _require_home(guest, counter=2)


def test_a_guest_comes_home_by_hand_as_the_guide_says_and_the_rest_is_adopted(
    guest: LabGuest, vmsnap: Installation
) -> None:
    vmsnap.policy(guest.name)
    guest.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
    _kill_at(vmsnap, "backup", guest.name, step="find databases", delay_s=0)
    vmsnap.state.rename(vmsnap.state.with_name("lost"))
    _write(guest, 2)
    (unknown,) = vmsnap.ok("reconcile")["unknown"]
    host_run(["virsh", "destroy", f"vmsnap-clone-{unknown['run']}"])
    for disk in guest.disks:
        host_run(["virsh", "blockcommit", guest.name, disk.target, "--active", "--shallow", "--pivot", "--wait"])
    _require_home(guest, counter=2)
    assert vmsnap.ok("reconcile", "--adopt", unknown["run"])["complete"] is True
    assert vmsnap.ok("reconcile")["unknown"] == []
    _require_home(guest, counter=2)


def test_libvirtd_restarted_in_mid_run_is_harmless(guest: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(guest.name)
    guest.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
    lines = []
    with vmsnap.start("backup", guest.name) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if _is_step(line, "find databases"):
                stop_libvirtd(kill=True)
                start_libvirt()
    guest.wait_for_agent()
    _write(guest, 2)
    _reconcile(vmsnap)
    _require_home(guest, counter=2)
    assert process.returncode in (0, 3, 5, 6, 7, 8), "".join(lines)


def test_clone_killed_in_mid_run_is_reported(guest: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(guest.name)
    guest.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
    snapshots = vmsnap.ok("list", guest.name)["snapshots"]
    with vmsnap.start("backup", guest.name) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if _is_step(line, "shut down clone"):
                for domain in guest.connection.listAllDomains(0):
                    if domain.name().startswith("vmsnap-clone-"):
                        domain.destroy()
    assert process.returncode == 5
    assert vmsnap.ok("list", guest.name)["snapshots"] == snapshots, "nothing was stored"
    _require_home(guest, counter=1)
