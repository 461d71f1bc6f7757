"""A disk in the replica, in memory, with faults: the port ``BlockSource``."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from vmsnap.errors import PreconditionError, StoreUnreachableError, VerificationError

BLOCK_BYTES = 64 << 10


@dataclass(kw_only=True)
class MemoryBlocks:
    """``damaged`` blocks fail; everything does while ``unreachable`` or ``forbidden`` is set. ``reads``: what was asked for."""

    data: bytes
    damaged: set[int] = field(default_factory=set)
    unreachable: threading.Event = field(default_factory=threading.Event)
    forbidden: threading.Event = field(default_factory=threading.Event)
    latency_seconds: float = 0.0
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Return the disk's size."""
        return len(self.data)

    @property
    def identity(self) -> bytes:
        """Return what tells this disk from others."""
        return hashlib.sha256(self.data).digest()

    def holes(self, first: int, count: int) -> Sequence[bool]:
        """Tell which blocks are zeroes."""
        self._check()
        return [not any(self._block(number)) for number in range(first, first + count)]

    def read(self, first: int, count: int) -> bytes:
        """Return blocks."""
        self._check()
        if self.latency_seconds:
            time.sleep(self.latency_seconds)
        self.reads.append((first, count))
        bad = self.damaged & set(range(first, first + count))
        if bad:
            raise VerificationError(f"block {min(bad)} is damaged", remedy="repair it")
        return b"".join(self._block(number) for number in range(first, first + count))

    def _block(self, number: int) -> bytes:
        return self.data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]

    def _check(self) -> None:
        if self.unreachable.is_set():
            raise StoreUnreachableError("the replica does not answer")
        if self.forbidden.is_set():
            raise PreconditionError("the replica refuses this key")
