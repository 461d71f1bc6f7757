"""Starting a lab from the host, and clearing away after it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from integration.lab import cgroups, host_settings, kvm
from integration.lab.commands import LabError, run
from integration.lab.image import get_image
from integration.lab.lab import Lab

PREFIX = "vmsnap-lab-"
NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--propagation", "private")
EMULATION_FACTOR = 6.0
NEEDED = (
    *("unshare", "setpriv", "mmdebstrap", "mkfs.ext4", "mkfs.xfs", "ssh-keygen"),
    *("libvirtd", "virtlogd", "qemu-system-x86_64", "qemu-img", "dnsmasq", "nft", "ip"),
)


def run_in_lab(command: Sequence[str]) -> int:
    """Build the image if need be, make a lab, run `command` in it and return its exit status.

    When this returns, or this process dies by whatever cause, every process of the lab is ended. What a killed predecessor
    left on disk is swept first.
    """
    _check_host()
    sweep()
    image = get_image()
    accelerator = kvm.choose(image)
    with host_settings.lent(host_settings.MEMORY_KEPT), _scratch() as scratch:
        lab = Lab(
            scratch=scratch,
            image_folder=image.folder,
            accelerator=accelerator,
            time_factor=1.0 if accelerator == "kvm" else EMULATION_FACTOR,
            bridge="labprod",
            gateway="10.77.0.1/24",
        )
        inside = [sys.executable, "-m", "integration.lab.inside", str(lab.save()), *command]
        # setpriv ties unshare to this process, --kill-child ties the lab to unshare.
        process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, *inside])
        with _signals_passed_to(process):
            code = process.wait()
        return code if code >= 0 else 128 - code


def sweep() -> None:
    """Remove scratch folders and control groups of labs that are no longer alive, and give back settings. Repeatable."""
    host_settings.give_back_all()
    with _alone(_parent(), wait=True):
        for folder in _parent().glob(f"{PREFIX}*"):
            with _alone(folder) as gained:
                if gained:
                    _clear(folder)


def _check_host() -> None:
    if os.geteuid() != 0:
        raise LabError("the lab needs root (namespaces, mounts, libvirtd): run it with sudo")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        listed = Path(__file__).parent / "packages.txt"
        raise LabError(f"not installed: {', '.join(missing)}; the Debian packages needed are listed in {listed}")
    os.environ["PATH"] = path


def _parent() -> Path:
    # Not the checkout: QEMU runs as a user of its own and must be able to walk to the disks.
    folder = Path(os.environ.get("VMSNAP_LAB_DIR") or "/var/tmp")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _scratch() -> Iterator[Path]:
    with ExitStack() as stack:
        with _alone(_parent(), wait=True):  # against a sweep between making the folder and locking it
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_parent()))
            folder.chmod(0o755)
            stack.enter_context(_alone(folder))
        try:
            yield folder
        finally:
            if os.environ.get("VMSNAP_LAB_KEEP_LOGS") and (folder / "log").exists():
                kept = Path(tempfile.mkdtemp(prefix="kept-logs-", dir=_parent()))
                shutil.copytree(folder / "log", kept / "log")
                print(f"the lab's logs are kept in {kept}", file=sys.stderr)
            _clear(folder)


@contextmanager
def _alone(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the folder's lock (on a lab's own folder: it is alive); yields whether it could be had."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    cgroups.remove(folder.name)
    deadline = time.monotonic() + 10
    while str(folder) in run(["losetup", "--list", "--noheadings", "--output", "BACK-FILE"]):
        # They let go by themselves, a little after the last mount namespace is gone.
        if time.monotonic() > deadline:
            raise LabError(f"loop devices over files in {folder} are still busy; look at losetup --list")
        time.sleep(0.05)
    shutil.rmtree(folder)


@contextmanager
def _signals_passed_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def end(_number: int, _frame: object) -> None:
        process.kill()

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),  # the command gets it from the terminal itself
        signal.SIGTERM: signal.signal(signal.SIGTERM, end),
        signal.SIGHUP: signal.signal(signal.SIGHUP, end),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
