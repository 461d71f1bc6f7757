"""Keeping glibc's heaps small in a process whose threads pass large buffers about. Source: mallopt(3)."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE_BYTES = 1024 * 1024
_ARENAS = 2


def keep_heaps_small() -> None:
    """Give large buffers back to the kernel when they are freed, and let threads share heaps. Does nothing without glibc.

    Left alone, glibc raises its threshold to the size of what is freed (packs of 16 MiB) and keeps a heap for each of many
    threads, none of which shrinks: sending a disk of 2 TiB then took 360 MB instead of 200.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    mallopt(_M_ARENA_MAX, _ARENAS)
