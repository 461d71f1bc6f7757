"""The handle on a running lab, for the processes inside it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from integration.lab.commands import LabError
from integration.lab.emulator import QEMU
from integration.lab.image import Image

VARIABLE = "VMSNAP_LAB"
HOW_TO = "run it inside the lab: python -m integration.lab run -- COMMAND..."


@dataclass(frozen=True)
class Lab:
    """What a process inside the lab may rely on. All of it ends with the lab."""

    scratch: Path  # traversable by every user, so that QEMU's user reaches the disks
    image_folder: Path
    accelerator: str  # 'kvm' or 'tcg' (software emulation)
    time_factor: float  # multiply time limits meant for hardware virtualisation by this
    bridge: str  # the production network
    gateway: str  # the lab's own address on it, with its prefix length

    @classmethod
    def current(cls) -> Self:
        """The lab this process runs in. Raises `LabError` outside one."""
        named = os.environ.get(VARIABLE)
        if not named:
            raise LabError(f"this does not run in the lab; {HOW_TO}")
        facts = json.loads(Path(named).read_text())
        return cls(**{**facts, "scratch": Path(facts["scratch"]), "image_folder": Path(facts["image_folder"])})

    def save(self) -> Path:
        """Write the handle where `current` finds it through the environment variable; returns that file."""
        path = self.scratch / "lab.json"
        path.write_text(
            json.dumps({**asdict(self), "scratch": str(self.scratch), "image_folder": str(self.image_folder)})
        )
        return path

    @property
    def image(self) -> Image:
        return Image(self.image_folder)

    @property
    def kernel(self) -> Path:
        return self.scratch / "boot" / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.scratch / "boot" / "initrd"

    @property
    def emulator(self) -> Path:
        """What libvirt starts as QEMU: QEMU itself or, under software emulation, a program that starts it."""
        return Path(QEMU) if self.accelerator == "kvm" else self.scratch / "qemu-system-x86_64"

    @property
    def guests(self) -> Path:
        """Disks of guests, on the host's own file system."""
        return self.scratch / "guests"

    @property
    def reflink(self) -> Path:
        """The root of an XFS with reflinks."""
        return self.scratch / "xfs"

    @property
    def log(self) -> Path:
        """Logs of the lab's services and the guests' consoles."""
        return self.scratch / "log"

    @property
    def leases(self) -> Path:
        """dnsmasq's lease file (one line a lease: expiry, MAC, address, name, client id)."""
        return self.scratch / "dnsmasq.leases"
