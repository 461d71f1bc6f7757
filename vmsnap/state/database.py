"""One SQLite file in the state directory that several processes use, and that no crash leaves half written.

Chosen: a rollback journal (DELETE) with ``synchronous = EXTRA``. What is committed outlives kill -9 and a power cut at any
write (https://www.sqlite.org/pragma.html#pragma_synchronous), there is one file at rest, and no shared memory: a WAL brings
that, for readers beside a writer, whom nobody here waits for. Each piece of work has a connection of its own: connections
survive neither a fork nor a change of thread, and opening one costs less than the fsync that follows.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TypeVar

from vmsnap.errors import BusyError, DriverError, NoSpaceError, PreconditionError, VmsnapError
from vmsnap.state.files import FILE_MODE, make_state_folder, sync_folder, translated

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_PRIMARY = 0xFF
"""Extended result codes carry the primary one in their lowest byte (https://www.sqlite.org/rescode.html)."""
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH})
"""SQLITE_ERROR too: the statements are fixed, so a table that is not as they expect it is not ours."""
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_DENIED = frozenset({sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH})


class Database:
    """A file of tables. Nothing is opened before the first piece of work.

    ``migrations[n]`` are the statements that lead from version n to version n + 1; the file's ``user_version`` says which
    were done. ``application_id`` is SQLite's mark of whose file it is. A file that is damaged, or not ours, is moved aside.
    """

    def __init__(
        self,
        path: Path,
        *,
        application_id: int,
        migrations: Sequence[Sequence[str]],
        patience: timedelta = timedelta(seconds=2),
    ) -> None:
        self._path = path
        self._application_id = application_id
        self._migrations = migrations
        self._patience = patience

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what ``work`` finds, all of one moment."""
        return self._do(work, begin="BEGIN")

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Let ``work`` change the tables: all of it is on disk when this returns, or nothing is changed."""
        return self._do(work, begin="BEGIN IMMEDIATE")

    def _do(self, work: Callable[[sqlite3.Connection], T], *, begin: str) -> T:
        try:
            return self._once(work, begin=begin)
        except sqlite3.Error as error:
            if _code(error) not in _DAMAGED:
                raise self._told(error) from error
            damage = error
        self._move_aside(damage)
        try:
            return self._once(work, begin=begin)
        except sqlite3.Error as error:
            raise self._told(error) from error

    def _once(self, work: Callable[[sqlite3.Connection], T], *, begin: str) -> T:
        with self._connected() as connection:
            self._migrate(connection)
            with _transaction(connection, begin=begin):
                return work(connection)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        make_state_folder(self._path.parent)
        self._make()
        connection = sqlite3.connect(self._path, timeout=self._patience.total_seconds(), isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = EXTRA")
            connection.execute("PRAGMA foreign_keys = ON")
            yield connection
        finally:
            connection.close()

    def _make(self) -> None:
        """Make the file, private, as SQLite would not."""
        # Only where it is not there: to close any descriptor of it lets go of the locks that SQLite holds on it in other
        # threads of this process (https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled_by_a_separate_thread_doing_close_).
        with translated(doing="make", path=self._path), contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))

    def _migrate(self, connection: sqlite3.Connection) -> None:
        """Bring the tables to the version this program knows, in one transaction. Raises PreconditionError for newer ones."""
        known = len(self._migrations)
        if self._version(connection) == known:
            return
        with _transaction(connection, begin="BEGIN IMMEDIATE"):
            version = self._version(connection)  # again: another process may have been quicker
            if version > known:
                raise PreconditionError(
                    f"'{self._path}' has format {version}, this vmsnap knows {known}",
                    remedy="use the vmsnap that wrote it, or a newer one",
                )
            for statements in self._migrations[version:]:
                for statement in statements:
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {self._application_id}")
            connection.execute(f"PRAGMA user_version = {known}")

    def _version(self, connection: sqlite3.Connection) -> int:
        """Return how many migrations were done. Raises a damage error for a file that is not ours."""
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        owner = int(connection.execute("PRAGMA application_id").fetchone()[0])
        empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if (owner != self._application_id) if version else not empty:
            raise _foreign()
        return version

    def _move_aside(self, damage: sqlite3.Error) -> None:
        """Give a damaged file another name, one process at a time, and only while it is still damaged."""
        lock = self._path.with_name(f"{self._path.name}.lock")
        with translated(doing="open", path=lock):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not self._is_damaged(damage):
                return
            aside = _free_name(self._path)
            with translated(doing="move aside", path=self._path):
                # The journal first: beside a new file of that name SQLite would play it back into that.
                for suffix in ("-journal", ""):
                    with contextlib.suppress(FileNotFoundError):
                        Path(f"{self._path}{suffix}").rename(f"{aside}{suffix}")
                sync_folder(self._path.parent)
            _LOG.warning(
                "'%s' is damaged (%s): it is now '%s', and a new one is begun. Backups and snapshots are not concerned; "
                "what it told of earlier runs may be read from there with 'sqlite3 FILE .recover'",
                self._path,
                damage,
                aside,
            )
        finally:
            os.close(descriptor)

    def _is_damaged(self, damage: sqlite3.Error) -> bool:
        """Tell whether the file is damaged now: another process may have moved it aside since ``damage`` was met."""
        try:
            with self._connected() as connection:
                version = self._version(connection)
                whole = connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
                # Sound pages, but tables that the statements do not fit.
                return not whole or (
                    _code(damage) == sqlite3.SQLITE_ERROR and version > 0 and not self._fits(connection)
                )
        except sqlite3.Error as error:
            return _code(error) in _DAMAGED

    def _fits(self, connection: sqlite3.Connection) -> bool:
        """Tell whether the tables are those that the migrations make."""
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as model:
            for statements in self._migrations:
                for statement in statements:
                    model.execute(statement)
            return _tables(model) == _tables(connection)

    def _told(self, error: sqlite3.Error) -> VmsnapError:
        """Return the error to show an operator."""
        brief = f"'{self._path}': {error}"
        code = _code(error)
        if code in _BUSY:
            return BusyError(brief, remedy="another process writes to it; try again")
        if code == sqlite3.SQLITE_FULL:
            return NoSpaceError(
                brief, remedy=f"free space on the file system of '{self._path.parent}', or move [state] path elsewhere"
            )
        if code in _DENIED:
            return PreconditionError(brief, remedy="run vmsnap as root, and see whether its file system is read-only")
        return DriverError(
            brief, remedy=f"look at '{self._path.parent}' and at the kernel's log for errors of its disk"
        )


@contextmanager
def _transaction(connection: sqlite3.Connection, *, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _tables(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(
        connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    )


def _foreign() -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError("it is a database, but not vmsnap's")
    error.sqlite_errorcode = sqlite3.SQLITE_NOTADB
    return error


def _code(error: sqlite3.Error) -> int:
    # Errors of the module itself, such as a value it cannot bind, have no code.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & _PRIMARY


def _free_name(path: Path) -> Path:
    return next(name for number in count(1) if not (name := path.with_name(f"{path.name}.damaged-{number}")).exists())
