"""What ``snapshots/GUEST/ID.json`` says: a snapshot, or a mark that there is none any more.

``docs/packs.md`` describes the JSON. Nothing here reads or writes an object.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Manifest
from vmsnap.stores.packs.names import damaged, snapshot_name
from vmsnap.stores.packs.seals import Seal

_Digest = Field(pattern=r"^[0-9a-f]{64}$")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredDisk(_Record):
    """One disk, by its name in the guest: the digest of its root map."""

    target: str
    root: str = _Digest


class StoredFile(_Record):
    """A small file beside the disks, stored as a disk is. ``sha256`` is of the file."""

    name: str
    size_bytes: int = Field(ge=0)
    sha256: str = _Digest
    root: str = _Digest


class Body(_Record):
    """What is signed, and sealed in a keyed repository. ``manifest`` is that of the local store, unchanged."""

    manifest: Manifest
    disks: tuple[StoredDisk, ...]
    files: tuple[StoredFile, ...] = ()

    @property
    def roots(self) -> tuple[bytes, ...]:
        """Return the digests of all root maps: with their leaves, what the snapshot needs."""
        return tuple(
            bytes.fromhex(root) for root in (*(disk.root for disk in self.disks), *(file.root for file in self.files))
        )


class PackedSnapshot(_Record):
    """A snapshot in a repository. ``version`` is the object's."""

    upload: str
    uploaded: AwareDatetime
    body: Body
    version: str

    @property
    def id(self) -> SnapshotId:
        """Return the snapshot's id."""
        return self.body.manifest.id

    @property
    def guest(self) -> str:
        """Return the guest's name."""
        return self.body.manifest.guest

    @property
    def name(self) -> str:
        """Return the manifest's name."""
        return snapshot_name(self.guest, snapshot=self.id)


class Absence(_Record):
    """A mark in a manifest's place: no snapshot, and no late upload may write one without having seen the mark."""

    reason: Literal["removed", "revoked"]
    upload: str
    at: AwareDatetime


class _Envelope(_Record):
    format_version: Literal[1] = 1
    repository: str
    kind: Literal["snapshot", "absent"]
    upload: str
    at: AwareDatetime
    reason: Literal["removed", "revoked"] | None = None
    signature: str | None = None
    body: dict[str, object] | None = None
    sealed: str | None = None


def encode_snapshot(body: Body, *, repository: str, upload: str, at: AwareDatetime, seal: Seal) -> bytes:
    """Return the object of a snapshot."""
    plain: dict[str, object] = json.loads(body.model_dump_json())
    text = canonical(plain)
    envelope = _Envelope(
        repository=repository,
        kind="snapshot",
        upload=upload,
        at=at,
        signature=seal.signature(text),
        body=None if seal.keyed else plain,
        sealed=base64.b64encode(seal.seal(text)).decode() if seal.keyed else None,
    )
    return _text(envelope)


def encode_absence(absence: Absence, *, repository: str) -> bytes:
    """Return the object that marks an absence."""
    envelope = _Envelope(
        repository=repository, kind="absent", upload=absence.upload, at=absence.at, reason=absence.reason
    )
    return _text(envelope)


def decode(data: bytes, *, name: str, version: str, repository: str, seal: Seal) -> PackedSnapshot | Absence:
    """Read a manifest or a mark. Raises VerificationError for what is damaged, of another name or another repository."""
    try:
        envelope = _Envelope.model_validate_json(data)
    except ValidationError as error:
        raise damaged(name, what=f"it is no manifest of format 1 ({error.error_count()} faults)") from error
    if envelope.repository != repository:
        raise damaged(name, what=f"it is from repository {envelope.repository}, not from {repository}")
    if envelope.kind == "absent":
        return Absence(reason=envelope.reason or "removed", upload=envelope.upload, at=envelope.at)
    text = _signed_text(envelope, name=name, seal=seal)
    if seal.signature(text) != envelope.signature:
        raise damaged(name, what="its signature is not of its body")
    try:
        body = Body.model_validate_json(text)
    except ValidationError as error:
        raise damaged(name, what=f"its body is no manifest ({error.error_count()} faults)") from error
    if snapshot_name(body.manifest.guest, snapshot=body.manifest.id) != name:
        raise damaged(name, what=f"it is snapshot {body.manifest.id} of {body.manifest.guest!r}, under another name")
    return PackedSnapshot(upload=envelope.upload, uploaded=envelope.at, body=body, version=version)


def _signed_text(envelope: _Envelope, *, name: str, seal: Seal) -> bytes:
    if seal.keyed and envelope.sealed is not None:
        try:
            return seal.unseal(base64.b64decode(envelope.sealed, validate=True), name=name)
        except binascii.Error as error:
            raise damaged(name, what="its sealed body is no base64") from error
    if not seal.keyed and envelope.body is not None:
        return canonical(envelope.body)
    raise damaged(name, what="it has no body")


def canonical(body: dict[str, object]) -> bytes:
    """Return the text that is signed: JSON with sorted keys, no white space, ASCII only."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _text(envelope: _Envelope) -> bytes:
    return json.dumps(json.loads(envelope.model_dump_json(exclude_none=True)), indent=2).encode() + b"\n"
