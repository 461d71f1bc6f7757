"""The place of the memory image: a tmpfs of the run's own, mode 0700. It holds the guest's secrets and never a disk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from vmsnap.errors import DriverError, NoSpaceError, PreconditionError, ToolError
from vmsnap.hypervisors.libvirt.preflight import KEEP_FREE_BYTES, available_memory_bytes
from vmsnap.hypervisors.libvirt.processes import PID_FILES, pid_of, resident_bytes
from vmsnap.hypervisors.libvirt.swap import REMEDY, swap_on_disk
from vmsnap.hypervisors.libvirt.tools import run_tool, translated_os
from vmsnap.model.admission import HostMemory
from vmsnap.model.capture import SwapRule
from vmsnap.model.ids import RunId, is_run_id

_MIB = 1 << 20
IMAGE_NAME = "ram.save"
_CLONE = "vmsnap-clone-"
FIFO_NAME = "ram.fifo"


def create(folder: Path, *, image_bytes: int, swap: SwapRule) -> None:
    """Mount the tmpfs and make the empty image file that libvirt insists on finding.

    ``image_bytes`` is the most that the image may hold, and image and clone together.

    It is kept out of swap where the kernel can do that. Raises NoSpaceError where the host's memory does not hold image and
    clone, PreconditionError where the image could reach a disk although ``swap`` forbids it, ToolError.
    """
    free = available_memory_bytes(Path("/proc/meminfo").read_text(encoding="ascii"))
    needed = image_bytes + KEEP_FREE_BYTES
    if free < needed:
        raise NoSpaceError(
            f"the host has {free // _MIB} MiB of memory available; image and clone of this guest need "
            f"{needed // _MIB} MiB",
            remedy="run fewer guests or clones at a time, or add memory",
        )
    with translated_os(f"make the memory area {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _mount(folder, options=f"size={image_bytes // _MIB}m,mode=0700,nosuid,nodev,noexec", swap=swap)
    with translated_os(f"make the memory image in {folder}"):
        descriptor = os.open(folder / IMAGE_NAME, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.close(descriptor)


def _mount(folder: Path, *, options: str, swap: SwapRule) -> None:
    """Mount a tmpfs out of swap's reach; an older kernel knows no such option (``noswap``: tmpfs(5), Linux 6.4)."""
    areas = swap_on_disk()
    try:
        run_tool(("mount", "-t", "tmpfs", "-o", f"{options},noswap", "vmsnap-memory", str(folder)))
    except ToolError:
        if areas and swap is SwapRule.REFUSE:
            raise PreconditionError(
                f"the memory image could be swapped to {', '.join(areas)}, and with it the guest's secrets",
                remedy=REMEDY,
            ) from None
        run_tool(("mount", "-t", "tmpfs", "-o", options, "vmsnap-memory", str(folder)))


def host_memory(runtime: Path, *, pid_files: Path = PID_FILES) -> HostMemory:
    """Return what memory the host has left, and what each run's image and clone hold of it."""
    taken: dict[RunId, int] = {}
    for folder in sorted(runtime.iterdir()) if runtime.is_dir() else ():
        if is_run_id(folder.name):
            taken[RunId(folder.name)] = _used_bytes(folder / "memory")
    # A clone lives on when its image is gone, and the run's folder with it.
    for path in sorted(pid_files.glob(f"{_CLONE}*.pid")):
        name = path.stem.removeprefix(_CLONE)
        pid = pid_of(path.stem, pid_files=pid_files)
        if is_run_id(name) and pid is not None:
            taken[RunId(name)] = taken.get(RunId(name), 0) + resident_bytes(pid)
    available = available_memory_bytes(Path("/proc/meminfo").read_text(encoding="ascii"))
    return HostMemory(available_bytes=available, taken_bytes=taken)


def _used_bytes(folder: Path) -> int:
    """Return what a tmpfs holds; 0 where there is none (any more)."""
    try:
        if not os.path.ismount(folder):
            return 0
        status = os.statvfs(folder)
    except OSError:
        return 0
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def create_passage(folder: Path) -> None:
    """Make a folder for a FIFO alone: what goes through it is nowhere else."""
    with translated_os(f"make the folder {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def remove(folder: Path) -> None:
    """Unmount and remove. Content with any half-made state. Raises DriverError."""
    try:
        (folder / IMAGE_NAME).unlink(missing_ok=True)
        let_go(folder / FIFO_NAME)
        while os.path.ismount(folder):
            _unmount(folder)
        if folder.exists():
            folder.rmdir()
    except OSError as error:
        raise DriverError(f"the memory area {folder} could not be removed: {error.strerror}") from error


def let_go(fifo: Path) -> None:
    """Remove a FIFO. libvirtd may wait in it, for a writer that died: it would do so for ever."""
    wake(fifo)
    fifo.unlink(missing_ok=True)


def wake(fifo: Path) -> None:
    """Let go on who waits in a FIFO for its other end. Content where there is no FIFO."""
    with suppress(FileNotFoundError):
        os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))


def _unmount(folder: Path) -> None:
    try:
        run_tool(("umount", str(folder)))
    except ToolError:
        # libvirtd still writes to the image for a run that died in mid-capture. The image has no name any more, and
        # its memory is given back when libvirtd closes it: at the latest when the source's overlays are released.
        run_tool(("umount", "--lazy", str(folder)))


def discard_image(folder: Path) -> None:
    """Remove the image alone, as soon as the clone has read it."""
    (folder / IMAGE_NAME).unlink(missing_ok=True)


def is_short() -> bool:
    """Tell whether the host has less memory left than is kept free: what goes on growing must end before a guest does."""
    return available_memory_bytes(Path("/proc/meminfo").read_text(encoding="ascii")) < KEEP_FREE_BYTES


def used_share(folder: Path) -> float:
    """Return how full the tmpfs is, between 0 and 1."""
    status = os.statvfs(folder)
    return 1.0 if not status.f_blocks else 1.0 - status.f_bavail / status.f_blocks
