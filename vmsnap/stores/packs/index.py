"""Which blocks a repository holds, as this host knows: a cache that is made anew from the repository where it is lost.

A SQLite file, so that a repository of tens of millions of blocks costs disk and no memory. One thread uses it at a time.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vmsnap.errors import DriverError
from vmsnap.stores.blocks import DIGEST_BYTES
from vmsnap.stores.packs.frames import Place
from vmsnap.stores.packs.packfile import PackIndex

_FORMAT = 2
_MOST_VARIABLES = 500
_SCHEMA = """
CREATE TABLE packs (number INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE);
CREATE TABLE blocks (id BLOB PRIMARY KEY, pack INTEGER NOT NULL, at INTEGER NOT NULL, length INTEGER NOT NULL,
  slot INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE leaves (digest BLOB PRIMARY KEY, ids BLOB NOT NULL, packs BLOB NOT NULL) WITHOUT ROWID;
"""


class BlockIndex:
    """The index of one repository, in one file. Use it in one thread, and close it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests: dict[int, bytes] = {}
        self._numbers: dict[bytes, int] = {}
        self._connection = self._opened()

    def close(self) -> None:
        """Let the file go."""
        with self._translated():
            self._connection.close()

    def _opened(self) -> sqlite3.Connection:
        with self._translated():
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                return self._connect()
            except sqlite3.DatabaseError:
                # A cache: whatever is wrong with it, it is made anew.
                for suffix in ("", "-wal", "-shm", "-journal"):
                    self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
                return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=60)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA cache_size=-32768")
            if connection.execute("PRAGMA user_version").fetchone()[0] != _FORMAT:
                for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                    connection.execute(f'DROP TABLE "{table}"')
                connection.executescript(_SCHEMA)
                connection.execute(f"PRAGMA user_version={_FORMAT}")
            for number, digest in connection.execute("SELECT number, digest FROM packs"):
                self._digests[number] = digest
                self._numbers[digest] = number
        except sqlite3.DatabaseError:
            connection.close()
            raise
        return connection

    def unknown(self, present: Iterable[bytes]) -> tuple[bytes, ...]:
        """Return which of the packs are not known yet."""
        return tuple(digest for digest in present if digest not in self._numbers)

    def add(self, digest: bytes, *, index: PackIndex) -> None:
        """Learn what a pack holds. A block that is in several packs is taken from the one learnt last."""
        with self._translated(), self._transaction():
            cursor = self._connection.execute("INSERT OR IGNORE INTO packs (digest) VALUES (?)", (digest,))
            number = self._numbers.get(digest) or int(cursor.lastrowid or 0)
            self._connection.executemany(
                "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?)",
                ((identity, number, at.offset, at.length, at.slot) for identity, at in index.places(digest)),
            )
        self._numbers[digest] = number
        self._digests[number] = digest

    def forget_others(self, present: Collection[bytes]) -> None:
        """Forget packs that are not ``present`` any more."""
        gone = [digest for digest in self._numbers if digest not in present]
        if not gone:
            return
        with self._translated(), self._transaction():
            self._connection.execute("CREATE TEMP TABLE IF NOT EXISTS gone (number INTEGER PRIMARY KEY)")
            self._connection.execute("DELETE FROM gone")
            self._connection.executemany("INSERT INTO gone VALUES (?)", ((self._numbers[one],) for one in gone))
            self._connection.execute("DELETE FROM blocks WHERE pack IN (SELECT number FROM gone)")
            self._connection.execute("DELETE FROM packs WHERE number IN (SELECT number FROM gone)")
        for digest in gone:
            del self._digests[self._numbers.pop(digest)]

    def find(self, ids: Collection[bytes]) -> Mapping[bytes, Place]:
        """Return the places of those blocks that the repository holds."""
        found: dict[bytes, Place] = {}
        wanted = list(ids)
        with self._translated():
            for start in range(0, len(wanted), _MOST_VARIABLES):
                part = wanted[start : start + _MOST_VARIABLES]
                marks = ",".join("?" * len(part))
                rows = self._connection.execute(
                    f"SELECT id, pack, at, length, slot FROM blocks WHERE id IN ({marks})",  # noqa: S608 - only marks
                    part,
                )
                for identity, pack, at, length, slot in rows:
                    found[identity] = Place(self._digests[pack], at, length, slot)
        return found

    def leaf_ids(self, leaf: bytes) -> bytes | None:
        """Return the SHA-256 of the ids of a leaf map that was written or read here before."""
        with self._translated():
            row = self._connection.execute("SELECT ids FROM leaves WHERE digest = ?", (leaf,)).fetchone()
        return None if row is None else bytes(row[0])

    def leaf_packs(self, leaf: bytes) -> frozenset[bytes]:
        """Return the digests of the packs that a known leaf map speaks of."""
        with self._translated():
            row = self._connection.execute("SELECT packs FROM leaves WHERE digest = ?", (leaf,)).fetchone()
        return frozenset() if row is None else frozenset(ids_in(row[0]))

    def remember_leaves(self, leaves: Iterable[tuple[bytes, bytes, bytes]]) -> None:
        """Remember leaf maps: their digest, the SHA-256 of their ids, and the digests of their packs, one after another."""
        with self._translated(), self._transaction():
            self._connection.executemany("INSERT OR REPLACE INTO leaves VALUES (?, ?, ?)", leaves)

    def forget_leaves(self, leaves: Iterable[bytes]) -> None:
        """Forget leaf maps, by digest."""
        with self._translated(), self._transaction():
            self._connection.executemany("DELETE FROM leaves WHERE digest = ?", ((leaf,) for leaf in leaves))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise DriverError(
                f"the cache of the replica's blocks, {self._path}, cannot be used: {error}",
                remedy="remove the file: it is made anew from the replica",
            ) from error


def ids_in(data: bytes) -> Iterator[bytes]:
    """Yield the ids in a flat sequence of them."""
    for start in range(0, len(data), DIGEST_BYTES):
        yield data[start : start + DIGEST_BYTES]
