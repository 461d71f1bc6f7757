"""Verifying copies here and at the replica, and repairing each from the other; with every fault."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import pytest

from tests.workflow.invocations import Work, backup, invoke, recovers, simply, succeed
from tests.workflow.test_replica import KEY, Site, replicating
from vmsnap.errors import ConfigError, SnapshotNotFoundError, VerificationError
from vmsnap.model.history import Action
from vmsnap.model.policy import Policy
from vmsnap.model.report import VerifyReport
from vmsnap.model.verification import Share, VerifyEntry, VerifyWish, share_of_day
from vmsnap.ports.clock import Cancel
from vmsnap.stores.packs.names import MAPS, PACKS, SNAPSHOTS
from vmsnap.testing.faults import DEATHS, Fault, Mode
from vmsnap.testing.memory_objects import MemoryObjects
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.verify import verify, verify_due
from vmsnap.workflow.world import World


def verifying(*, replica: bool = False, repair: bool = False, share: Share | None = None) -> Work:
    def work(world: World, cancel: Cancel) -> VerifyReport:
        wish = VerifyWish(replica=replica, repair=repair, share=share)
        return verify(world, reference="db@latest", wish=wish, progress=QuietProgress(), cancel=cancel)

    return work


def read(lab: FakeWorld, *, replica: bool = False, repair: bool = False) -> VerifyReport:
    outcome = simply(lab, verifying(replica=replica, repair=repair))
    if outcome.error is not None:
        raise outcome.error
    assert isinstance(outcome.result, VerifyReport)
    return outcome.result


@pytest.fixture(params=[None, KEY], ids=["open", "keyed"])
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Site:
    return Site(tmp_path, key=request.param)


@pytest.fixture
def host(site: Site) -> FakeWorld:
    host = site.host("here")
    succeed(host, backup())
    succeed(host, replicating)
    return host


def damage_here(host: FakeWorld) -> None:
    (snapshot,) = host.store.snapshots("db")
    host.store.damage(snapshot, target="vda")


def damage_there(site: Site, prefix: str, *, keep: bool = True) -> None:
    for name in site.names(prefix):
        data = MemoryObjects(site.bucket).get(name).data
        site.bucket.damage(name, data=data[: len(data) // 2] if keep else b"lost")


def test_both_copies_are_verified(site: Site, host: FakeWorld) -> None:
    here, there = read(host), read(host, replica=True)
    assert (here.defects, there.defects) == ((), ())
    assert (here.replica, there.replica) == (False, True)
    assert here.snapshot == there.snapshot
    entries = host.state.history.audited
    assert any("at the replica" in (one.detail or "") for one in entries if one.action is Action.VERIFY)


def test_what_is_damaged_here_is_repaired_from_the_replica(host: FakeWorld) -> None:
    damage_here(host)
    (damaged,) = read(host).defects
    report = read(host, repair=True)
    assert report.repaired == (damaged,)
    assert report.defects == ()
    (snapshot,) = host.store.snapshots("db")
    assert snapshot.marks.verification is not None
    assert snapshot.marks.verification.bad_blocks == 0


@pytest.mark.parametrize("prefix", [PACKS, MAPS, SNAPSHOTS])
def test_what_is_damaged_there_is_repaired_from_here(site: Site, host: FakeWorld, prefix: str) -> None:
    damage_there(site, prefix)
    other = site.host("other")
    found = read(host, replica=True)
    assert found.defects
    assert all("snapshot" in line and "'db'" in line for line in found.defects)
    if prefix != SNAPSHOTS:
        with pytest.raises(SnapshotNotFoundError, match="is not here: it cannot be repaired"):
            read(other, replica=True, repair=True)
    report = read(host, replica=True, repair=True)
    assert report.repaired == found.defects
    assert report.defects == ()
    assert read(site.host("third"), replica=True).defects == ()


def test_nothing_is_repaired_where_both_are_damaged(site: Site, host: FakeWorld) -> None:
    damage_here(host)
    damage_there(site, PACKS, keep=False)
    before = {name: MemoryObjects(site.bucket).get(name).data for name in site.names(SNAPSHOTS)}
    with pytest.raises(VerificationError):
        read(host, replica=True, repair=True)
    assert {name: MemoryObjects(site.bucket).get(name).data for name in site.names(SNAPSHOTS)} == before
    assert read(host, repair=True).defects, "what the replica has not, stays damaged"


def test_a_sample_that_finds_damage_has_all_of_it_repaired(site: Site, host: FakeWorld) -> None:
    damage_there(site, PACKS)
    reports = []
    for number in range(2):
        outcome = simply(host, verifying(replica=True, repair=True, share=Share(number=number, of=2)))
        assert isinstance(outcome.result, VerifyReport)
        reports.append(outcome.result)
    assert any(report.repaired for report in reports)
    assert read(host, replica=True).defects == ()


def test_without_a_replica_it_is_said_what_is_missing(tmp_path: Path) -> None:
    host = FakeWorld(tmp_path)
    succeed(host, backup())
    with pytest.raises(ConfigError, match="names no replica"):
        read(host, replica=True)
    damage_here(host)
    with pytest.raises(ConfigError, match="names no replica"):
        read(host, repair=True)


@pytest.mark.parametrize("replica", [False, True])
def test_a_repair_that_fails_or_dies_anywhere_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, *, replica: bool
) -> None:
    def prepared(number: object) -> tuple[Site, FakeWorld]:
        site = Site(tmp_path / f"{number}")
        host = site.host("here")
        succeed(host, backup())
        succeed(host, replicating)
        damage_there(site, PACKS) if replica else damage_here(host)
        return site, host

    _, host = prepared("count")
    work = verifying(replica=replica, repair=True)
    calls = [call for call in invoke(host, work).calls if not call.inside]
    assert len(calls) > 5
    for call in calls:
        for mode in (Mode.FAIL_AFTER, Mode.DIE_AFTER):
            _, host = prepared(f"{call.number}-{mode.name}")
            outcome = invoke(host, work, Fault(call=call.number, mode=mode))
            if mode in DEATHS:
                recovers(host)
            assert not any("hold" in one for one in outcome.held) or mode in DEATHS, call.name
            report = read(host, replica=replica, repair=True)
            assert report.defects == (), f"{mode} at {call.name}"


def sampling(policy: Policy) -> Work:
    def work(world: World, cancel: Cancel) -> list[VerifyEntry]:
        return list(verify_due(world, policies=(policy,), progress=QuietProgress(), cancel=cancel))

    return work


def test_a_share_of_both_copies_is_read_each_day_until_all_was(site: Site, host: FakeWorld) -> None:
    policy = Policy.model_validate(
        {"guest": "db", "replica": {"enabled": True}, "verify": {"every": "never", "share_per_day": 0.25}}
    )
    blocks = {False: 0, True: 0}
    for day in range(5):
        host.clock.sleep(timedelta(days=1))
        entries = simply(host, sampling(policy)).result
        assert isinstance(entries, list)
        reports = [entry.report for entry in entries]
        assert [(report.replica, report.sample) for report in reports] == [
            (False, reports[0].sample), (True, reports[0].sample),
        ], day  # fmt: skip
        for report in reports:
            blocks[report.replica] += report.blocks
        assert simply(host, sampling(policy)).result == [], "once a day"
        if day == 3:
            assert blocks[False] == read(host).blocks
            assert blocks[True] == read(host, replica=True).blocks
    damage_there(site, PACKS, keep=False)
    found = []
    for _ in range(4):
        host.clock.sleep(timedelta(days=1))
        entries = simply(host, sampling(policy)).result
        assert isinstance(entries, list)
        found += [entry.error for entry in entries if entry.error]
    assert found
    assert all(error.exit_code == 5 for error in found)


def test_a_count_of_shares_never_keeps_step_with_the_week() -> None:
    for share in (1.0, 0.5, 1 / 3, 1 / 7, 0.05, 1 / 14, 0.001):
        shares = [share_of_day(share, day=date(2026, 1, 1) + timedelta(days=day)) for day in range(2300)]
        (of,) = {one.of for one in shares}
        assert of % 7 or of == 1
        assert 1 / share <= of + 1e-6
        assert of <= 1 / share + 1 + 1e-6
        assert {one.number for one in shares[:of]} == set(range(of))
        without_sundays = [one.number for day, one in enumerate(shares) if day % 7]
        assert set(without_sundays) == set(range(of))
