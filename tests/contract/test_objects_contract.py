"""The contract of object stores, over the fake and over a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmsnap.errors import StoreUnreachableError
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.objects.directory import DirectoryObjects
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects, ObjectFault
from vmsnap.testing.memory_state import ProcessDied
from vmsnap.testing.objects_contract import ObjectsContract


class TestMemoryObjects(ObjectsContract):
    lock_seconds = 0.3

    @pytest.fixture(params=[True, False], ids=["with locks", "without locks"])
    def locks(self, request: pytest.FixtureRequest) -> bool:
        return bool(request.param)

    @pytest.fixture
    def bucket(self, *, locks: bool) -> MemoryBucket:
        return MemoryBucket(locks=locks)

    @pytest.fixture
    def store(self, bucket: MemoryBucket) -> ObjectStore:
        return MemoryObjects(bucket)

    @pytest.fixture
    def again(self, bucket: MemoryBucket) -> ObjectStore:
        return FaultyObjects(MemoryObjects(bucket))


class TestDirectoryObjects(ObjectsContract):
    many = 300

    @pytest.fixture
    def locks(self) -> bool:
        return False

    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return DirectoryObjects(tmp_path)

    @pytest.fixture
    def again(self, tmp_path: Path, store: ObjectStore) -> ObjectStore:
        return DirectoryObjects(tmp_path)


class TestFaults:
    def test_a_call_fails_before_or_after_its_effect(self) -> None:
        bucket = MemoryBucket()
        faulty = FaultyObjects(MemoryObjects(bucket), faults={1: ObjectFault.FAIL_BEFORE, 2: ObjectFault.FAIL_AFTER})
        faulty.put("a", data=b"1")
        for name in ("b", "c"):
            with pytest.raises(StoreUnreachableError):
                faulty.put(name, data=b"1")
        assert [one.name for one in faulty.list("")] == ["a", "c"]
        assert [(call.method, call.name) for call in faulty.calls] == [
            ("put", "a"), ("put", "b"), ("put", "c"), ("list", ""),
        ]  # fmt: skip

    @pytest.mark.parametrize("fault", [ObjectFault.DIE_BEFORE, ObjectFault.DIE_AFTER])
    def test_the_dead_do_nothing_any_more(self, fault: ObjectFault) -> None:
        bucket = MemoryBucket()
        faulty = FaultyObjects(MemoryObjects(bucket), faults={0: fault})
        for _ in range(2):
            with pytest.raises(ProcessDied):
                faulty.put("a", data=b"1")
        assert list(bucket.objects) == (["a"] if fault is ObjectFault.DIE_AFTER else [])

    def test_a_listing_is_cut(self) -> None:
        store = MemoryObjects(MemoryBucket())
        for name in "abcd":
            store.put(name, data=b"1")
        listing = FaultyObjects(store, faults={0: ObjectFault.FAIL_AFTER}).list("")
        assert [next(listing).name, next(listing).name] == ["a", "b"]
        with pytest.raises(StoreUnreachableError):
            next(listing)
