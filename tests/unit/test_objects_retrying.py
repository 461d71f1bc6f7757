from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.errors import BugError, DriverError, ObjectConflictError, StoreUnreachableError
from vmsnap.ports.objects import ObjectInfo
from vmsnap.stores.objects.ordering import in_order
from vmsnap.stores.objects.pacing import Pace, PacedObjects
from vmsnap.stores.objects.retrying import Patience, Repeating, RetryingObjects
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects, ObjectCall, ObjectFault
from vmsnap.testing.objects_contract import ObjectsContract


class HandClock:
    """A clock that goes on only while somebody waits. ``cut_at``: the wait of that number ends at once."""

    def __init__(self, *, cut_at: int | None = None) -> None:
        self.seconds = 0.0
        self.waits: list[float] = []
        self._cut_at = cut_at

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, duration: timedelta) -> None:
        if len(self.waits) != self._cut_at:
            self.seconds += duration.total_seconds()
        self.waits.append(duration.total_seconds())


class Failing:
    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return "done"


def gone() -> StoreUnreachableError:
    return StoreUnreachableError("the server did not answer", details="reset", remedy="look")


def test_what_passes_is_waited_for_longer_each_time(caplog: pytest.LogCaptureFixture) -> None:
    clock = HandClock()
    work = Failing(*(gone() for _ in range(9)))
    patience = Patience(first=timedelta(seconds=1), longest=timedelta(seconds=20))
    with caplog.at_level(logging.INFO, logger=Repeating.__module__):
        assert Repeating(clock=clock, patience=patience, part=lambda: 1.0)(work)() == "done"
    assert clock.waits == [1, 2, 4, 8, 16, 20, 20, 20, 20]
    assert [record.levelname for record in caplog.records] == ["WARNING"] + ["INFO"] * 8
    assert "the server did not answer; trying again in 1.0 s" in caplog.text


def test_waits_are_random_between_half_and_all() -> None:
    clock = HandClock()
    parts = iter([0.0, 0.5, 1.0])
    patience = Patience(first=timedelta(seconds=1))
    Repeating(clock=clock, patience=patience, part=lambda: next(parts))(Failing(gone(), gone(), gone()))()
    assert clock.waits == [0.5, 1.5, 4.0]


def test_it_gives_up_in_time_and_says_how_often_it_tried() -> None:
    clock = HandClock()
    work = Failing(*(gone() for _ in range(99)))
    with pytest.raises(StoreUnreachableError) as caught:
        Repeating(clock=clock, patience=Patience(give_up_after=timedelta(seconds=10)), part=lambda: 1.0)(work)()
    assert clock.seconds <= 10
    assert caught.value.details == f"reset\ntried {work.calls} times in {clock.seconds:.0f} s"
    assert caught.value.remedy == "look"


@pytest.mark.parametrize("error", [DriverError("no"), ObjectConflictError("no"), BugError("no"), KeyError("no")])
def test_what_does_not_pass_is_told_at_once(error: Exception) -> None:
    clock = HandClock()
    with pytest.raises(type(error)):
        Repeating(clock=clock)(Failing(error))()
    assert clock.waits == []


def test_a_run_that_is_cancelled_does_not_try_again() -> None:
    clock = HandClock(cut_at=1)
    work = Failing(*(gone() for _ in range(9)))
    with pytest.raises(StoreUnreachableError):
        Repeating(clock=clock)(work)()
    assert work.calls == 2


class TestRetryingObjects(ObjectsContract):
    """The contract, with a fault at every other call."""

    lock_seconds = 0.3

    @pytest.fixture
    def locks(self) -> bool:
        return True

    @pytest.fixture
    def bucket(self) -> MemoryBucket:
        return MemoryBucket()

    @pytest.fixture
    def store(self, bucket: MemoryBucket) -> RetryingObjects:
        return retrying(bucket)

    @pytest.fixture
    def again(self, bucket: MemoryBucket) -> RetryingObjects:
        return retrying(bucket)


def retrying(bucket: MemoryBucket) -> RetryingObjects:
    faults = dict(zip(range(0, 9000, 2), itertools.cycle([ObjectFault.FAIL_AFTER, ObjectFault.FAIL_BEFORE])))
    faulty = FaultyObjects(MemoryObjects(bucket), faults=faults)
    patience = Patience(give_up_after=timedelta(hours=1))
    return RetryingObjects(faulty, repeating=Repeating(clock=HandClock(), patience=patience))


def doubtful(bucket: MemoryBucket) -> RetryingObjects:
    faulty = FaultyObjects(MemoryObjects(bucket), faults={0: ObjectFault.FAIL_AFTER})
    return RetryingObjects(faulty, repeating=Repeating(clock=HandClock()))


def test_a_condition_that_ones_own_lost_write_broke_is_none() -> None:
    bucket = MemoryBucket()
    made = doubtful(bucket).put_new("lease", data=b"mine")
    assert MemoryObjects(bucket).info("lease") == made
    replaced = doubtful(bucket).replace("lease", data=b"mine again", version=made.version)
    assert MemoryObjects(bucket).info("lease") == replaced


def test_a_condition_that_somebody_else_broke_is_one() -> None:
    bucket = MemoryBucket()
    somebody = MemoryObjects(bucket)

    def steal(name: str) -> RetryingObjects:
        def on_call(call: ObjectCall) -> None:
            if call.number == 1:
                somebody.put(name, data=b"theirs")

        faulty = FaultyObjects(somebody, faults={0: ObjectFault.FAIL_BEFORE}, on_call=on_call)
        return RetryingObjects(faulty, repeating=Repeating(clock=HandClock()))

    with pytest.raises(ObjectConflictError):
        steal("a").put_new("a", data=b"mine")
    version = somebody.put("b", data=b"before").version
    with pytest.raises(ObjectConflictError):
        steal("b").replace("b", data=b"mine", version=version)


# Pace


def test_bytes_take_their_time() -> None:
    clock = HandClock()
    pace = Pace(1000, clock=clock)
    for _ in range(4):
        pace.take(500)
    assert clock.seconds == 1.5
    clock.seconds = 100.0
    pace.take(500)
    assert clock.seconds == 100.0, "time that passed unused is not saved up"
    pace.take(1)
    assert clock.seconds == 100.5


def test_sending_and_receiving_are_paced_each() -> None:
    clock = HandClock()
    store = PacedObjects(MemoryObjects(MemoryBucket()), bytes_per_second=100, clock=clock)
    store.put("a", data=bytes(100))
    store.get("a")
    assert clock.seconds == 0
    store.put_new("b", data=bytes(100))
    assert clock.seconds == 1
    store.get("a")
    store.get_range("a", offset=0, length=50)
    assert clock.seconds == 2
    store.replace("b", data=b"y", version=store.info("b").version)
    assert [one.name for one in store.list("")] == ["a", "b"]
    store.delete("a")


class TestPacedObjects(ObjectsContract):
    lock_seconds = 0.3

    @pytest.fixture
    def locks(self) -> bool:
        return True

    @pytest.fixture
    def store(self) -> PacedObjects:
        return PacedObjects(MemoryObjects(MemoryBucket()), bytes_per_second=1e9, clock=HandClock())

    @pytest.fixture
    def again(self, store: PacedObjects) -> PacedObjects:
        return store


# Order

names = st.lists(st.text("a0-._", min_size=1, max_size=3), min_size=1, max_size=4).map("/".join)


@given(st.sets(names, max_size=30), st.sampled_from(["", "a/", "a", "a-/a/"]))
def test_a_walk_through_folders_is_put_in_order(found: set[str], prefix: str) -> None:
    matching = [name for name in found if name.startswith(prefix)]
    for listing in (sorted(matching), sorted(matching, key=lambda name: name.split("/"))):
        infos = (ObjectInfo(name=name, size_bytes=0, version="") for name in listing)
        assert [one.name for one in in_order(infos, prefix=prefix)] == sorted(matching)


def test_little_is_held_back() -> None:
    given_out = []

    def listing() -> Iterator[ObjectInfo]:
        for folder in ("00", "01", "02"):
            for number in range(3):
                given_out.append(folder)
                yield ObjectInfo(name=f"packs/{folder}/{number}", size_bytes=0, version="")

    first = next(in_order(listing(), prefix="packs/"))
    assert first.name == "packs/00/0"
    assert given_out == ["00"] * 3 + ["01"]
