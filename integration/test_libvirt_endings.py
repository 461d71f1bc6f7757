"""How a clone ends, told by a real QEMU: a guest of one boot sector powers off, or resets, by itself.

The sector waits by the BIOS's clock for three seconds, so that somebody listens, and then writes one value to one port: sleep
state S5 to the ACPI control register where SeaBIOS puts it, or a full reset to the chipset's reset control register.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import libvirt
import pytest

from integration.lab.lab import Lab
from integration.lab.services import URI
from vmsnap.errors import NotCleanError
from vmsnap.hypervisors.libvirt.clones import Clones, clone_of
from vmsnap.hypervisors.libvirt.connection import Connection
from vmsnap.model.capture import Clone
from vmsnap.model.ids import new_run_id
from vmsnap.testing.cancels import NeverCancelled

MINUTE = timedelta(minutes=1)
# sti; mov ax,0x40; mov ds,ax; mov bx,[0x6c]; add bx,54; again: hlt; cmp [0x6c],bx; jb again
WAIT = bytes.fromhex("fb b84000 8ed8 8b1e6c00 83c336 f4 391e6c00 72f9")
# mov dx,0x604; mov ax,0x2000; out dx,ax; hlt
POWER_OFF = bytes.fromhex("ba0406 b80020 ef f4")
# mov dx,0xcf9; mov al,6; out dx,al; hlt
RESET = bytes.fromhex("baf90c b006 ee f4")
DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
"""


def shut_down(lab: Lab, *, ending: bytes) -> str:
    clone: Clone = clone_of(new_run_id(), guest="sector")
    disk = Path(lab.reflink) / f"{clone.name}.raw"
    disk.write_bytes((WAIT + ending).ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    connection = libvirt.open(URI)
    try:
        domain = connection.createXML(DOMAIN.format(name=clone.name, disk=disk))
        try:
            clones = Clones(Connection(URI))
            return clones.shut_down(clone, agent_answers=False, deadline=MINUTE, cancel=NeverCancelled())
        finally:
            with suppress(libvirt.libvirtError):  # it ended by itself, as a rule
                domain.destroy()
    finally:
        connection.close()
        disk.unlink()


def test_a_guest_that_powers_off_is_clean(lab: Lab) -> None:
    assert shut_down(lab, ending=POWER_OFF) == "ACPI"


def test_a_guest_that_resets_instead_is_not(lab: Lab) -> None:
    with pytest.raises(NotCleanError, match="did not power off") as caught:
        shut_down(lab, ending=RESET)
    assert caught.value.details == "QEMU's reason for the shutdown: guest-reset"
