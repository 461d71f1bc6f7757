"""Which snapshot a reference names, and what is said where it names none."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.errors import SnapshotNotFoundError
from vmsnap.model.ids import RunId
from vmsnap.model.manifest import DiskRecord, Snapshot
from vmsnap.stores.publishing import usable_base
from vmsnap.stores.references import by_age, resolve
from vmsnap.testing.store_contract import NOON, sample_manifest

DISK = DiskRecord(
    target="vda", image="vda.raw", digests="vda.digests", digests_sha256="0", size_bytes=1, data_bytes=0, new_bytes=0
)


def snapshot(identity: str, *, guest: str = "db1", captured: datetime = NOON) -> Snapshot:
    return Snapshot(manifest=sample_manifest(RunId(identity), guest=guest, disks=(DISK,), captured=captured))


FIRST = snapshot("aaaa000001", captured=NOON)
SECOND = snapshot("aaaa000002", captured=NOON + timedelta(hours=1))
NOW = NOON + timedelta(days=9)
AT_SIGN = snapshot("bbbb000003", guest="me@home", captured=NOON)
ALL = (SECOND, AT_SIGN, FIRST)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("aaaa000001", FIRST),
        ("AAAA000002", SECOND),
        ("bbbb", AT_SIGN),
        ("db1@latest", SECOND),
        ("db1@2026-03-01T12:00:00Z", FIRST),
        ("db1@2026-03-01T12:59:59.999+00:00", FIRST),
        ("db1@2026-03-01T13:00", SECOND),
        ("db1@20260301T150000+0200", SECOND),
        ("db1@2026-03-02", SECOND),
        ("me@home@latest", AT_SIGN),
        ("me@home@2027-01-01", AT_SIGN),
    ],
)
def test_what_a_reference_names(reference: str, expected: Snapshot) -> None:
    assert resolve(reference, snapshots=ALL, now=NOW) is expected


@pytest.mark.parametrize(
    ("reference", "brief", "details", "remedy"),
    [
        ("aaaa", "the beginning of 2 snapshots", "aaaa000002", "more digits"),
        ("aaa", "no snapshot 'aaa'", "aaaa000001", "first four digits"),
        ("cccc", "no snapshot 'cccc'", "bbbb000003", "GUEST@latest"),
        ("aaaa000001ff", "no snapshot", "aaaa000001", "GUEST@latest"),
        ("db1", "no snapshot 'db1'", "aaaa000001", "db1@latest"),
        ("db2@latest", "guest 'db2' has no snapshots", "'db1', 'me@home'", "GUEST@latest"),
        ("me@home", "guest 'me' has no snapshots", "'me@home'", "me@home@latest"),
        ("db1@newest", "neither 'latest' nor a time", "'db1'", "GUEST@TIME"),
        ("db1@2026-02-30", "neither 'latest' nor a time", "'db1'", "GUEST@TIME"),
        ("db1@2026-03-01T11:59:59Z", "no snapshot from 2026-03-01T11:59:59Z or before", "aaaa000001", "GUEST@TIME"),
    ],
)
def test_what_is_said_where_nothing_matches(reference: str, brief: str, details: str, remedy: str) -> None:
    with pytest.raises(SnapshotNotFoundError) as caught:
        resolve(reference, snapshots=ALL, now=NOW)
    assert brief in caught.value.brief
    assert caught.value.details is not None
    assert details in caught.value.details
    assert caught.value.remedy is not None
    assert remedy in caught.value.remedy


def test_an_empty_store_says_so() -> None:
    with pytest.raises(SnapshotNotFoundError) as caught:
        resolve("db1@latest", snapshots=(), now=NOW)
    assert caught.value.details == "the store is empty"


def test_a_long_listing_is_cut() -> None:
    many = [snapshot(f"{number:010x}", captured=NOON + timedelta(days=number)) for number in range(15)]
    with pytest.raises(SnapshotNotFoundError) as caught:
        resolve("0000", snapshots=many, now=NOW)
    assert caught.value.details is not None
    assert caught.value.details.splitlines()[0].startswith("000000000e")
    assert caught.value.details.splitlines()[-1] == "and 5 older"


@given(
    hours=st.lists(st.integers(0, 50), max_size=8),
    asked=st.integers(-1, 51),
)
def test_a_time_names_the_newest_snapshot_not_after_it(hours: list[int], asked: int) -> None:
    there = [snapshot(f"{index:010x}", captured=NOON + timedelta(hours=hour)) for index, hour in enumerate(hours)]
    moment = NOON + timedelta(hours=asked)
    reference = f"db1@{moment.astimezone(UTC).isoformat()}"
    fitting = [one for one in by_age(there) if one.manifest.captured <= moment]
    if fitting:
        assert resolve(reference, snapshots=there, now=NOW) is fitting[-1]
    else:
        with pytest.raises(SnapshotNotFoundError):
            resolve(reference, snapshots=there, now=NOW)


def test_the_latest_is_none_that_a_wrong_clock_dated_ahead() -> None:
    ahead = snapshot("cccc000004", captured=NOW + timedelta(days=2))
    assert resolve("db1@latest", snapshots=(FIRST, SECOND, ahead), now=NOW) is SECOND
    assert resolve("db1@latest", snapshots=(FIRST, SECOND, ahead), now=NOW + timedelta(days=1)) is ahead
    assert resolve("db1@latest", snapshots=(ahead,), now=NOW) is ahead, "there is no other"
    assert resolve("cccc", snapshots=(FIRST, SECOND, ahead), now=NOW) is ahead
    assert usable_base((FIRST, SECOND, ahead), now=NOW) == SECOND.id
