"""Where packs live: named objects, each written whole, never changed in place. S3, a directory, or memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from vmsnap.model.guest import Finding


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One object. ``version`` changes with its content (S3: the ETag). ``retained_until``: nobody can remove it before."""

    name: str
    size_bytes: int
    version: str
    retained_until: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """An object with its content."""

    info: ObjectInfo
    data: bytes


class ObjectStore(Protocol):
    """Keeps objects. Safe to use from several threads.

    Names are of letters, digits, ``-``, ``_``, ``.`` and ``/``; none begins or ends with ``/``, or has a part ``.`` or ``..``.
    An object has a byte at least.
    A reader sees an object whole or not at all, and what was put at once (S3: strong consistency, as since December 2020).
    Errors: ObjectNotFoundError, ObjectConflictError, PreconditionError (no rights, no bucket), NoSpaceError, and DriverError or
    its transient kin ``StoreUnreachableError`` where it is not known whether a change was made. Every call may be repeated.
    """

    def findings(self) -> tuple[Finding, ...]:
        """Look whether the place can be used: reached, read, and as far as can be told written. Changes nothing that stays."""

    def put(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object, over one of that name where there is one. ``retain_until``: locked so long, where the store can."""

    def put_new(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object that must not be there yet. Raises ObjectConflictError where it is (S3: If-None-Match)."""

    def replace(self, name: str, *, data: bytes, version: str) -> ObjectInfo:
        """Write an object over the one of that version. Raises ObjectConflictError where it is another, or gone (If-Match)."""

    def get(self, name: str) -> StoredObject:
        """Read a whole object."""

    def get_range(self, name: str, *, offset: int, length: int) -> bytes:
        """Read a part of an object. Raises DriverError where the object ends before."""

    def info(self, name: str) -> ObjectInfo:
        """Describe an object without reading it."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose names begin so, in the order of their names. ``retained_until`` may be left out here."""

    def delete(self, name: str) -> None:
        """Remove an object. Content where it is gone. Raises HeldError where it is locked."""

    def retain(self, name: str, *, until: datetime) -> None:
        """Lock an object for at least so long, never shorter than before. Does nothing where the store has no locks."""
