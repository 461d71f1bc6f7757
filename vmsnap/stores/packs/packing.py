"""From blocks to stored packs: compressed by a few threads, put together in order, stored by a few more."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from vmsnap.stores.packs.frames import Frame
from vmsnap.stores.packs.index import BlockIndex
from vmsnap.stores.packs.packfile import PackBuilder, PackIndex
from vmsnap.stores.packs.repository import Repository

S = TypeVar("S")
T = TypeVar("T")
_COMPRESSING = max(2, os.cpu_count() or 1)
_BATCHES_AHEAD = 3 * _COMPRESSING
_MOST_PACKS_AHEAD = 5
"""Packs in memory, each of 16 MiB and a little, on their way at a time."""


@dataclass(frozen=True, kw_only=True)
class _StoredPack:
    digest: bytes
    size_bytes: int
    index: PackIndex


class Packer:
    """Stores blocks in packs and tells the index. Used by one thread; close it.

    Batches are numbered from 1 in the order they are given, and ``settled`` is the last whose blocks are all stored.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        index: BlockIndex,
        token: bytes,
        connections: int,
        retain_until: datetime | None = None,
    ) -> None:
        self._repository = repository
        self._index = index
        self._token = token
        self._retain_until = retain_until
        self._connections = connections
        self._packs_ahead = min(connections, _MOST_PACKS_AHEAD)
        self._compressing = ThreadPoolExecutor(_COMPRESSING, thread_name_prefix="pack")
        self.storing = ThreadPoolExecutor(connections, thread_name_prefix="store")
        self._batches: deque[Future[list[Frame]]] = deque()
        self._puts: deque[tuple[Future[_StoredPack], int]] = deque()
        self._pending: set[bytes] = set()
        self._builder = self._new_builder()
        self.given = 0
        self._packed = 0
        self.settled = 0
        self.stored_bytes = 0

    def close(self) -> None:
        """End the threads; what is under way is waited for, what is not is given up."""
        self._compressing.shutdown(cancel_futures=True)
        self.storing.shutdown(cancel_futures=True)

    def is_pending(self, identity: bytes) -> bool:
        """Tell whether a block was given and is not stored yet."""
        return identity in self._pending

    def add(self, ids: Sequence[bytes], *, make: Callable[[], list[Frame]]) -> int:
        """Take a batch of blocks and return its number. ``make`` is called in another thread. Waits while too much is on."""
        self._pending.update(ids)
        self.given += 1
        self._batches.append(self._compressing.submit(make))
        while len(self._batches) > _BATCHES_AHEAD:
            self._pack_oldest()
        self._reap(most=self._packs_ahead)
        return self.given

    def flush(self) -> None:
        """Store everything that was given."""
        while self._batches:
            self._pack_oldest()
        if not self._builder.is_empty:
            self._store_pack()
        self._reap(most=0)
        self.settled = self.given

    def ahead(self, items: Iterable[S], *, task: Callable[[S], T]) -> Iterator[T]:
        """Yield what ``task`` returns for each item, in order; a few are done at the same time by the storing threads."""
        todo: deque[Future[T]] = deque()
        for item in items:
            todo.append(self.storing.submit(task, item))
            if len(todo) > 2 * self._connections:
                yield todo.popleft().result()
        while todo:
            yield todo.popleft().result()

    def _new_builder(self) -> PackBuilder:
        return PackBuilder(seal=self._repository.seal, token=self._token)

    def _pack_oldest(self) -> None:
        for frame in self._batches.popleft().result():
            self._builder.add(frame)
            if self._builder.is_full:
                # The rest of this batch goes to the next pack, so the batch before is the last that is all in this one.
                self._store_pack()
        self._packed += 1

    def _store_pack(self) -> None:
        builder, self._builder = self._builder, self._new_builder()
        self._puts.append((self.storing.submit(self._put, builder), self._packed))
        self._reap(most=self._packs_ahead)

    def _put(self, builder: PackBuilder) -> _StoredPack:
        pack = builder.finish()
        self._repository.store.put(pack.name, data=pack.data, retain_until=self._retain_until)
        return _StoredPack(digest=pack.digest, size_bytes=len(pack.data), index=pack.index)

    def _reap(self, *, most: int) -> None:
        """Learn of packs that are stored, in order; wait until at most so many are under way."""
        while self._puts and (len(self._puts) > most or self._puts[0][0].done()):
            future, packed = self._puts.popleft()
            pack = future.result()
            self._index.add(pack.digest, index=pack.index)
            self._pending.difference_update(
                pack.index.ids[start : start + 32] for start in range(0, len(pack.index.ids), 32)
            )
            self.settled = packed
            self.stored_bytes += pack.size_bytes
