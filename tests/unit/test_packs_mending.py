"""A damaged repository is repaired from an intact copy, whatever is damaged and wherever the repair is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmsnap.errors import SnapshotNotFoundError, VerificationError
from vmsnap.model.ids import SnapshotId
from vmsnap.model.verification import Checked
from vmsnap.ports.objects import ObjectStore
from vmsnap.ports.replica import LocalCopy
from vmsnap.stores.packs.index import BlockIndex
from vmsnap.stores.packs.intents import new_token
from vmsnap.stores.packs.mending import mend
from vmsnap.stores.packs.names import INTENTS, MAPS, PACKS, map_name, snapshot_name
from vmsnap.stores.packs.removing import remove
from vmsnap.stores.packs.repository import Repository, open_repository
from vmsnap.stores.packs.uploading import Means
from vmsnap.stores.packs.verifying import Checking, check
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects, ObjectFault
from vmsnap.testing.memory_state import ProcessDied
from vmsnap.testing.packs_samples import KEY, NOW, Local, block, disks_of, fresh, send

FIRST, SECOND = SnapshotId(f"{1:010x}"), SnapshotId(f"{2:010x}")
DISK = b"".join(map(block, (1, 2, 3, 4, 5, 0, 6)))
CHANGED = block(11) + DISK[len(block(1)) :]


@dataclass(kw_only=True)
class Place:
    bucket: MemoryBucket
    key: bytes | None
    first: LocalCopy
    second: LocalCopy
    folder: Path
    mends: int = 0

    @property
    def store(self) -> MemoryObjects:
        return MemoryObjects(self.bucket)

    def names(self, prefix: str) -> list[str]:
        return [info.name for info in self.store.list(prefix)]

    def open(self, store: ObjectStore | None = None) -> Repository:
        return open_repository(store or self.store, key=self.key)

    def check(self, snapshot: SnapshotId) -> Checked:
        how = Checking(connections=1, progress=lambda *_: None, cancel=NeverCancelled())
        return check(self.open(), guest="db", snapshot=snapshot, how=how)

    def mend(self, copy: LocalCopy, *, store: ObjectStore | None = None) -> None:
        found = self.check(copy.snapshot.id)
        self.mends += 1
        with self.index() as index:
            mend(
                self.open(store),
                copy=copy,
                found=found,
                means=Means(upload=new_token(), host="here", connections=1, now=lambda: NOW),
                index=index,
                progress=lambda *_: None,
                cancel=NeverCancelled(),
            )

    @contextmanager
    def index(self) -> Iterator[BlockIndex]:
        index = BlockIndex(self.folder / f"index{self.mends % 2}")
        try:
            yield index
        finally:
            index.close()

    def is_whole(self) -> bool:
        repository = self.open()
        assert disks_of(repository, number=1) == {"vda": DISK}
        assert disks_of(repository, number=2) == {"vda": CHANGED}
        return not self.check(FIRST).defects and not self.check(SECOND).defects


@pytest.fixture(params=[None, KEY], ids=["open", "keyed"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    bucket, local = MemoryBucket(), Local(folder=tmp_path)
    repository = fresh(MemoryObjects(bucket), key=request.param)
    first = local.snapshot(1, disks={"vda": DISK}, nvram=b"variables")
    second = local.snapshot(2, disks={"vda": CHANGED})
    for copy in (first, second):
        send(repository, copy=copy, index=tmp_path / "index0")
    return Place(bucket=bucket, key=request.param, first=first, second=second, folder=tmp_path)


def flip(place: Place, name: str, *, at: int) -> None:
    data = place.store.get(name).data
    place.bucket.damage(name, data=data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def swap(place: Place, names: list[str]) -> None:
    one, other = (place.store.get(name).data for name in names)
    place.bucket.damage(names[0], data=other)
    place.bucket.damage(names[1], data=one)


def lose(place: Place, names: list[str]) -> None:
    for name in names:
        place.bucket.lose(name)


def root_of(place: Place, snapshot: SnapshotId) -> str:
    body = place.open().snapshot("db", snapshot=snapshot).body
    return map_name(bytes.fromhex(body.disks[0].root))


def each_pack(place: Place, *, spoil: Callable[[bytes], bytes]) -> None:
    for name in place.names(PACKS):
        place.bucket.damage(name, data=spoil(place.store.get(name).data))


def manifest(place: Place, data: bytes) -> None:
    place.bucket.damage(snapshot_name("db", snapshot=FIRST), data=data)


DAMAGE: dict[str, Callable[[Place], None]] = {
    "a flipped bit in a pack": lambda place: flip(place, place.names(PACKS)[0], at=50),
    "flipped bits in all packs": lambda place: each_pack(place, spoil=lambda data: b"!" + data[1:]),
    "packs without their end": lambda place: each_pack(place, spoil=lambda data: data[:-30]),
    "missing packs": lambda place: lose(place, place.names(PACKS)),
    "swapped packs": lambda place: swap(place, place.names(PACKS)),
    "missing maps": lambda place: lose(place, place.names(MAPS)),
    "a flipped bit in a root": lambda place: flip(place, root_of(place, FIRST), at=60),
    "swapped roots": lambda place: swap(place, [root_of(place, FIRST), root_of(place, SECOND)]),
    "a manifest that is cut": lambda place: manifest(place, b"{"),
    "a manifest of another snapshot": lambda place: manifest(
        place, place.store.get(snapshot_name("db", snapshot=SECOND)).data
    ),
    "everything": lambda place: lose(place, [*place.names(PACKS), *place.names(MAPS)]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_repaired_from_the_copy(place: Place, damage: Callable[[Place], None]) -> None:
    damage(place)
    for copy in (place.first, place.second):
        if place.check(copy.snapshot.id).defects:
            place.mend(copy)
    assert place.is_whole()
    assert place.names(INTENTS) == []


@pytest.mark.parametrize("kind", ["missing packs", "flipped bits in all packs"])
def test_one_copy_repairs_what_other_snapshots_share(place: Place, kind: str) -> None:
    """The first snapshot has no copy here any more; what it shares with the second is readable again."""
    packs_before = place.names(PACKS)
    DAMAGE[kind](place)
    bad_before = len(place.check(FIRST).defects)
    place.mend(place.second)
    assert place.check(SECOND).defects == ()
    after = place.check(FIRST)
    # Its own first block, and its firmware variables, are nowhere else.
    assert all("vda: block 0 (" in line or "nvram" in line for line in after.defects), after.defects
    assert bad_before
    assert set(packs_before) != set(place.names(PACKS))


def test_a_copy_that_is_damaged_itself_repairs_nothing(place: Place) -> None:
    DAMAGE["missing packs"](place)
    image = place.first.disks[0].image
    image.write_bytes(b"!" + image.read_bytes()[1:])
    before = {name: place.store.get(name).data for name in place.names("snapshots/")}
    with pytest.raises(VerificationError):
        place.mend(place.first)
    assert {name: place.store.get(name).data for name in place.names("snapshots/")} == before


def test_what_was_removed_stays_removed(place: Place) -> None:
    found = place.check(FIRST)
    remove(place.open(), guest="db", snapshot=FIRST, now=NOW)
    with place.index() as index, pytest.raises(SnapshotNotFoundError):
        mend(
            place.open(),
            copy=place.first,
            found=found,
            means=Means(upload=new_token(), host="here", now=lambda: NOW),
            index=index,
            progress=lambda *_: None,
            cancel=NeverCancelled(),
        )


@pytest.mark.parametrize("fault", [ObjectFault.DIE_BEFORE, ObjectFault.DIE_AFTER])
@pytest.mark.parametrize("kind", ["flipped bits in all packs", "swapped roots"])
def test_a_repair_that_dies_anywhere_makes_nothing_worse(place: Place, kind: str, fault: ObjectFault) -> None:
    DAMAGE[kind](place)
    saved = dict(place.bucket.objects)
    readable = {one: place.check(one).blocks for one in (FIRST, SECOND)}
    number = 0
    while True:
        place.bucket.objects.clear()
        place.bucket.objects.update(saved)
        faulty = FaultyObjects(place.store, faults={number: fault})
        with suppress(ProcessDied):
            place.mend(place.first, store=faulty)
        for one, blocks in readable.items():
            assert place.check(one).blocks >= blocks, f"call {number}"
        if not faulty.dead:
            break
        for copy in (place.first, place.second):
            if place.check(copy.snapshot.id).defects:
                place.mend(copy)
        assert place.is_whole(), f"call {number}"
        number += 1
    assert number > 10
