"""Whether what lies on a tmpfs may reach a disk: swap, and kernels that can keep a tmpfs out of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from vmsnap.model.capture import SwapRule
from vmsnap.model.guest import Finding, Severity

_SWAPS = Path("/proc/swaps")
_KNOWS_NOSWAP = (6, 4)
# Compressed memory, not a disk (unless zram was given one to write back to, which is its administrator's own choice).
_IN_MEMORY = re.compile(r"/dev/zram\d+\Z")
REMEDY = 'turn swap off (swapoff -a), run Linux 6.4 or later, or, where swap is encrypted, set capture.swap = "warn"'


def knows_noswap(release: str | None = None) -> bool:
    """Tell whether the kernel has the mount option ``noswap`` for tmpfs: Linux 6.4 and later."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release if release is None else release)
    return match is not None and (int(match[1]), int(match[2])) >= _KNOWS_NOSWAP


def swap_on_disk(swaps: Path = _SWAPS) -> tuple[str, ...]:
    """Return the swap areas that are on a disk (proc(5), /proc/swaps)."""
    lines = swaps.read_text(encoding="utf-8").splitlines()[1:]
    return tuple(name for name in (line.split()[0] for line in lines if line.strip()) if not _IN_MEMORY.match(name))


def check_swap(rule: SwapRule, *, noswap: bool | None = None, swaps: Path = _SWAPS) -> Iterator[Finding]:
    """Check that memory images stay in memory."""
    areas = swap_on_disk(swaps)
    if noswap is None:
        noswap = knows_noswap()
    if noswap or not areas:
        how = "the kernel keeps them out of swap" if noswap else "there is no swap on a disk"
        yield Finding(check="swap", severity=Severity.OK, message=f"memory images never reach a disk: {how}")
        return
    yield Finding(
        check="swap",
        severity=Severity.REFUSAL if rule is SwapRule.REFUSE else Severity.WARNING,
        message=f"memory images, which hold the guest's secrets, may be swapped to {', '.join(areas)}",
        remedy=REMEDY,
    )
