"""A real guest whose memory cannot be cloned: its disks are taken alone, its clone boots, recovers, and stops in order."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace

import pytest

from integration.demo.__main__ import RECOVERY_SIGNS, _last_start
from integration.installation import Installation, RunningVm, default_policy
from integration.lab.client import LabClient
from integration.lab.domain import DiskSpec, GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.libvirt_runs import PATIENT
from integration.markers import require_instant
from integration.test_libvirt_contract import LibvirtHarness
from vmsnap.model.capture import CaptureChoice
from vmsnap.testing.hypervisor_contract import BootingContract, HypervisorHarness

# Two of the things that keep a guest from being cloned with its memory; nothing in it depends on them.
PASSED_THROUGH = (
    "<shmem name='lab-shared'><model type='ivshmem-plain'/><size unit='M'>4</size></shmem>",
    "<filesystem type='mount' accessmode='mapped'><source dir='/usr/share/doc'/><target dir='doc'/><readonly/></filesystem>",
)


@pytest.fixture(scope="module")
def tied(lab: Lab) -> Iterator[LabGuest]:
    """A guest with shared memory and a shared folder of the host."""
    disks = (DiskSpec(folder=lab.reflink),)
    spec = GuestSpec(name=f"tied-{secrets.token_hex(3)}", memory_mib=512, disks=disks, extra_devices=PASSED_THROUGH)
    with LabGuest(lab, spec) as guest:
        yield guest


class TestLibvirtTakesDisksAlone(BootingContract):
    @pytest.fixture
    def harness(self, lab: Lab, tied: LabGuest) -> Iterator[HypervisorHarness]:
        harness = LibvirtHarness(lab, tied)
        # Booting is work: on a busy host of tests the weight of a clone is not enough for it.
        harness.settings = replace(PATIENT, mode=CaptureChoice.BOOT, allow_emulation=False, cpu_shares=1024)
        yield harness
        harness.close()


def policy_boot(lab: Lab) -> str:
    lines = default_policy(lab).replace("allow_emulation = true\n", 'mode = "boot"\ndetach = "reflink"\n')
    return lines.replace("[clone]\n", "[clone]\ncpu_shares = 1024\nboot_memory_mib = 384\n").replace(
        'boot_deadline = "', 'recovery_deadline = "5m"\nboot_deadline = "9'
    )


def test_a_guest_that_cannot_be_cloned_is_backed_up_under_load(tied: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(tied.name)
    refused = vmsnap.run("doctor", tied.name)
    assert refused.exit_code == 3, refused.explain()
    assert "shared memory" in refused.stdout
    vmsnap.policy(tied.name, policy_boot(tied.lab))
    (finding,) = (item for item in vmsnap.ok("doctor", tied.name)["findings"] if "will be without" in item["message"])
    assert finding["severity"] == "warning"
    tied.start_pgbench(clients=2)
    try:
        with LabClient(tied.address()) as client:
            client.wait_for_more(5)
            report = vmsnap.ok("backup", tied.name)
            client.wait_for_more(5)
    finally:
        tied.stop_pgbench()
    capture = report["capture"]
    print({step["name"]: step["seconds"] for step in report["steps"]}, capture)
    assert (capture["mode"], capture["memory_captured"], capture["ram_bytes"]) == ("boot", False, 0)
    assert capture["on_overlay_seconds"] < 2
    proof = {point["name"]: point["observed"] for point in report["isolation"]["proof"]}
    assert "its own; the original's is" in proof["boot id"]
    assert {item["method"] for item in report["clean"]["evidence"]["instances"]} == {"in-guest", "disk"}
    shown = vmsnap.run("show", report["snapshot"])
    assert "memory captured" in shown.stdout

    made = vmsnap.ok("provision", report["snapshot"], "--wait")
    vm = RunningVm(tied, name=made["environment"])
    vm.wait_for_postgresql()
    require_instant(client, vm, capture)
    assert not [line for line in _last_start(vm) if any(sign in line for sign in RECOVERY_SIGNS)]
    log = vm.run(["sh", "-c", "cat /var/log/postgresql/postgresql-15-main.log"])
    assert "was interrupted" in log, "the clone recovered, as after a power cut"
    assert vmsnap.run("env", "destroy", made["environment"]).exit_code == 0
