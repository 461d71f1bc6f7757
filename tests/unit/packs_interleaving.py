"""Uploads, removals and collectors of one repository, interleaved: the machine that tests run over several object stores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.unit.packs_turns import Actor
from vmsnap.errors import VmsnapError
from vmsnap.model.ids import SnapshotId
from vmsnap.ports.objects import ObjectStore
from vmsnap.ports.replica import LocalCopy
from vmsnap.stores.packs.collecting import Collecting, collect
from vmsnap.stores.packs.intents import new_token
from vmsnap.stores.packs.lease import LASTS, Clocks
from vmsnap.stores.packs.marking import Marking, mark
from vmsnap.stores.packs.names import COLLECTOR_LOCK, REPOSITORY, RESTORE_PROGRAM, SNAPSHOTS
from vmsnap.stores.packs.removing import remove
from vmsnap.stores.packs.repository import open_repository
from vmsnap.testing.memory_objects import MemoryBucket, MemoryObjects
from vmsnap.testing.packs_samples import NOW, Local, block, disks_of, fresh, send

EVER = timedelta(days=36500)
contents = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
skews = st.sampled_from([0, 0, -400, -1, 1, 400]).map(lambda days: timedelta(days=days))


class OwnClock:
    """A clock that only its own process's waiting moves, and that may be wrong by years."""

    def __init__(self, skew: timedelta) -> None:
        self._skew = skew
        self._seconds = 0.0

    def clocks(self) -> Clocks:
        return Clocks(
            now=lambda: NOW + self._skew + timedelta(seconds=self._seconds),
            seconds=lambda: self._seconds,
            sleep=self._sleep,
        )

    def _sleep(self, span: timedelta) -> None:
        self._seconds += max(span, LASTS).total_seconds()


class Interleaving(RuleBasedStateMachine):
    """At most two uploads and two collectors at a time; any may be killed, or stand still while others go on."""

    def new_place(self) -> ObjectStore:
        """Return an empty place."""
        return MemoryObjects(MemoryBucket(locks=False))

    def __init__(self) -> None:
        super().__init__()
        self.place = self.new_place()
        fresh(self.place)
        self._folder = tempfile.TemporaryDirectory()
        self.local = Local(folder=Path(self._folder.name))
        self.tasks: dict[int, LocalCopy] = {}
        self.wanted: dict[int, dict[str, bytes]] = {}
        self.tokens: dict[int, str] = {}
        self.running: list[tuple[str, Actor]] = []
        self.indexes = 0
        self._begin_with_garbage()

    def _begin_with_garbage(self) -> None:
        """Leave a snapshot, and beside it packs of one that was removed."""
        repository = open_repository(self.place, key=None)
        for number, seeds in ((1, (1, 2)), (2, (3, 4, 1))):
            send(repository, copy=self._task(number, seeds), index=self._index(1))
        remove(repository, guest="db", snapshot=SnapshotId(f"{2:010x}"), now=NOW)

    def _task(self, number: int, seeds: tuple[int, ...]) -> LocalCopy:
        if number not in self.tasks:
            self.wanted[number] = {"vda": b"".join(map(block, seeds))}
            self.tasks[number] = self.local.snapshot(number, disks=self.wanted[number])
        return self.tasks[number]

    def _index(self, host: int) -> Path:
        return self.local.folder / f"index-{host}"

    def _start(self, kind: str, work: Callable[[ObjectStore], object]) -> None:
        self.running.append((kind, Actor(self.place, name=f"{kind}-{len(self.running)}", work=work)))

    def _count(self, kind: str) -> int:
        return sum(one[0] == kind for one in self.running)

    @rule(number=st.integers(1, 4), seeds=contents, again=st.booleans())
    def upload(self, number: int, seeds: tuple[int, ...], *, again: bool) -> None:
        """Upload a snapshot. ``again``: as the same upload as before, where that died."""
        if self._count("upload") == 2:
            return
        task = self._task(number, seeds)
        token = self.tokens.get(number) if again else None
        self.tokens[number] = token = token or new_token()
        self.indexes += 1
        index = self._index(self.indexes + 100)

        def work(store: ObjectStore) -> None:
            send(open_repository(store, key=None), copy=task, index=index, token=token)
            self.tokens.pop(number, None)

        self._start("upload", work)

    @rule(number=st.integers(1, 4))
    def remove(self, number: int) -> None:
        self._start(
            "remove",
            lambda store: remove(
                open_repository(store, key=None), guest="db", snapshot=SnapshotId(f"{number:010x}"), now=NOW
            ),
        )

    @rule(patient=st.booleans(), rewrites=st.booleans(), skew=skews)
    def collect(self, *, patient: bool, rewrites: bool, skew: timedelta) -> None:
        """Collect, taking the lease over from anybody; ``patient``: without taking uploads for dead."""
        if self._count("collect") == 2:
            return
        how = Collecting(
            holder="a test",
            clocks=OwnClock(skew).clocks(),
            grace=timedelta(0),
            patience=EVER if patient else timedelta(0),
            rewrite_bytes=1 << 30 if rewrites else 0,
            takes_over=True,
        )
        self._start("collect", lambda store: collect(open_repository(store, key=None), how=how))

    @rule(
        turns=st.lists(
            st.tuples(st.integers(0, 4), st.sampled_from([1, 2, 3, 5, 8, 13, 21, 100])), min_size=1, max_size=6
        )
    )
    def go_on(self, turns: list[tuple[int, int]]) -> None:
        """Let processes go on, some calls each."""
        for which, calls in turns:
            if self.running:
                self.running[which % len(self.running)][1].step(calls)
                self.no_live_block_is_lost()
                self._reap()

    @rule(which=st.integers(0, 4))
    def die(self, which: int) -> None:
        """Kill a process."""
        if self.running:
            self.running.pop(which % len(self.running))[1].die()

    def _reap(self) -> None:
        for _, actor in self.running:
            if actor.ended and actor.failure is not None and not isinstance(actor.failure, VmsnapError):
                raise actor.failure
        self.running = [one for one in self.running if not one[1].ended]

    @invariant()
    def no_live_block_is_lost(self) -> None:
        """Read every snapshot there is."""
        repository = open_repository(self.place, key=None)
        for _, entry in repository.entries():
            assert not isinstance(entry, VmsnapError), entry
            number = int(entry.id, 16)
            assert disks_of(repository, number=number) == self.wanted[number]

    def teardown(self) -> None:
        """Kill everybody, and see that one collector then removes all that nobody needs."""
        try:
            for _, actor in self.running:
                actor.die()
            repository = open_repository(self.place, key=None)
            for _ in range(4):
                how = Collecting(
                    holder="last", clocks=OwnClock(timedelta(0)).clocks(), grace=timedelta(0), patience=timedelta(0),
                    takes_over=True,
                )  # fmt: skip
                collect(repository, how=how)
                self.no_live_block_is_lost()
            marks = mark(repository, how=Marking(hold=lambda: None))
            left = [info.name for info in self.place.list("") if not _belongs(info.name)]
            assert all(map(marks.holds, left)), "garbage stays"
            assert all(name.startswith(("packs/", "maps/", "moves/")) for name in left), left
        finally:
            self._folder.cleanup()


def _belongs(name: str) -> bool:
    return name in {REPOSITORY, RESTORE_PROGRAM, COLLECTOR_LOCK} or name.startswith(SNAPSHOTS)
