"""Each kind of damage in a repository is found, and named: guest, snapshot, disk, blocks, object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmsnap.errors import CancelledError, SnapshotNotFoundError, StoreUnreachableError
from vmsnap.model.ids import SnapshotId
from vmsnap.model.verification import Checked, Share
from vmsnap.ports.clock import Cancel
from vmsnap.stores.blocks import BLOCK_BYTES
from vmsnap.stores.packs.manifests import Body, StoredDisk, encode_snapshot
from vmsnap.stores.packs.names import MAPS, PACKS, map_name, pack_name, snapshot_name
from vmsnap.stores.packs.reading import PackedDisk
from vmsnap.stores.packs.repository import Repository, open_repository
from vmsnap.stores.packs.verifying import Checking, check
from vmsnap.testing.cancels import CancelledAtOnce, NeverCancelled
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects, ObjectFault
from vmsnap.testing.packs_samples import KEY, NOW, Local, block, fresh, send

FIRST, SECOND = SnapshotId(f"{1:010x}"), SnapshotId(f"{2:010x}")
DISK = b"".join(map(block, (1, 2, 3, 4, 5, 0, 6, 7, 8, 9)))
CHANGED = block(11) + DISK[BLOCK_BYTES:]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A repository with two snapshots of a disk, the second with another first block."""

    bucket: MemoryBucket
    repository: Repository
    key: bytes | None

    def check(
        self, snapshot: SnapshotId = FIRST, *, share: Share | None = None, cancel: Cancel | None = None
    ) -> Checked:
        # As another process finds it, which remembers nothing.
        repository = open_repository(MemoryObjects(self.bucket), key=self.key)
        how = Checking(share=share, progress=lambda *_: None, cancel=cancel or NeverCancelled())
        return check(repository, guest="db", snapshot=snapshot, how=how)

    def disk(self, snapshot: SnapshotId = FIRST) -> PackedDisk:
        (disk,) = self.repository.snapshot("db", snapshot=snapshot).body.disks
        return PackedDisk(self.repository, root=bytes.fromhex(disk.root), size_bytes=len(DISK))

    def pack(self, number: int = 0) -> str:
        (wanted,) = self.disk().places(number, 1)
        assert wanted is not None
        return pack_name(wanted.place.pack)

    def leaf(self, snapshot: SnapshotId = FIRST) -> str:
        return map_name(self.disk(snapshot).root().leaves[0])

    def root(self, snapshot: SnapshotId = FIRST) -> str:
        return map_name(bytes.fromhex(self.repository.snapshot("db", snapshot=snapshot).body.disks[0].root))

    def data(self, name: str) -> bytes:
        return MemoryObjects(self.bucket).get(name).data


@pytest.fixture(params=[None, KEY], ids=["open", "keyed"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    bucket = MemoryBucket()
    repository = fresh(MemoryObjects(bucket), key=request.param)
    local = Local(folder=tmp_path)
    send(repository, copy=local.snapshot(1, disks={"vda": DISK}, nvram=b"variables"), index=tmp_path / "index")
    send(repository, copy=local.snapshot(2, disks={"vda": CHANGED}), index=tmp_path / "index")
    return Place(bucket=bucket, repository=repository, key=request.param)


def flipped(data: bytes, *, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def test_what_is_whole_has_no_defect(place: Place) -> None:
    assert place.check() == Checked(blocks=10, defects=())
    assert place.check(SECOND) == Checked(blocks=9, defects=())


def test_a_flipped_bit_costs_the_blocks_of_its_frame(place: Place) -> None:
    (wanted,) = place.disk().places(6, 1)
    assert wanted is not None
    pack = place.pack()
    place.bucket.damage(pack, data=flipped(place.data(pack), at=wanted.place.offset + 20))
    found = place.check()
    assert found.bad == {pack}
    assert all(line.startswith(f"snapshot {FIRST} of 'db', vda: block") and pack in line for line in found.defects)
    assert 6 <= found.blocks <= 9, "the blocks of the other frames are read"
    assert place.check(SECOND).bad == {pack}, "the block is shared"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda place, name: place.bucket.lose(name), "missing"),
        (lambda place, name: place.bucket.damage(name, data=place.data(name)[:1000]), "before"),
        (lambda place, name: place.bucket.damage(name, data=b"x"), "before"),
        (lambda place, name: place.bucket.damage(name, data=place.data(place.root()) * 9000), "damaged"),
    ],
    ids=["missing", "truncated", "nearly empty", "swapped"],
)
def test_a_bad_pack_is_named_with_its_blocks(place: Place, spoil: Callable[[Place, str], None], said: str) -> None:
    pack = place.pack()
    spoil(place, pack)
    found = place.check()
    assert pack in found.bad
    disk_lines = [line for line in found.defects if "vda" in line]
    assert any("blocks 0 to 4 (from byte 0)" in line and pack in line and said in line for line in disk_lines)
    assert any("blocks 6 to 9 (from byte 393216)" in line for line in disk_lines)


def test_packs_that_were_swapped_are_both_found(place: Place) -> None:
    names = [info.name for info in place.repository.store.list(PACKS)]
    one, other = (place.data(name) for name in names)
    place.bucket.damage(names[0], data=other)
    place.bucket.damage(names[1], data=one)
    assert place.check().bad
    assert place.check(SECOND).bad == set(names)


@pytest.mark.parametrize("kind", ["missing", "flipped", "stale"])
def test_a_bad_leaf_is_named_with_its_stretch(place: Place, kind: str) -> None:
    leaf = place.leaf(SECOND)
    if kind == "missing":
        place.bucket.lose(leaf)
    elif kind == "flipped":
        place.bucket.damage(leaf, data=flipped(place.data(leaf), at=60))
    else:  # the map of the state before, in the place of this one's
        place.bucket.damage(leaf, data=place.data(place.leaf(FIRST)))
    found = place.check(SECOND)
    assert found.bad == {leaf}
    (line,) = found.defects
    assert line.startswith(f"snapshot {SECOND} of 'db', vda: blocks 0 to 9 (from byte 0): ")
    assert leaf in line
    assert place.check(FIRST).defects == ()


def test_a_bad_root_is_named_with_its_disk(place: Place) -> None:
    root = place.root(SECOND)
    place.bucket.damage(root, data=place.data(root)[:-1])
    found = place.check(SECOND)
    assert found.bad == {root}
    assert "vda: all blocks" in found.defects[0]


def test_a_whole_map_of_another_state_is_stale(place: Place) -> None:
    """Everything is sound, and signed; but the manifest leads to the disk as it was before."""
    before, after = (place.repository.snapshot("db", snapshot=one).body for one in (FIRST, SECOND))
    body = Body(manifest=after.manifest, disks=(StoredDisk(target="vda", root=before.disks[0].root),))
    seal = place.repository.seal
    data = encode_snapshot(body, repository=place.repository.id, upload="0" * 32, at=NOW, seal=seal)
    place.bucket.damage(snapshot_name("db", snapshot=SECOND), data=data)
    found = place.check(SECOND)
    assert found.bad == {map_name(bytes.fromhex(before.disks[0].root))}
    assert "of another state of the disk than the manifest vouches for" in found.defects[0]
    shared = place.check(SECOND, share=Share(number=0, of=2))
    assert bool(shared.defects) == (place.key is None), "with a key, only blocks that are read can vouch for the disk"


def test_a_manifest_from_another_repository_or_name_is_refused(place: Place, tmp_path: Path) -> None:
    name = snapshot_name("db", snapshot=FIRST)
    other = fresh(MemoryObjects(MemoryBucket()), key=place.key)
    (tmp_path / "other").mkdir()
    copy = Local(folder=tmp_path / "other").snapshot(1, disks={"vda": DISK})
    send(other, copy=copy, index=tmp_path / "other index")
    for data, said in (
        (other.store.get(name).data, f"it is from repository {other.id}"),
        (place.data(snapshot_name("db", snapshot=SECOND)), "under another name"),
        (flipped(place.data(name), at=len(place.data(name)) // 2), "damaged"),
        (place.data(name)[:-40], "damaged"),
    ):
        place.bucket.damage(name, data=data)
        found = place.check()
        assert found.bad == {name}
        assert found.defects[0].startswith(f"snapshot {FIRST} of 'db': ")
        assert said in found.defects[0]
        assert name in found.defects[0]


def test_bad_firmware_variables_are_named(place: Place) -> None:
    file = place.repository.snapshot("db", snapshot=FIRST).body.files[0]
    place.bucket.lose(map_name(bytes.fromhex(file.root)))
    (line,) = place.check().defects
    assert "nvram.fd" in line


def test_the_shares_of_all_days_are_the_whole(tmp_path: Path) -> None:
    bucket = MemoryBucket()
    repository = fresh(MemoryObjects(bucket))
    local = Local(folder=tmp_path)
    for number in range(1, 9):  # a pack each
        seeds = [*range(1, number), 100 + number]
        disk = b"".join(map(block, seeds))
        send(repository, copy=local.snapshot(number, disks={"vda": disk}), index=tmp_path / "index")
    place = Place(bucket=bucket, repository=repository, key=None)
    last = SnapshotId(f"{8:010x}")
    whole = place.check(last)
    parts = [place.check(last, share=Share(number=number, of=3)) for number in range(3)]
    assert sum(part.blocks for part in parts) == whole.blocks == 8
    assert len([part for part in parts if part.blocks]) > 1
    packs = [info.name for info in repository.store.list(PACKS)]
    for pack in packs:
        bucket.damage(pack, data=b"x")
    assert set().union(*(place.check(last, share=Share(number=number, of=3)).bad for number in range(3))) == set(
        place.check(last).bad
    )


def test_what_cannot_be_reached_is_no_damage(place: Place) -> None:
    count = len(FaultyObjects(MemoryObjects(place.bucket)).calls)
    assert count == 0
    for call in range(1, 6):
        faulty = FaultyObjects(MemoryObjects(place.bucket), faults={call: ObjectFault.FAIL_BEFORE})
        repository = open_repository(faulty, key=place.key)
        how = Checking(connections=1, progress=lambda *_: None, cancel=NeverCancelled())
        with pytest.raises(StoreUnreachableError):
            check(repository, guest="db", snapshot=FIRST, how=how)


def test_it_can_be_cancelled_and_a_snapshot_that_is_not_there_is_told(place: Place) -> None:
    with pytest.raises(CancelledError):
        place.check(cancel=CancelledAtOnce())
    with pytest.raises(SnapshotNotFoundError):
        place.check(SnapshotId(f"{9:010x}"))


def test_nothing_is_changed_by_checking(place: Place) -> None:
    before = [(info.name, info.version) for info in place.repository.store.list("")]
    place.bucket.lose(next(info.name for info in place.repository.store.list(MAPS)))
    place.check()
    place.check(SECOND)
    after = [(info.name, info.version) for info in place.repository.store.list("")]
    assert set(after) <= set(before)
