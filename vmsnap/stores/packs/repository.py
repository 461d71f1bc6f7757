"""A repository: the objects of one place that belong together, under one id and one key."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from vmsnap.errors import (
    ConfigError,
    ObjectConflictError,
    ObjectNotFoundError,
    PreconditionError,
    SnapshotNotFoundError,
    VerificationError,
)
from vmsnap.model.ids import SnapshotId
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.packs.manifests import Absence, PackedSnapshot, decode
from vmsnap.stores.packs.maps import LEAF_TAG, Leaf, Root, decode_leaf, decode_root
from vmsnap.stores.packs.names import (
    REPOSITORY,
    RESTORE_PROGRAM,
    SNAPSHOTS,
    damaged,
    guest_prefix,
    map_name,
    snapshot_in,
    snapshot_name,
)
from vmsnap.stores.packs.seals import KeyedSeal, OpenSeal, Seal

_ID_BYTES = 16


class _RepositoryRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    repository: str = Field(pattern=r"^[0-9a-f]{32}$")
    created: AwareDatetime
    encryption: Literal["none", "aes-256-gcm"]
    key_check: str | None = None


@dataclass(frozen=True, kw_only=True)
class Repository:
    """An open repository. Safe to use from several threads."""

    store: ObjectStore
    id: str
    seal: Seal

    def root(self, digest: bytes) -> Root:
        """Read a root map. Raises VerificationError, ObjectNotFoundError."""
        name = map_name(digest)
        return decode_root(self._digested(name, digest=digest), seal=self.seal, name=name)

    def leaf(self, digest: bytes, *, tag: bytes = LEAF_TAG) -> Leaf:
        """Read a leaf map. Raises VerificationError, ObjectNotFoundError."""
        name = map_name(digest)
        return decode_leaf(self._digested(name, digest=digest), seal=self.seal, name=name, tag=tag)

    def snapshot(self, guest: str, *, snapshot: SnapshotId) -> PackedSnapshot:
        """Read one snapshot's manifest. Raises SnapshotNotFoundError, VerificationError."""
        found = self.entry(snapshot_name(guest, snapshot=snapshot))
        if not isinstance(found, PackedSnapshot):
            raise SnapshotNotFoundError(
                f"snapshot {snapshot} of {guest!r} is not in the replica",
                remedy="'vmsnap list' shows where each snapshot is",
            )
        return found

    def entry(self, name: str) -> PackedSnapshot | Absence | None:
        """Read what is in a manifest's place; None where there is nothing. Raises VerificationError."""
        found = self.versioned_entry(name)
        return None if found is None else found[0]

    def versioned_entry(self, name: str) -> tuple[PackedSnapshot | Absence, str] | None:
        """Read what is in a manifest's place, and its version; None where there is nothing. Raises VerificationError."""
        try:
            found = self.store.get(name)
        except ObjectNotFoundError:
            return None
        entry = decode(found.data, name=name, version=found.info.version, repository=self.id, seal=self.seal)
        return entry, found.info.version

    def snapshot_names(self, guest: str | None = None) -> Iterator[tuple[str, SnapshotId, str]]:
        """Yield guest, id and object name of every manifest and mark, of one guest or of all, without reading them."""
        for info in self.store.list(SNAPSHOTS if guest is None else guest_prefix(guest)):
            named = snapshot_in(info.name)
            if named is not None:
                yield (*named, info.name)

    def entries(self, guest: str | None = None) -> Iterator[tuple[str, PackedSnapshot | VerificationError]]:
        """Yield every snapshot of one guest or of all by object name, or why it cannot be read; marks are left out."""
        for _, _, name in self.snapshot_names(guest):
            try:
                found = self.entry(name)
            except VerificationError as error:
                yield name, error
                continue
            if isinstance(found, PackedSnapshot):
                yield name, found

    def _digested(self, name: str, *, digest: bytes) -> bytes:
        data = self.store.get(name).data
        if hashlib.sha256(data).digest() != digest:
            raise damaged(name, what="its SHA-256 is not its name")
        return data


def open_repository(store: ObjectStore, *, key: bytes | None) -> Repository:
    """Open the repository of a place. Only reads.

    Raises PreconditionError where there is none, ConfigError for a key that is missing, needless or another's.
    """
    try:
        data = store.get(REPOSITORY).data
    except ObjectNotFoundError as error:
        raise PreconditionError(
            f"there is no repository: the replica has no object {REPOSITORY}",
            remedy="is it the right bucket and prefix? 'vmsnap replicate' makes a repository in an empty place",
        ) from error
    try:
        record = _RepositoryRecord.model_validate_json(data)
    except ValidationError as error:
        raise damaged(REPOSITORY, what="it does not describe a repository of format 1") from error
    return Repository(store=store, id=record.repository, seal=_seal(record, key=key))


def initialise(store: ObjectStore, *, key: bytes | None, now: datetime) -> Repository:
    """Make a repository where there is none, and open what is there. May be repeated, by several at once.

    Raises PreconditionError where the place has snapshots or packs but has lost its description: nothing is overwritten.
    """
    try:
        return open_repository(store, key=key)
    except PreconditionError:
        pass
    for prefix in (SNAPSHOTS, "packs/", "maps/"):
        if next(iter(store.list(prefix)), None) is not None:
            raise PreconditionError(
                f"the replica holds objects under {prefix}, but its description {REPOSITORY} is gone",
                remedy=f"put {REPOSITORY} back from a copy of the place; nothing can be read without it",
            )
    identity = secrets.token_hex(_ID_BYTES)
    record = _RepositoryRecord(
        repository=identity,
        created=now,
        encryption="none" if key is None else "aes-256-gcm",
        key_check=None if key is None else KeyedSeal(key, repository=identity).key_check,
    )
    with contextlib.suppress(ObjectConflictError):  # another was faster, and its description counts
        # First, so that who has a copy of the place has the means to read it as well.
        store.put(RESTORE_PROGRAM, data=(files(__package__) / "restore.py").read_bytes())
        store.put_new(REPOSITORY, data=record.model_dump_json(indent=2).encode() + b"\n")
    return open_repository(store, key=key)


def _seal(record: _RepositoryRecord, *, key: bytes | None) -> Seal:
    if record.encryption == "none":
        if key is not None:
            raise ConfigError(
                "a key is set, but the replica is not encrypted",
                remedy="take the key out of [replica], or use another bucket or prefix for an encrypted one",
            )
        return OpenSeal()
    if key is None:
        raise ConfigError(
            "the replica is encrypted, and no key is set", remedy="name the credential that holds it in [replica]"
        )
    seal = KeyedSeal(key, repository=record.repository)
    if not hmac.compare_digest(seal.key_check, record.key_check or ""):
        raise ConfigError("the key is not that of the replica", remedy="set the key that the replica was made with")
    return seal
