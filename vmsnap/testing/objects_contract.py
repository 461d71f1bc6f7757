# ruff: noqa: D102, S101 - a test suite, shipped for authors of drivers
"""What every implementation of ``ObjectStore`` must do. Subclass ``ObjectsContract`` and override its fixtures."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from vmsnap.errors import DriverError, HeldError, ObjectConflictError, ObjectNotFoundError
from vmsnap.model.guest import Severity
from vmsnap.ports.objects import ObjectInfo, ObjectStore

_HOUR = timedelta(hours=1)
_PATIENCE = 20.0


class ObjectsContract:
    """Duties of an object store.

    ``many`` is more than a page of a listing has; ``racers`` try the same at once; ``lock_seconds`` is how long an object
    is locked that has to go afterwards.
    """

    many = 1100
    racers = 8
    lock_seconds = 4.0

    @pytest.fixture
    def store(self) -> ObjectStore:
        """Return the implementation under test, over an empty place."""
        raise NotImplementedError

    @pytest.fixture
    def again(self, store: ObjectStore) -> ObjectStore:
        """Return what another process has of the same place."""
        raise NotImplementedError

    @pytest.fixture
    def locks(self) -> bool:
        """Tell whether the place can lock objects against removal."""
        raise NotImplementedError

    def test_what_was_put_is_read_whole_and_by_another_process(self, store: ObjectStore, again: ObjectStore) -> None:
        data = bytes(range(256)) * 40
        put = store.put("packs/ab/cdef-1_2.x", data=data)
        assert put.name == "packs/ab/cdef-1_2.x"
        assert put.size_bytes == len(data)
        for reader in (store, again):
            found = reader.get(put.name)
            assert found.data == data
            assert _essence(found.info) == _essence(put)
            assert _essence(reader.info(put.name)) == _essence(put)
            assert [_essence(one) for one in reader.list("packs/")] == [_essence(put)]

    def test_a_large_object_keeps_every_byte(self, store: ObjectStore) -> None:
        data = b"".join(number.to_bytes(8, "big") for number in range(17 << 17))
        store.put("large", data=data)
        assert store.get("large").data == data
        assert store.get_range("large", offset=(16 << 20) - 3, length=11) == data[(16 << 20) - 3 : (16 << 20) + 8]

    def test_putting_over_an_object_replaces_it(self, store: ObjectStore) -> None:
        first = store.put("a", data=b"one")
        second = store.put("a", data=b"other")
        assert store.get("a").data == b"other"
        assert first.version != second.version
        assert [one.size_bytes for one in store.list("")] == [5]

    def test_only_the_first_makes_a_new_object(self, store: ObjectStore, again: ObjectStore) -> None:
        store.put_new("lock", data=b"mine")
        for other in (store, again):
            with pytest.raises(ObjectConflictError):
                other.put_new("lock", data=b"theirs")
        assert again.get("lock").data == b"mine"
        store.delete("lock")
        again.put_new("lock", data=b"theirs")
        assert store.get("lock").data == b"theirs"

    def test_one_of_many_at_once_makes_a_new_object(self, store: ObjectStore, again: ObjectStore) -> None:
        def take(number: int) -> bool:
            try:
                (store, again)[number % 2].put_new("lock", data=b"%d" % number)
            except ObjectConflictError:
                return False
            return True

        won = self._at_once(take)
        assert won.count(True) == 1
        assert store.get("lock").data == b"%d" % won.index(True)

    def test_a_version_is_replaced_once(self, store: ObjectStore, again: ObjectStore) -> None:
        first = store.put("lease", data=b"first")
        second = again.replace("lease", data=b"second", version=first.version)
        assert _essence(store.info("lease")) == _essence(second)
        with pytest.raises(ObjectConflictError):
            store.replace("lease", data=b"third", version=first.version)
        assert store.get("lease").data == b"second"

    def test_what_is_gone_is_not_replaced(self, store: ObjectStore) -> None:
        info = store.put("lease", data=b"first")
        store.delete("lease")
        with pytest.raises(ObjectConflictError):
            store.replace("lease", data=b"second", version=info.version)
        assert list(store.list("")) == []

    def test_one_of_many_at_once_replaces_a_version(self, store: ObjectStore, again: ObjectStore) -> None:
        info = store.put("lease", data=b"before")

        def replace(number: int) -> bool:
            try:
                (store, again)[number % 2].replace("lease", data=b"by %d" % number, version=info.version)
            except ObjectConflictError:
                return False
            return True

        won = self._at_once(replace)
        assert won.count(True) == 1
        assert store.get("lease").data == b"by %d" % won.index(True)

    def test_what_is_not_there_is_not_found(self, store: ObjectStore) -> None:
        store.put("packs/abc", data=b"x")
        for read in (store.get, store.info):
            with pytest.raises(ObjectNotFoundError) as caught:
                read("packs/ab")
            assert "packs/ab" in str(caught.value)
        with pytest.raises(ObjectNotFoundError):
            store.get_range("packs/ab", offset=0, length=1)
        with pytest.raises(ObjectNotFoundError):
            store.info("packs")

    def test_parts_are_read(self, store: ObjectStore) -> None:
        store.put("a", data=b"0123456789")
        assert store.get_range("a", offset=0, length=1) == b"0"
        assert store.get_range("a", offset=3, length=4) == b"3456"
        assert store.get_range("a", offset=8, length=2) == b"89"

    @pytest.mark.parametrize(("offset", "length"), [(8, 3), (10, 1), (50, 5)])
    def test_a_part_beyond_the_end_is_an_error(self, store: ObjectStore, offset: int, length: int) -> None:
        store.put("a", data=b"0123456789")
        with pytest.raises(DriverError) as caught:
            store.get_range("a", offset=offset, length=length)
        assert not isinstance(caught.value, ObjectNotFoundError)
        assert not caught.value.transient

    def test_listings_are_in_the_order_of_names(self, store: ObjectStore) -> None:
        names = ["b/a", "a/b", "a/a-b", "a/ab", "a/a/b", "a/aB", "a/a.b", "ab", "a-", "a/a_b", "a0/1"]
        for name in names:
            store.put(name, data=name.encode())
        assert [one.name for one in store.list("")] == sorted(names)
        assert [one.name for one in store.list("a/")] == sorted(name for name in names if name.startswith("a/"))
        assert [one.name for one in store.list("a/a")] == sorted(name for name in names if name.startswith("a/a"))
        assert [one.name for one in store.list("a/a/b")] == ["a/a/b"]
        assert list(store.list("c")) == []
        assert list(store.list("a/a/bc")) == []

    def test_long_listings_are_whole(self, store: ObjectStore) -> None:
        names = [f"packs/{number % 7:02x}/{number:06x}" for number in range(self.many)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: store.put(name, data=b"x"), names))
        assert [one.name for one in store.list("packs/")] == sorted(names)

    def test_objects_may_go_while_they_are_listed(self, store: ObjectStore, again: ObjectStore) -> None:
        for number in range(20):
            store.put(f"a/{number:02}", data=b"x")
        seen = []
        for one in store.list("a/"):
            seen.append(one.name)
            again.delete(one.name)
        assert seen == [f"a/{number:02}" for number in range(20)]
        assert list(store.list("")) == []

    def test_a_deleted_object_is_gone_and_its_neighbours_are_not(self, store: ObjectStore, again: ObjectStore) -> None:
        for name in ("a/b", "a/bc", "a/b.c"):
            store.put(name, data=b"x")
        for _ in range(2):
            store.delete("a/b")
        assert [one.name for one in again.list("")] == ["a/b.c", "a/bc"]
        with pytest.raises(ObjectNotFoundError):
            again.get("a/b")
        store.delete("never/there")

    def test_a_name_can_be_used_again_after_all_under_it_is_gone(self, store: ObjectStore) -> None:
        store.put("a/b/c", data=b"x")
        store.delete("a/b/c")
        store.put("a/b", data=b"y")
        assert [one.name for one in store.list("")] == ["a/b"]

    def test_threads_do_not_get_into_each_others_way(self, store: ObjectStore) -> None:
        def work(number: int) -> bool:
            data = b"%d" % number * 1000
            store.put(f"t/{number}", data=data)
            return store.get(f"t/{number}").data == data and store.get_range(f"t/{number}", offset=0, length=1) != b""

        assert all(self._at_once(work))

    def test_looking_whether_it_can_be_used_leaves_nothing(self, store: ObjectStore) -> None:
        store.put("a", data=b"x")
        findings = store.findings()
        assert findings
        assert [one.message for one in findings if one.severity is Severity.REFUSAL] == []
        assert [one.name for one in store.list("")] == ["a"]

    def test_a_locked_object_is_not_removed(self, store: ObjectStore, again: ObjectStore, *, locks: bool) -> None:
        until = _now() + timedelta(seconds=self.lock_seconds)
        store.put("held", data=b"x", retain_until=until)
        store.put("free", data=b"x")
        store.delete("free")
        if not locks:
            store.delete("held")
            assert list(store.list("")) == []
            return
        found = again.info("held").retained_until
        assert found is not None
        assert abs(found - until) <= timedelta(seconds=1)
        with pytest.raises(HeldError):
            again.delete("held")
        assert again.get("held").data == b"x"
        assert [one.name for one in again.list("")] == ["held"]
        _eventually(lambda: store.delete("held"))
        assert list(store.list("")) == []

    def test_a_lock_is_made_longer_and_never_shorter(self, store: ObjectStore, *, locks: bool) -> None:
        made = _now()
        store.put_new("held", data=b"x", retain_until=made + timedelta(seconds=2))
        store.retain("held", until=made + timedelta(seconds=5))
        store.retain("held", until=made + timedelta(seconds=3))
        if not locks:
            assert store.info("held").retained_until is None
            return
        found = store.info("held").retained_until
        assert found is not None
        assert found >= made + timedelta(seconds=4)
        assert store.get("held").data == b"x"

    def test_what_had_no_lock_can_get_one(self, store: ObjectStore, *, locks: bool) -> None:
        store.put("a", data=b"x")
        store.retain("a", until=_now() + timedelta(seconds=3))
        assert (store.info("a").retained_until is not None) == locks
        if locks:
            with pytest.raises(HeldError):
                store.delete("a")

    def test_what_is_not_there_is_not_locked(self, store: ObjectStore, *, locks: bool) -> None:
        if locks:
            with pytest.raises(ObjectNotFoundError):
                store.retain("a", until=_now() + _HOUR)
        else:
            store.retain("a", until=_now() + _HOUR)

    def _at_once(self, work: Callable[[int], bool]) -> list[bool]:
        with ThreadPoolExecutor(self.racers) as pool:
            return list(pool.map(work, range(self.racers)))


def _essence(info: ObjectInfo) -> tuple[str, int, str]:
    """Return what every description of an object has."""
    return (info.name, info.size_bytes, info.version)


def _now() -> datetime:
    return datetime.now(UTC)


def _eventually(remove: Callable[[], None]) -> None:
    """Remove what is locked for a few seconds more."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return remove()
        except HeldError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
