"""NTFS volumes made by ntfs-3g, and the restart pages that Windows writes into their journals."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE_BYTES = 4096


def run(*argv: str | Path) -> None:
    """Run a program that must succeed."""
    subprocess.run([str(word) for word in argv], check=True, capture_output=True, timeout=60)


def make(image: Path, *, size_bytes: int, cluster_bytes: int = 4096) -> Path:
    """Make an empty volume."""
    with image.open("wb") as file:
        file.truncate(size_bytes)
    run("mkntfs", "--quick", "--quiet", "--force", "--cluster-size", str(cluster_bytes), image)
    return image


@contextmanager
def mounted(image: Path, *, at: Path) -> Iterator[Path]:
    """Mount a volume meanwhile."""
    at.mkdir(exist_ok=True)
    run("ntfs-3g", image, at)
    try:
        yield at
    finally:
        run("umount", at)


def patch(image: Path, place: int, data: bytes) -> None:
    """Write bytes somewhere in an image."""
    with image.open("r+b") as file:
        file.seek(place)
        file.write(data)


def log_place(image: Path) -> int:
    """Return where ``$LogFile`` lies: ntfs-3g fills it with ones, and nothing else on a small volume."""
    return image.read_bytes().index(b"\xff" * (1 << 16))


def restart_page(*, version: tuple[int, int] = (1, 1), in_use: int = 0xFFFF, flags: int = 0, number: int = 5) -> bytes:
    """Return a restart page as Windows writes it. ``in_use`` 0: it has the volume mounted."""
    page = bytearray(PAGE_BYTES)
    page[:4] = b"RSTR"
    struct.pack_into("<HHQIIHhh", page, 4, 30, 9, 0, PAGE_BYTES, PAGE_BYTES, 48, version[1], version[0])
    struct.pack_into("<QHHHH", page, 48, number, 1, 0xFFFF, in_use, flags)
    page[30:32] = b"\x01\x00"
    for sector in range(1, 9):
        page[30 + 2 * sector : 32 + 2 * sector] = page[512 * sector - 2 : 512 * sector]
        page[512 * sector - 2 : 512 * sector] = b"\x01\x00"
    return bytes(page)
