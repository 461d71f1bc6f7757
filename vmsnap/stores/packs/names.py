"""The names of objects in a repository, and the words for damage that names one. ``docs/packs.md`` lists them."""

from __future__ import annotations

import re

from vmsnap.errors import VerificationError
from vmsnap.model.ids import SnapshotId, is_run_id

REPOSITORY = "vmsnap-packs.json"
RESTORE_PROGRAM = "restore.py"
PACKS = "packs/"
MAPS = "maps/"
MOVES = "moves/"
SNAPSHOTS = "snapshots/"
INTENTS = "intents/"
TOMBSTONES = "tombstones/"
COLLECTOR_LOCK = "locks/collector"

_PLAIN = re.compile(r"[A-Za-z0-9-]")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_ESCAPED = re.compile(r"_([0-9A-F]{2})")


def pack_name(digest: bytes) -> str:
    """Return the name of the pack whose content has that SHA-256."""
    return _by_digest(PACKS, digest=digest)


def map_name(digest: bytes) -> str:
    """Return the name of the map whose content has that SHA-256."""
    return _by_digest(MAPS, digest=digest)


def move_name(pack: bytes) -> str:
    """Return the name of the object that says where the blocks of a pack are now."""
    return _by_digest(MOVES, digest=pack)


def _by_digest(prefix: str, *, digest: bytes) -> str:
    text = digest.hex()
    return f"{prefix}{text[:2]}/{text}"


def digest_in(name: str) -> bytes | None:
    """Return the digest at the end of an object's name; None where there is none."""
    last = name.rpartition("/")[2]
    return bytes.fromhex(last) if _DIGEST.match(last) else None


def guest_prefix(guest: str) -> str:
    """Return what the names of a guest's snapshots begin with.

    Letters, digits and ``-`` stand for themselves, every other byte of the UTF-8 form becomes ``_XX``.
    """
    encoded = "".join(
        character
        if _PLAIN.match(character)
        else "".join(f"_{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
        for character in guest
    )
    return f"{SNAPSHOTS}{encoded}/"


def snapshot_name(guest: str, *, snapshot: SnapshotId) -> str:
    """Return the name of a snapshot's manifest."""
    return f"{guest_prefix(guest)}{snapshot}.json"


def snapshot_in(name: str) -> tuple[str, SnapshotId] | None:
    """Return the guest and the id that a manifest's name stands for; None for another name."""
    folder, _, file = name.removeprefix(SNAPSHOTS).rpartition("/")
    identity = file.removesuffix(".json")
    if not name.startswith(SNAPSHOTS) or not folder or identity == file or not is_run_id(identity):
        return None
    parts = _ESCAPED.split(folder)
    raw = b"".join(
        bytes.fromhex(part) if odd else part.encode("utf-8", "replace")
        for odd, part in ((index % 2, part) for index, part in enumerate(parts))
    )
    guest = raw.decode("utf-8", "surrogateescape")
    return (guest, SnapshotId(identity)) if snapshot_name(guest, snapshot=SnapshotId(identity)) == name else None


def intent_name(upload: str) -> str:
    """Return the name of an upload's intent."""
    return f"{INTENTS}{upload}.json"


def damaged(name: str, *, what: str) -> VerificationError:
    """Return the error for an object that is not what it must be."""
    return VerificationError(
        f"the object {name} is damaged: {what}",
        remedy="run 'vmsnap verify --replica' to see what else is, and 'vmsnap verify --replica --repair' where the "
        "snapshot is also in the local store",
    )
