"""A note that a run stops its guest itself, with libvirt's ``suspend``: libvirt takes such a pause for its operator's.

Whoever undoes a dead run cannot tell the two apart by anything that QEMU or libvirt says, so only where this note lies it lets
the guest go on. It is in the run's folder in ``/run``: it goes with the guest when the host goes down.
"""

from __future__ import annotations

from pathlib import Path

from vmsnap.hypervisors.libvirt.tools import translated_os

_NAME = "stopped"


class StoppedHere:
    """The note of one run. ``folder`` is the run's own, which the place of its memory image is in."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME

    def note(self) -> None:
        """Note that the next pause is this run's. Call it before the guest is stopped. Raises DriverError and its kin."""
        with translated_os(f"write {self._path}"):
            self._path.touch(mode=0o600)

    def is_noted(self) -> bool:
        """Tell whether a pause may be this run's."""
        return self._path.exists()

    def over(self) -> None:
        """Note that the pause is over: from now on a stopped guest is its operator's. May be repeated. Raises as ``note``."""
        with translated_os(f"remove {self._path}"):
            self._path.unlink(missing_ok=True)
