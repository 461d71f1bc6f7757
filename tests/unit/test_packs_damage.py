"""Objects that are damaged, missing, swapped, stale or another repository's are refused, and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmsnap.errors import ConfigError, DriverError, PreconditionError, SnapshotNotFoundError, VerificationError
from vmsnap.model.ids import SnapshotId
from vmsnap.stores.packs.names import MAPS, PACKS, REPOSITORY, snapshot_name
from vmsnap.stores.packs.repository import Repository, initialise, open_repository
from vmsnap.stores.packs.uploading import load_index
from vmsnap.testing.memory_objects import MemoryBucket, MemoryObjects
from vmsnap.testing.packs_samples import KEY, NOW, Local, block, disks_of, fresh, send

FIRST = {"vda": block(1) + block(2) + block(3)}
SECOND = {"vda": block(4) + block(2) + block(3)}


@pytest.fixture(params=[None, KEY], ids=["open", "keyed"])
def key(request: pytest.FixtureRequest) -> bytes | None:
    found: bytes | None = request.param
    return found


@pytest.fixture
def bucket(tmp_path: Path, key: bytes | None) -> MemoryBucket:
    bucket, local = MemoryBucket(), Local(folder=tmp_path)
    repository = fresh(MemoryObjects(bucket), key=key)
    for number, disks in ((1, FIRST), (2, SECOND)):
        send(repository, copy=local.snapshot(number, disks=disks), index=tmp_path / "index")
    return bucket


def over(bucket: MemoryBucket, key: bytes | None) -> Repository:
    return open_repository(MemoryObjects(bucket), key=key)


def name_of(number: int) -> str:
    return snapshot_name("db", snapshot=SnapshotId(f"{number:010x}"))


def refused(bucket: MemoryBucket, key: bytes | None, *, naming: str, number: int = 1) -> str:
    with pytest.raises(VerificationError) as caught:
        disks_of(over(bucket, key), number=number)
    assert naming in caught.value.brief
    assert caught.value.remedy
    return caught.value.brief


def names(bucket: MemoryBucket, prefix: str) -> list[str]:
    return [info.name for info in MemoryObjects(bucket).list(prefix)]


def flip(bucket: MemoryBucket, name: str, *, at: int) -> None:
    data = bytearray(bucket.objects[name].data)
    data[at] ^= 1
    bucket.damage(name, data=bytes(data))


def test_every_flipped_byte_of_a_map_is_found(bucket: MemoryBucket, key: bytes | None) -> None:
    for name in names(bucket, MAPS):
        whole = bucket.objects[name].data
        for at in (0, 9, 20, len(whole) // 2, len(whole) - 1):
            flip(bucket, name, at=at)
            found = []
            for number in (1, 2):
                try:
                    disks_of(over(bucket, key), number=number)
                except VerificationError as error:
                    found.append(error.brief)
            assert found
            assert all(name in brief for brief in found)
            bucket.damage(name, data=whole)


def test_a_damaged_block_is_found(bucket: MemoryBucket, key: bytes | None) -> None:
    for name in names(bucket, PACKS):
        flip(bucket, name, at=500)
    refused(bucket, key, naming="packs/")


def test_a_damaged_index_of_a_pack_is_found(bucket: MemoryBucket, key: bytes | None) -> None:
    repository = over(bucket, key)
    for name in names(bucket, PACKS):
        whole = bucket.objects[name].data
        for back in (1, 10, 30, 47, 60):
            flip(bucket, name, at=len(whole) - back)
            try:
                load_index(repository, pack=bytes.fromhex(name[-64:]), size_bytes=len(whole))
            except VerificationError as error:
                assert name in error.brief  # noqa: PT017 - the token, alone, vouches for nothing
            else:
                assert 32 < back <= 48
            bucket.damage(name, data=whole)


def test_a_missing_pack_and_a_missing_map_are_named(bucket: MemoryBucket, key: bytes | None) -> None:
    for name in names(bucket, PACKS):
        bucket.lose(name)
    assert "is missing" in refused(bucket, key, naming="packs/")
    for name in names(bucket, MAPS):
        bucket.lose(name)
    with pytest.raises(DriverError, match="maps/"):
        disks_of(over(bucket, key))


def test_a_truncated_pack_is_found(bucket: MemoryBucket, key: bytes | None) -> None:
    for name in names(bucket, PACKS):
        bucket.damage(name, data=bucket.objects[name].data[:100])
    with pytest.raises((VerificationError, DriverError), match="packs/"):
        disks_of(over(bucket, key))


def test_a_pack_in_anothers_place_is_found(bucket: MemoryBucket, key: bytes | None) -> None:
    first, second = names(bucket, PACKS)
    one, other = bucket.objects[first].data, bucket.objects[second].data
    bucket.damage(first, data=other.ljust(len(one), b"\0"))
    bucket.damage(second, data=one)
    refused(bucket, key, naming="packs/", number=2)


def test_an_older_map_in_a_newer_ones_place_is_found(bucket: MemoryBucket, key: bytes | None) -> None:
    repository = over(bucket, key)
    old, new = (repository.snapshot("db", snapshot=SnapshotId(f"{one:010x}")).body.disks[0].root for one in (1, 2))
    stale = bucket.objects[f"maps/{old[:2]}/{old}"].data
    bucket.damage(f"maps/{new[:2]}/{new}", data=stale)
    refused(bucket, key, naming=f"maps/{new[:2]}/{new}", number=2)


def test_a_changed_manifest_is_found(bucket: MemoryBucket, key: bytes | None) -> None:
    text = bucket.objects[name_of(1)].data
    changed = (
        text.replace(b'"vcpus": 1', b'"vcpus": 2') if key is None else text.replace(b'"sealed": "', b'"sealed": "A')
    )
    assert changed != text
    bucket.damage(name_of(1), data=changed)
    refused(bucket, key, naming=name_of(1))
    bucket.damage(name_of(1), data=text[:200])
    refused(bucket, key, naming=name_of(1))


def test_a_manifest_under_another_name_is_found(bucket: MemoryBucket, key: bytes | None) -> None:
    bucket.damage(name_of(1), data=bucket.objects[name_of(2)].data)
    assert "under another name" in refused(bucket, key, naming=name_of(1))
    # It stops nobody from reading the others.
    found = dict(over(bucket, key).entries("db"))
    assert isinstance(found[name_of(1)], VerificationError)
    assert not isinstance(found[name_of(2)], VerificationError)


def test_a_manifest_from_another_repository_is_found(bucket: MemoryBucket, key: bytes | None, tmp_path: Path) -> None:
    other, local = MemoryBucket(), Local(folder=tmp_path / "other")
    local.folder.mkdir()
    repository = fresh(MemoryObjects(other), key=key)
    send(repository, copy=local.snapshot(1, disks=FIRST), index=tmp_path / "other-index")
    bucket.damage(name_of(1), data=other.objects[name_of(1)].data)
    assert repository.id in refused(bucket, key, naming=name_of(1))


def test_keys_are_looked_at_before_anything_is_read(bucket: MemoryBucket, key: bytes | None) -> None:
    wrong = [bytes(32)] if key is None else [None, bytes(32)]
    for other in wrong:
        with pytest.raises(ConfigError):
            over(bucket, other)


def test_a_lost_description_is_not_made_anew(bucket: MemoryBucket, key: bytes | None) -> None:
    bucket.lose(REPOSITORY)
    with pytest.raises(PreconditionError, match="is gone"):
        initialise(MemoryObjects(bucket), key=key, now=NOW)


def test_what_was_never_there_is_not_found(bucket: MemoryBucket, key: bytes | None) -> None:
    with pytest.raises(SnapshotNotFoundError):
        disks_of(over(bucket, key), number=3)


def test_what_is_damaged_there_keeps_nothing_new_from_being_sent(
    bucket: MemoryBucket, key: bytes | None, tmp_path: Path
) -> None:
    third = {"vda": block(5) + block(2) + block(3)}
    (tmp_path / "new").mkdir()
    copy = Local(folder=tmp_path / "new").snapshot(3, disks=third)
    for name in names(bucket, MAPS):
        flip(bucket, name, at=40)
    send(over(bucket, key), copy=copy, index=tmp_path / "another index")
    assert disks_of(over(bucket, key), number=3) == third
    bucket.damage(name_of(3), data=b"{}")
    bucket.damage(name_of(2), data=b"{}")
    fourth = Local(folder=tmp_path / "new").snapshot(4, disks=third)
    send(over(bucket, key), copy=fourth, index=tmp_path / "a third index")
    assert disks_of(over(bucket, key), number=4) == third
