"""kill -9 at every step of backup and provision on a real guest: reconcile leaves nothing, and the source is home."""

from __future__ import annotations

import random
import re
import subprocess
import threading
import time
from collections.abc import Iterator

import libvirt
import pytest

from integration.installation import Installation
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.lab.leaks import left_behind, look
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
PROVISION_STEPS = ("define", "attach", "start")


@pytest.fixture(scope="module")
def vmsnap(lab: Lab) -> Iterator[Installation]:
    store = lab.reflink / "kill-store"
    store.mkdir()
    installation = Installation(lab, name="kill", store=store)
    yield installation
    for folder in (installation.folder, installation.runtime, store):
        subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)


def _is_step(line: str, step: str) -> bool:
    return re.search(rf"\] {re.escape(step)}\s*$", line) is not None


def _kill_at(process: subprocess.Popen[str], *, step: str, delay_s: float) -> bool:
    """Kill -9 the process `delay_s` after it said that it begins the step. Returns whether it was still alive."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if _is_step(line, step):
            time.sleep(delay_s)
            alive = process.poll() is None
            process.kill()
            process.communicate()
            return alive
    process.wait()
    pytest.fail(f"the step {step!r} never began:\n{''.join(seen)}")


def _require_home(guest: LabGuest, *, counter: int) -> None:
    assert guest.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
        xml = guest.domain.XMLDesc(flags)
        assert ".source.qcow2" not in xml
        assert all(str(disk.source) in xml for disk in guest.disks)
    assert guest.psql("SELECT max(n) FROM markers") == str(counter), "every acknowledged write is there"


def _reconcile(vmsnap: Installation) -> None:
    outcome = vmsnap.run("reconcile")
    assert outcome.exit_code == 0, outcome.explain()


@pytest.mark.parametrize("step", BACKUP_STEPS)
def test_backup_killed_in_a_step(guest: LabGuest, vmsnap: Installation, step: str) -> None:
    vmsnap.policy(guest.name)
    guest.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
    before = look(guest.lab)
    process = vmsnap.start("backup", guest.name)
    _kill_at(process, step=step, delay_s=random.uniform(0, 0.4))
    # What the guest writes while it is on an overlay that nobody looks after must not be lost.
    guest.psql("INSERT INTO markers VALUES (2)")
    _reconcile(vmsnap)
    _require_home(guest, counter=2)
    new, _gone = left_behind(guest.lab, before)
    assert [thing for thing in new if str(vmsnap.store) not in thing and str(vmsnap.folder) not in thing] == []
    assert not list(vmsnap.store.glob("*/.staging-*"))


@pytest.mark.parametrize("step", PROVISION_STEPS)
def test_provision_killed_in_a_step(guest: LabGuest, vmsnap: Installation, step: str) -> None:
    vmsnap.policy(guest.name)
    if not vmsnap.ok("list", guest.name)["snapshots"]:
        vmsnap.ok("backup", guest.name)
    before = look(guest.lab)
    process = vmsnap.start("provision", f"{guest.name}@latest", "--name", f"killed-{step}")
    _kill_at(process, step=step, delay_s=random.uniform(0, 0.1))
    _reconcile(vmsnap)
    for environment in vmsnap.ok("env", "list")["environments"]:
        # The kill came after the last step: the environment is whole, and its owner can destroy it.
        assert vmsnap.run("env", "destroy", environment["environment"]).exit_code == 0
    new, _gone = left_behind(guest.lab, before)
    assert [thing for thing in new if str(vmsnap.store) not in thing and str(vmsnap.folder) not in thing] == []


def test_libvirtd_restarted_in_mid_run_is_harmless(guest: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(guest.name)
    guest.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
    process = vmsnap.start("backup", guest.name)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if _is_step(line, "find databases"):
            stop_libvirtd(kill=True)
            guest_writes = threading.Thread(target=start_libvirt)
            guest_writes.start()
            guest_writes.join()
    process.wait()
    guest.wait_for_agent()
    guest.psql("INSERT INTO markers VALUES (2)")
    _reconcile(vmsnap)
    _require_home(guest, counter=2)
    assert process.returncode in (0, 3, 5, 6, 7, 8), "".join(lines)


def test_clone_killed_in_mid_run_is_reported(guest: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(guest.name)
    guest.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
    snapshots = vmsnap.ok("list", guest.name)["snapshots"]
    process = vmsnap.start("backup", guest.name)
    assert process.stdout is not None
    for line in process.stdout:
        if _is_step(line, "shut down clone"):
            for domain in guest.connection.listAllDomains(0):
                if domain.name().startswith("vmsnap-clone-"):
                    domain.destroy()
    process.wait()
    assert process.returncode == 5
    assert vmsnap.ok("list", guest.name)["snapshots"] == snapshots, "nothing was stored"
    _require_home(guest, counter=1)
