from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from vmsnap.errors import SnapshotNotFoundError
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.stores.packs import holds
from vmsnap.testing.memory_objects import MemoryBucket, MemoryObjects

NOW = datetime(2026, 11, 21, 2, tzinfo=UTC)
ONE, OTHER = SnapshotId("a" * 10), SnapshotId("b" * 10)
RUN = RunId("0123456789")


def record(snapshot: SnapshotId = ONE, *, until: datetime = NOW + holds.LASTS) -> holds.HoldRecord:
    return holds.HoldRecord(snapshot=snapshot, run=RUN, host="here", since=NOW, until=until)


def test_a_hold_lasts_until_it_is_released() -> None:
    objects = MemoryObjects(MemoryBucket())
    holds.take(objects, hold=record(), exists=lambda: True)
    holds.take(objects, hold=record(OTHER), exists=lambda: True)
    assert set(holds.held(objects, now=NOW)) == {ONE, OTHER}
    holds.release(objects, snapshot=ONE, run=RUN)
    holds.release(objects, snapshot=ONE, run=RUN)
    assert [hold.host for hold in holds.held(objects, now=NOW)[OTHER]] == ["here"]
    assert ONE not in holds.held(objects, now=NOW)


def test_a_hold_that_nobody_renews_ends() -> None:
    objects = MemoryObjects(MemoryBucket())
    holds.take(objects, hold=record(), exists=lambda: True)
    later = NOW + holds.LASTS + timedelta(seconds=1)
    assert holds.held(objects, now=later) == {}
    holds.take(objects, hold=record(until=later + holds.LASTS), exists=lambda: True)
    assert set(holds.held(objects, now=later)) == {ONE}


def test_one_that_cannot_be_read_holds() -> None:
    objects = MemoryObjects(MemoryBucket())
    objects.put(holds.name_of(ONE, run=RUN), data=b"torn {")
    assert holds.held(objects, now=NOW)[ONE][0].until is None


def test_a_snapshot_that_goes_meanwhile_is_not_held() -> None:
    objects = MemoryObjects(MemoryBucket())
    with pytest.raises(SnapshotNotFoundError):
        holds.take(objects, hold=record(), exists=lambda: False)
    assert holds.held(objects, now=NOW) == {}
