"""FAT, by its own flags: an EFI system partition is one.

Two marks say that it was not unmounted in order. Linux and Windows set bit 0 of the state byte in the boot sector while
it is mounted for writing (Linux: ``fat_set_state`` in fs/fat/inode.c); Windows also clears the highest usable bit of the
second FAT entry (Microsoft, FAT32 File System Specification, 'Dirty Volume').
"""

from __future__ import annotations

import struct
from pathlib import Path

from vmsnap.disks.verdict import Verdict

KIND = "vfat"

_SECTOR = 512
_STATE_FAT32 = 0x41
_STATE_FAT16 = 0x25
_CLEAN_FAT32 = 1 << 27
_CLEAN_FAT16 = 1 << 15
_FEWEST_CLUSTERS_FAT16 = 4085


def judge(boot_sector: bytes, *, second_entry: int | None, fat32: bool) -> Verdict:
    """Judge the flags. ``second_entry`` is the FAT's entry 1; FAT12 has no flag there (None)."""
    marks = []
    if boot_sector[_STATE_FAT32 if fat32 else _STATE_FAT16] & 1:
        marks.append("dirty flag in the boot sector")
    if second_entry is not None and not second_entry & (_CLEAN_FAT32 if fat32 else _CLEAN_FAT16):
        marks.append("dirty flag in the FAT")
    return Verdict(clean=not marks, observed=", ".join(marks) or "no dirty flag")


def state(disk: Path, *, offset: int) -> Verdict:
    """Return the state of the file system that begins at ``offset``. Raises OSError."""
    with disk.open("rb") as file:
        file.seek(offset)
        boot_sector = file.read(_SECTOR)
        if len(boot_sector) < _SECTOR:
            return Verdict(clean=False, observed="boot sector cut short")
        sector_bytes, cluster_sectors, reserved, fats, root_entries, small_total = struct.unpack_from(
            "<HBHBHH", boot_sector, 11
        )
        small_fat, large_total, large_fat = (
            *struct.unpack_from("<H", boot_sector, 22),
            *struct.unpack_from("<II", boot_sector, 32),
        )
        if not sector_bytes or not cluster_sectors:
            return Verdict(clean=False, observed="boot sector makes no sense")
        fat32 = small_fat == 0
        used = reserved + fats * (small_fat or large_fat) + -(-root_entries * 32 // sector_bytes)
        clusters = ((small_total or large_total) - used) // cluster_sectors
        file.seek(offset + reserved * sector_bytes)
        fat_start = file.read(8)
    if len(fat_start) < 8:
        return Verdict(clean=False, observed="FAT cut short")
    second_entry: int | None = None
    if fat32:
        second_entry = struct.unpack_from("<I", fat_start, 4)[0]
    elif clusters >= _FEWEST_CLUSTERS_FAT16:
        second_entry = struct.unpack_from("<H", fat_start, 2)[0]
    return judge(boot_sector, second_entry=second_entry, fat32=fat32)
