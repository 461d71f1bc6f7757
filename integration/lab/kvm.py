"""Whether hardware virtualisation can be trusted here.

`/dev/kvm` may exist and accept machines whose kernel then hangs before its first line, for instance in a nested guest. So
the lab's own kernel is booted with it once per boot of the host, and must reach its first user process.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from integration.lab.image import Image, cache_folder

LIMIT_S = 30.0
REACHED = b"Run /init as init process"


def choose(image: Image) -> str:
    """'kvm' or 'tcg'. `VMSNAP_LAB_KVM=1` or `0` decides without a probe."""
    forced = os.environ.get("VMSNAP_LAB_KVM")
    if forced in ("0", "1"):
        return "kvm" if forced == "1" else "tcg"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    answer = cache_folder() / f"kvm-{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    if not answer.exists():
        verdict = "kvm" if boots(image) else "tcg"
        for old in cache_folder().glob("kvm-*"):
            old.unlink(missing_ok=True)
        answer.write_text(verdict)
    return answer.read_text()


def boots(image: Image) -> bool:
    """Whether the image's kernel reaches its first user process under KVM within 30 s."""
    machine = ["qemu-system-x86_64", "-machine", "q35,accel=kvm", "-m", "256", "-nodefaults", "-display", "none"]
    kernel = ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", "console=ttyS0 panic=-1"]
    probe = subprocess.Popen(
        [*machine, *kernel, "-serial", "stdio", "-no-reboot"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        output, _ = probe.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        probe.kill()
        output, _ = probe.communicate()
    return REACHED in output
