"""A real guest that goes off while it is on an overlay, and comes back on its own disk."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace

import libvirt
import pytest

from integration.lab import host_settings
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.lab.leaks import look
from integration.libvirt_runs import DEADLINE, INSTANT, Cancel, definitions, new_driver, run_of, wait_until, write_file
from integration.test_libvirt_instant import relays, streams
from vmsnap.errors import DriverError, VmsnapError
from vmsnap.hypervisors.libvirt.monitor import Monitor

MEANWHILE = "/var/tmp/meanwhile"
_SLOW_BYTES_PER_SECOND = 16 << 20


@pytest.fixture(autouse=True)
def _test_leaves_nothing(lab: Lab, guest: LabGuest) -> Iterator[None]:
    """As for all tests, but for the guest's tap, which has another name after each start."""

    def things() -> set[str]:
        return {thing for thing in look(lab).things if not thing.startswith("link: vnet")}

    before = things()
    yield
    wait_until(lambda: things() == before, "the end of what the test made", limit_s=10)


def test_a_guest_saved_on_its_overlay_keeps_it_until_it_was_started(lab: Lab, guest: LabGuest) -> None:
    with run_of(lab, guest) as run:
        run.prepare()
        run.capture()
        overlays = run.overlay_files()
        guest.domain.managedSave()
        try:
            with pytest.raises(DriverError, match="was saved") as caught:
                run.driver.release(run.driver.overlays_resource(run.plan), deadline=DEADLINE)
            assert caught.value.remedy == f"virsh start {guest.name}; then run 'vmsnap reconcile'"
            assert run.overlay_files() == overlays
        finally:
            guest.start()
        run.release()
        assert guest.run(["echo", "alive"]) == "alive\n"


def test_a_guest_that_is_off_is_merged_and_boots_from_its_own_disk(lab: Lab, guest: LabGuest) -> None:
    persistent = definitions(guest)[1]
    with run_of(lab, guest) as run:
        run.prepare()
        run.capture()
        write_file(guest, MEANWHILE, "written before the power went off")
        guest.domain.destroy()
        assert str(run.overlay_files()[0]) in guest.domain.XMLDesc()
        run.release(driver=new_driver(lab))
        assert run.overlay_files() == []
        assert definitions(guest)[1] == persistent
        checked = subprocess.run(
            ["qemu-img", "check", guest.disks[0].file], capture_output=True, timeout=60, check=False
        )
        assert checked.returncode in (0, 3), checked.stdout  # 3: unused clusters, which a killed QEMU leaves
        guest.boot()
        assert guest.run(["cat", MEANWHILE]) == "written before the power went off"


def test_a_guest_that_powers_off_while_its_memory_streams_is_merged_and_boots(lab: Lab, guest: LabGuest) -> None:
    """Mode ``instant``: QEMU ends by the guest's own will in mid-stream. Nothing is kept, and nothing is lost."""
    persistent = definitions(guest)[1]
    written: list[bool] = []

    def powers_off() -> bool:
        if not written and streams(guest):
            # So slow that it is on its way for longer than the guest takes to go off.
            Monitor(guest.domain).set_max_bandwidth(_SLOW_BYTES_PER_SECOND)
            # Onto the overlay, after the instant of the capture; then as if the guest's kernel had halted.
            write_file(guest, MEANWHILE, "written in mid-stream")
            written.append(streams(guest))
            guest.agent("guest-exec", path="/bin/sh", arg=["-c", "echo o >/proc/sysrq-trigger"])
        return False

    with host_settings.lent(host_settings.USERFAULTFD), run_of(lab, guest) as run:
        run.plan = replace(run.plan, choice=INSTANT)
        run.prepare()
        with pytest.raises(VmsnapError):
            run.capture(Cancel(when=powers_off))
        assert written == [True]
        wait_until(lambda: guest.domain.state()[0] == libvirt.VIR_DOMAIN_SHUTOFF, "the end of the guest")
        run.release()
        assert run.overlay_files() == []
        assert relays() == []
        assert definitions(guest)[1] == persistent
    guest.boot()
    assert guest.run(["cat", MEANWHILE]) == "written in mid-stream"
