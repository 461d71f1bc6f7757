"""The interleavings that lose a block where a rule of ``docs/collecting.md`` is left out, told with the real code."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.unit.packs_interleaving import EVER, OwnClock
from tests.unit.packs_turns import Actor
from vmsnap.errors import DriverError
from vmsnap.model.ids import SnapshotId
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.packs.collecting import Collecting, collect, estimate
from vmsnap.stores.packs.intents import new_token
from vmsnap.stores.packs.names import INTENTS, MAPS, PACKS, SNAPSHOTS, TOMBSTONES
from vmsnap.stores.packs.removing import remove
from vmsnap.stores.packs.repository import open_repository
from vmsnap.testing.memory_objects import MemoryBucket, MemoryObjects
from vmsnap.testing.packs_samples import NOW, Local, block, disks_of, fresh, send


class Scene:
    """A repository with a pack of two blocks that nobody needs any more: its snapshot, 1, was removed."""

    def __init__(self, folder: Path) -> None:
        self.place = MemoryObjects(MemoryBucket())
        self.local = Local(folder=folder)
        self.actors: list[Actor] = []
        self._hosts = 0
        fresh(self.place)
        self.upload(1).finish()
        self.remove(1)

    def upload(self, number: int) -> Actor:
        """Begin to upload snapshot ``number``, which has the same two blocks, from a host that knows nothing yet."""
        self._hosts += 1
        index = self.local.folder / f"index-{self._hosts}"
        copy = self.local.snapshot(number, disks={"vda": block(1) + block(2)})

        def work(store: ObjectStore) -> None:
            send(open_repository(store, key=None), copy=copy, index=index, token=new_token())

        return self._act("upload", work)

    def collector(self, *, patient: bool = True) -> Actor:
        how = Collecting(
            holder="a test",
            clocks=OwnClock(timedelta(0)).clocks(),
            grace=timedelta(0),
            patience=EVER if patient else timedelta(0),
            takes_over=True,
        )
        return self._act("collect", lambda store: collect(open_repository(store, key=None), how=how))

    def collect(self, *, patient: bool = True) -> None:
        self.collector(patient=patient).finish()

    def remove(self, number: int) -> None:
        assert remove(open_repository(self.place, key=None), guest="db", snapshot=SnapshotId(f"{number:010x}"), now=NOW)

    def _act(self, name: str, work: object) -> Actor:
        assert callable(work)
        self.actors.append(Actor(self.place, name=name, work=work))
        return self.actors[-1]

    def reads(self, number: int) -> bool:
        """Tell whether a snapshot is there. If it is, all of it can be read."""
        repository = open_repository(self.place, key=None)
        found = [entry for _, entry in repository.entries() if getattr(entry, "id", "") == f"{number:010x}"]
        if found:
            assert disks_of(repository, number=number) == {"vda": block(1) + block(2)}
        return bool(found)


@pytest.fixture
def scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory() as folder:
        found = Scene(Path(folder))
        yield found
        for actor in found.actors:
            actor.die()


def test_uploads_that_are_on_are_waited_for(scene: Scene) -> None:
    upload = scene.upload(2)
    upload.to("put_new", SNAPSHOTS)
    scene.collect()
    scene.collect()
    upload.finish()
    assert scene.reads(2)


def test_uploads_are_looked_for_after_the_tombstone(scene: Scene) -> None:
    collector = scene.collector()
    collector.to("put", TOMBSTONES)
    upload = scene.upload(2)
    upload.to("put_new", SNAPSHOTS)
    collector.finish()
    scene.collect()
    upload.finish()
    assert scene.reads(2)


def test_packs_are_listed_after_tombstones_were_read(scene: Scene) -> None:
    first = scene.upload(9)  # keeps the collector from doing all at once
    first.to("list", TOMBSTONES)
    scene.collect()
    first.die()
    upload = scene.upload(2)
    upload.to("list", PACKS)
    scene.collect(patient=False)
    upload.finish()
    assert scene.reads(2) or isinstance(upload.failure, DriverError)
    again = scene.upload(3)
    again.to("list", TOMBSTONES)
    scene.collect()
    again.finish()
    assert scene.reads(3)


def test_what_has_a_tombstone_is_relied_upon_by_no_later_upload(scene: Scene) -> None:
    first = scene.upload(2)
    first.to("put_new", SNAPSHOTS)
    scene.collect()
    first.finish()
    assert scene.reads(2)
    upload = scene.upload(9)  # what it needs, snapshot 2 needs too, and its map could be shared
    upload.to("put_new", SNAPSHOTS)
    scene.remove(2)
    scene.collect()
    scene.collect()
    upload.finish()
    assert scene.reads(9)


def test_what_has_a_tombstone_is_looked_for_again(scene: Scene) -> None:
    upload = scene.upload(2)
    upload.to("put_new", SNAPSHOTS)
    scene.collect()
    upload.finish()
    scene.collect()
    assert scene.reads(2)


def test_uploads_are_looked_for_before_manifests(scene: Scene) -> None:
    upload = scene.upload(2)
    upload.to("put_new", SNAPSHOTS)
    scene.collect()
    collector = scene.collector()
    collector.to("list", TOMBSTONES)
    collector.to("list", SNAPSHOTS)
    upload.finish()
    collector.finish()
    assert scene.reads(2)


def test_who_is_called_over_cannot_publish(scene: Scene) -> None:
    upload = scene.upload(2)
    upload.to("put_new", SNAPSHOTS)
    scene.collect(patient=False)
    scene.collect(patient=False)
    upload.finish()
    assert isinstance(upload.failure, DriverError)
    assert not scene.reads(2)
    scene.collect(patient=False)
    assert [info.name for info in scene.place.list("") if info.name.startswith((PACKS, MAPS, INTENTS))] == []


def test_a_collector_that_lost_its_lease_removes_nothing_that_is_new(scene: Scene) -> None:
    slow = scene.collector()
    slow.to("delete", PACKS)
    scene.collect()
    scene.upload(2).finish()
    slow.finish()
    assert scene.reads(2)
    left = estimate(open_repository(scene.place, key=None), how=_looking())
    assert left.found.objects == 0


def _looking() -> Collecting:
    return Collecting(holder="a test", clocks=OwnClock(timedelta(0)).clocks())
