"""Going round an error of QEMU's software emulation that makes captures inconsistent.

While a guest's memory is copied, QEMU collects which pages the guest wrote. For blocks of memory that are a multiple of 64
pages long it takes a short cut, which forgets to tell the emulator that a page counts as unwritten again: what the guest
writes to it next is not noticed, and the copy keeps the old contents (`cpu_physical_memory_sync_dirty_bitmap` in QEMU's
include/exec/ram_addr.h up to 8.2; repaired in 9.0, "physmem: Fix migration dirty bitmap coherency with TCG memory access").
With KVM the hardware keeps the record, and nothing is lost.

Measured with QEMU 7.2 on a host with a load of 12: 4 of 13 copies differed from the stopped guest's memory, in 1 to 103 pages.
Such clones came up with corrupt lists in their kernel and answered nobody.

So the lab's emulated guests have 8 KiB less memory than asked for: that is no multiple of 64 pages, and QEMU takes the long way.
Under the same load 14 of 14 copies were the same as the guest's memory.

The long way takes about 3.5 ms for each GiB of memory while the guest stands still. So what measures pauses uses a newer QEMU:
`integration/setup.sh qemu` unpacks one, and the lab takes it in place of the host's where VMSNAP_LAB_QEMU names its folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from integration.lab.commands import LabError, run

QEMU = "/usr/bin/qemu-system-x86_64"
VARIABLE = "VMSNAP_LAB_QEMU"
# What a QEMU is made of. Its modules are found by absolute path, and only those of the same build can be used.
_PARTS = ("usr/bin/qemu-system-x86_64", "usr/lib/x86_64-linux-gnu/qemu", "usr/share/qemu", "usr/share/seabios")
_REPAIRED = (9, 0)
_SCRIPT = f"""#!/bin/bash
# Starts QEMU with 8 KiB less memory than asked for: see integration/lab/emulator.py.
arguments=()
previous=
for argument; do
    if [[ $previous == -m && $argument =~ ^[0-9]+$ ]]; then
        argument=$((argument * 1024 - 8))k
    elif [[ $previous == -m && $argument =~ ^size=([0-9]+)k(.*)$ ]]; then
        argument=size=$((BASH_REMATCH[1] - 8))k${{BASH_REMATCH[2]}}
    elif [[ $argument =~ ^(.*\\"id\\":\\"(pc.ram|ram-node0)\\".*\\"size\\":)([0-9]+)(.*)$ ]]; then
        argument=${{BASH_REMATCH[1]}}$((BASH_REMATCH[3] - 8192))${{BASH_REMATCH[4]}}
    fi
    arguments+=("$argument")
    previous=$argument
done
exec {QEMU} "${{arguments[@]}}"
"""


def mount_other() -> None:
    """Put the QEMU that VMSNAP_LAB_QEMU names in the place of the host's, in this mount namespace."""
    root = os.environ.get(VARIABLE)
    if not root:
        return
    if missing := [part for part in _PARTS if not (Path(root) / part).exists()]:
        raise LabError(f"{VARIABLE}: {root} has no {', '.join(missing)}; 'integration/setup.sh qemu' unpacks one")
    for part in _PARTS:
        run(["mount", "--bind", Path(root) / part, f"/{part}"])


def install(path: Path) -> None:
    """Write the program that libvirt starts in place of QEMU."""
    found = re.search(r"version (\d+)\.(\d+)", run([QEMU, "--version"]))
    repaired = found is not None and (int(found[1]), int(found[2])) >= _REPAIRED
    path.write_text(f'#!/bin/bash\nexec {QEMU} "$@"\n' if repaired else _SCRIPT)
    path.chmod(0o755)
