"""What a host knows of its copies without asking the replica: what metrics tell of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from tests.workflow.invocations import backup, simply, succeed
from tests.workflow.test_replica import (
    REPLICATED,
    Site,
    backing_up,
    connected,
    entries,
    replicating,
    sending_what_is_lacking,
)
from vmsnap.errors import StoreUnreachableError
from vmsnap.model.alarms import Ledger
from vmsnap.model.policy import Policy
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.stores.packs.replica import PacksReplica
from vmsnap.stores.packs.repository import open_repository
from vmsnap.stores.packs.upkeep import PackedUpkeep
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.facts import Stock, gather

KEPT = RetentionPolicy(keep_last=9)
WANTED = REPLICATED.model_copy(update={"retention": KEPT})
BY_HAND = Policy.model_validate({"guest": "db", "replica": {"enabled": True, "after_backup": False}})
LOCAL = Policy(guest="db", retention=KEPT)


class Watched(Site):
    """A site with one host, ``here``, that is looked at."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.here: FakeWorld = self.host("here")
        self.state = folder / "here" / "state"

    def known(self, policy: Policy = WANTED) -> tuple[datetime | None, int | None]:
        """Return what a look at all guests knows of db's copies; it asks the replica nothing."""
        asked = FaultyObjects(MemoryObjects(self.bucket))
        blind = PacksReplica(lambda: asked, key=lambda: None, state=self.state, connections=1, clock=self.here.clock)
        world = replace(self.here.process(), replica=blind)
        facts = gather(world, policies=[policy], ledger=Ledger(), stock=Stock(world), room=lambda: None)
        self.here.end()
        assert asked.calls == []
        assert facts.problems == ()
        (guest,) = facts.guests
        return guest.newest_copy, guest.copies_lacking


def test_it_is_known_which_copies_are_lacking(tmp_path: Path) -> None:
    site = Watched(tmp_path)
    here = site.here
    assert site.known() == (None, 0)
    succeed(here, backup(LOCAL))
    assert site.known() == (None, 1)
    succeed(here, replicating)
    succeed(here, backup(LOCAL))
    first, second = (one.manifest.captured for one in here.store.snapshots("db"))
    assert site.known() == (first, 1)
    assert site.known(BY_HAND) == (first, None)
    assert site.known(LOCAL) == (None, None)
    succeed(here, sending_what_is_lacking)
    assert site.known() == (second, 0)


def test_what_was_lost_is_known_after_the_next_look(tmp_path: Path) -> None:
    site = Watched(tmp_path)
    here = site.here
    for _ in range(2):
        succeed(here, backup(LOCAL))
        succeed(here, replicating)
    first, second = here.store.snapshots("db")
    shutil.rmtree(site.state / "copies")
    assert site.known() == (None, 2)
    assert succeed(here, sending_what_is_lacking).result == []
    assert site.known() == (second.manifest.captured, 0)
    (path,) = (site.state / "copies").iterdir()
    path.write_text("no record", encoding="ascii")
    assert site.known() == (None, 2)
    assert succeed(here, sending_what_is_lacking).result == []
    assert site.known() == (second.manifest.captured, 0)
    upkeep = PackedUpkeep(lambda: open_repository(MemoryObjects(site.bucket), key=None), clock=here.clock, locks=False)
    upkeep.remove(second)
    assert succeed(here, sending_what_is_lacking).result == []
    assert site.known() == (first.manifest.captured, 0), "what was removed there is not wanted, and is no copy"


def test_the_newest_copy_is_known_when_its_snapshot_is_not_here_any_more(tmp_path: Path) -> None:
    site = Watched(tmp_path)
    here = site.here
    succeed(here, backing_up)
    (snapshot,) = here.store.snapshots("db")
    here.store.remove(snapshot)
    assert succeed(here, sending_what_is_lacking).result == []
    assert site.known() == (snapshot.manifest.captured, 0)


def test_another_place_has_other_copies(tmp_path: Path) -> None:
    site = Watched(tmp_path)
    here = site.here
    succeed(here, backing_up)
    (snapshot,) = here.store.snapshots("db")
    assert site.known() == (snapshot.manifest.captured, 0)
    empty = MemoryObjects(MemoryBucket())

    def refuse(call: object) -> None:
        if "put" in str(call):
            raise StoreUnreachableError("it is full", remedy="buy another")

    connected(here, FaultyObjects(empty, on_call=refuse), state=site.state)
    (entry,) = entries(simply(here, sending_what_is_lacking))
    assert entry.error is not None
    assert site.known() == (None, 1)
    connected(here, empty, state=site.state)
    succeed(here, sending_what_is_lacking)
    assert site.known() == (snapshot.manifest.captured, 0)


def test_a_memory_that_cannot_be_written_stops_no_copy(tmp_path: Path) -> None:
    site = Watched(tmp_path)
    site.state.mkdir(parents=True, exist_ok=True)
    (site.state / "copies").write_text("in the way", encoding="ascii")
    succeed(site.here, backing_up)
    assert len(site.names("snapshots/")) == 1
    assert site.known() == (None, 1)
