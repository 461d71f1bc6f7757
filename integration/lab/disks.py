"""Disks of lab guests: copies of the image's, as files or as loop devices."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from integration.lab.commands import run
from integration.lab.domain import AttachedDisk, DiskSpec, GuestSpec
from integration.lab.lab import Lab


class GuestDisks:
    """The disks of one guest. `close` removes them; loop devices also vanish by themselves when this process dies."""

    def __init__(self, lab: Lab, spec: GuestSpec) -> None:
        self._loop_handles: list[int] = []
        self._folders: list[Path] = []
        self._lab = lab
        self._uuid = spec.uuid
        attached: list[AttachedDisk] = []
        try:
            used = {"vd": 0, "sd": 0}
            for disk in spec.disks:
                prefix = "vd" if disk.bus == "virtio" else "sd"
                attached.append(self._make(disk, f"{prefix}{chr(ord('a') + used[prefix])}"))
                used[prefix] += 1
        except BaseException:
            self.close()
            raise
        self.attached = tuple(attached)

    def _make(self, disk: DiskSpec, target: str) -> AttachedDisk:
        # A folder named by UUID: the guest's name may hold characters that a path must not.
        folder = (disk.folder or self._lab.guests) / self._uuid
        if folder not in self._folders:
            folder.mkdir(parents=True)
            self._folders.append(folder)
        file = folder / f"{target}.{'qcow2' if disk.format == 'qcow2' else 'raw'}"
        self._fill(disk, file)
        source = self._loop_over(file) if disk.format == "block" else file
        return AttachedDisk(spec=disk, file=file, source=source, target=target)

    def _fill(self, disk: DiskSpec, file: Path) -> None:
        kind = "qcow2" if disk.format == "qcow2" else "raw"
        image = self._lab.image
        if disk.content == "blank":
            run(["qemu-img", "create", "-q", "-f", kind, file, f"{disk.blank_mib}M"])
        else:
            root = image.root_qcow2 if kind == "qcow2" else image.root_raw
            origin = image.data_raw if disk.content == "data" else root
            # Past the page cache: touching that much fresh memory takes longer than the copying itself.
            options = ["-t", "none", "-T", "none", "-f", "raw" if origin.suffix == ".raw" else "qcow2", "-O", kind]
            run(["qemu-img", "convert", *options, origin, file], timeout_s=120)

    def _loop_over(self, file: Path) -> Path:
        device = Path(run(["losetup", "--find", "--show", file]).strip())
        # Detaching a device that is open only marks it: it goes when its last user, here this handle, is gone.
        self._loop_handles.append(os.open(device, os.O_RDONLY | os.O_CLOEXEC))
        run(["losetup", "--detach", device])
        return device

    def close(self) -> None:
        """Remove the disks, and whatever else lies in their folders. Repeatable."""
        while self._loop_handles:
            os.close(self._loop_handles.pop())
        while self._folders:
            with suppress(FileNotFoundError):
                shutil.rmtree(self._folders.pop())
