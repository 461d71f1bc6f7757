"""Collecting garbage: one pass of the collector.

    take the lease; end dead uploads; look what is in use;
    remove what has a tombstone, is old enough, was waited for and is still not in use;
    put tombstones on the rest of what is not in use; rewrite packs of which little is in use.

Every step may be cut anywhere and be begun again by anybody. ``docs/collecting.md`` says why no live block can be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta

from vmsnap.errors import HeldError, ObjectConflictError, ObjectNotFoundError, VerificationError, VmsnapError
from vmsnap.model.collection import CollectReport, EndedUpload, Heap
from vmsnap.model.durations import format_duration
from vmsnap.stores.packs import holds, tombstones
from vmsnap.stores.packs.endings import end_uploads, forget_marks
from vmsnap.stores.packs.frames import Place
from vmsnap.stores.packs.lease import Clocks, Lease, Sighting, take
from vmsnap.stores.packs.maps import MAP_HEAD_BYTES, map_token
from vmsnap.stores.packs.marking import Marking, Marks, mark
from vmsnap.stores.packs.names import INTENTS, MAPS, MOVES, PACKS, digest_in
from vmsnap.stores.packs.packfile import TRAILER_BYTES, read_trailer
from vmsnap.stores.packs.repository import Repository
from vmsnap.stores.packs.rewriting import Rewriting, in_use, moved_whole, rewrite
from vmsnap.stores.packs.tombstones import Tombstone, TombstoneRecord

GRACE = timedelta(days=1)
"""So long what nobody needs stays after it was found: who reads a removed snapshot may end."""
PATIENCE = timedelta(days=3)
"""An upload that was not renewed for so long is called over."""
_COLLECTED = (PACKS, MAPS, MOVES)


@dataclass(frozen=True, kw_only=True)
class Collecting:
    """How to collect. ``holder`` is who, for people. ``rewrite_bytes``: at most so much is written anew in one pass."""

    holder: str
    clocks: Clocks
    grace: timedelta = GRACE
    patience: timedelta = PATIENCE
    connections: int = 1
    rewrite_bytes: int = 0
    takes_over: bool = False
    note: Callable[[str], None] = lambda _: None
    check: Callable[[], None] = lambda: None


def collect(repository: Repository, *, how: Collecting) -> CollectReport:
    """Make one pass. May be repeated at any time, by several hosts at once, and cut anywhere.

    Raises BusyError where another collector is at it, VerificationError where a manifest or a map cannot be read, and
    what ``how.check`` and the object store raise. What was removed by then stays removed.
    """
    lease = take(repository.store, holder=how.holder, clocks=how.clocks, waits=how.takes_over, check=how.check)
    seen: tuple[Sighting, ...] = lease.record.sightings
    collector = _Pass(repository, how=how, lease=lease)
    try:
        collector.ended, seen = end_uploads(repository, lease=lease, now=how.clocks.now(), patience=how.patience)
        collector.run()
    except VmsnapError:
        # Where this fails, the next one has to wait for as long as a lease lasts, and that is all.
        with suppress(VmsnapError):
            lease.release(sightings=seen)
        raise
    lease.release(sightings=seen)
    return collector.report()


def estimate(repository: Repository, *, how: Collecting) -> CollectReport:
    """Look what a pass would find and remove. Takes no lease and changes nothing."""
    began = how.clocks.now()
    marks = mark(repository, how=_marking(how, hold=how.check))
    objects = _Objects.of(repository, marks=marks)
    listed = {name for one in tombstones.tombstones(repository.store) for name in one.record.objects}
    waiting, found = Heap(), Heap()
    for name, size in objects.unused.items():
        if name in listed:
            waiting = waiting.plus(size)
        else:
            found = found.plus(size)
    return CollectReport(
        started=began,
        finished=how.clocks.now(),
        dry_run=True,
        snapshots=len(marks.snapshots),
        used=objects.used,
        found=found,
        waiting=waiting,
        uploads=len(marks.uploads),
    )


def _marking(how: Collecting, *, hold: Callable[[], None]) -> Marking:
    return Marking(connections=how.connections, hold=hold, note=how.note)


@dataclass(frozen=True, kw_only=True)
class _Objects:
    """The objects there are, by whether they are in use. ``sizes`` of packs alone that are."""

    used: Heap
    unused: dict[str, int]
    pack_sizes: dict[str, int]

    @classmethod
    def of(cls, repository: Repository, *, marks: Marks) -> _Objects:
        used, unused, sizes = [0, 0], {}, {}
        for prefix in _COLLECTED:
            for info in repository.store.list(prefix):
                if marks.holds(info.name):
                    used[0] += 1
                    used[1] += info.size_bytes
                    if prefix == PACKS:
                        sizes[info.name] = info.size_bytes
                else:
                    unused[info.name] = info.size_bytes
        return cls(used=Heap(objects=used[0], size_bytes=used[1]), unused=unused, pack_sizes=sizes)


@dataclass
class _Sums:
    removed: Heap = field(default_factory=Heap)
    found: Heap = field(default_factory=Heap)
    waiting: Heap = field(default_factory=Heap)
    rewritten: Heap = field(default_factory=Heap)
    reasons: list[str] = field(default_factory=list)

    def waits(self, sizes: Iterable[int], *, reason: str) -> None:
        for size in sizes:
            self.waiting = self.waiting.plus(size)
        if reason not in self.reasons:
            self.reasons.append(reason)


class _Pass:
    """One pass, under a lease."""

    def __init__(self, repository: Repository, *, how: Collecting, lease: Lease) -> None:
        self._repository = repository
        self._store = repository.store
        self._how = how
        self._lease = lease
        self._began = how.clocks.now()
        self._marks = Marks()
        self._objects = _Objects(used=Heap(), unused={}, pack_sizes={})
        self._sums = _Sums()
        self._moved: dict[bytes, dict[bytes, Place]] = {}
        self.ended: tuple[EndedUpload, ...] = ()

    def run(self) -> None:
        """Sweep what has tombstones, then bury what has none."""
        # Before anything is looked at: a tombstone waits for the uploads that were open after it was put.
        buried = [self._noted(one) for one in list(tombstones.tombstones(self._store))]
        self._look()
        self._learn_of_moved(buried)
        kept = [left for one in buried if (left := self._sweep(one)) is not None]
        fresh = self._bury(kept)
        if self._how.grace <= timedelta(0) and fresh:
            self._look()
            kept += [left for one in fresh if (left := self._sweep(one)) is not None]
        if self._how.rewrite_bytes > 0:
            self._rewrite(kept)
        forget_marks(
            self._repository, now=self._how.clocks.now(), uploads=self._marks.uploads.values(), hold=self._hold
        )

    def report(self) -> CollectReport:
        """Return what it came to."""
        sums = self._sums
        return CollectReport(
            started=self._began,
            finished=self._how.clocks.now(),
            dry_run=False,
            snapshots=len(self._marks.snapshots),
            used=self._objects.used,
            removed=sums.removed,
            found=sums.found,
            waiting=sums.waiting,
            rewritten=sums.rewritten,
            uploads=len(self._marks.uploads),
            ended=self.ended,
            reasons=tuple(sums.reasons),
        )

    def _hold(self) -> None:
        self._how.check()
        self._lease.hold()

    def _look(self) -> None:
        self._how.note("looking what the snapshots need")
        self._marks = mark(self._repository, how=_marking(self._how, hold=self._hold))
        self._objects = _Objects.of(self._repository, marks=self._marks)

    def _noted(self, tombstone: Tombstone) -> Tombstone:
        """Return a tombstone with the uploads it waits for; whoever put it may have died before they were written down."""
        if tombstone.record.waits is not None:
            return tombstone
        return self._note(tombstone)

    def _note(self, tombstone: Tombstone) -> Tombstone:
        self._hold()
        uploads = [info.name.rpartition("/")[2].removesuffix(".json") for info in self._store.list(INTENTS)]
        try:
            return tombstones.note_waits(self._store, tombstone=tombstone, waits=uploads)
        except ObjectConflictError:
            again = tombstones.read(self._store, tombstone.name)
            return again or replace(tombstone, record=tombstone.record.model_copy(update={"objects": ()}))

    # Removing what has a tombstone

    def _sweep(self, tombstone: Tombstone) -> Tombstone | None:
        """Remove what a tombstone lists and nobody needs, then the tombstone. Returns it where it has to stay."""
        record = tombstone.record
        unused = self._objects.unused
        sizes = [unused[name] for name in record.objects if name in unused]
        reason = self._why_not(record)
        if reason is not None:
            self._sums.waits(sizes, reason=reason)
            return tombstone
        locked, moved = [], set(record.moved)
        for name in record.objects:
            if name in moved:
                if not self._moved_away(name):
                    continue
            elif self._marks.holds(name):
                continue
            if not self._remove(name):
                locked.append(name)
        if not locked and self._remove(tombstone.name):
            return None
        left = record.model_copy(update={"objects": tuple(locked), "moved": tuple(moved.intersection(locked))})
        self._sums.waits((unused.get(name, 0) for name in locked), reason="some objects are locked (Object Lock)")
        if left == record:
            return tombstone
        # One that lists fewer: what is in use after all may be relied upon again.
        return tombstones.shorten(self._store, tombstone=tombstone, record=left)

    def _why_not(self, record: TombstoneRecord) -> str | None:
        open_uploads = self._marks.uploads.keys() & set(record.waits or ())
        if record.waits is None or open_uploads:
            return f"uploads are on that began before: {', '.join(sorted(open_uploads))}"
        now = self._how.clocks.now()
        old = now - record.made >= self._how.grace
        # Put by a clock that is ahead of this one: what counts instead is how many collectors came after.
        ahead = record.made > now and self._lease.generation - record.generation > 2
        if not old and not ahead and self._how.grace > timedelta(0):
            return f"what is found stays for {format_duration(self._how.grace)} first"
        readers = holds.held(self._store, now=now).keys() - self._marks.snapshots
        if readers:
            return f"environments still read from removed snapshots: {', '.join(sorted(readers))}"
        return None

    def _learn_of_moved(self, buried: list[Tombstone]) -> None:
        """Look what is in use of the packs that were rewritten and may go now."""
        due = [one.record for one in buried if one.record.moved and self._why_not(one.record) is None]
        packs = [digest for record in due for name in record.moved if (digest := digest_in(name)) is not None]
        if packs:
            self._moved = in_use(
                self._repository, marks=self._marks, packs=packs, connections=self._how.connections, hold=self._hold
            )

    def _moved_away(self, pack: str) -> bool:
        """Tell whether a rewritten pack may go: everything in use of it is elsewhere, and stays there."""
        if pack not in self._objects.pack_sizes:
            return not self._marks.holds(pack)
        needed = self._moved.get(digest_in(pack) or b"")
        return needed is not None and moved_whole(
            self._repository, pack=pack, needed=needed, there=self._objects.pack_sizes, condemned=self._condemned()
        )

    def _condemned(self) -> frozenset[str]:
        return frozenset(
            name
            for one in tombstones.tombstones(self._store)
            for name in one.record.objects
            if name not in one.record.moved
        )

    def _remove(self, name: str) -> bool:
        """Remove an object. Returns False where it is locked."""
        self._hold()
        try:
            self._store.delete(name)
        except HeldError:
            return False
        # Not looked at again: whoever finds garbage after this must not find it once more.
        size = self._objects.unused.pop(name, self._objects.pack_sizes.get(name))
        if size is not None:
            self._sums.removed = self._sums.removed.plus(size)
        return True

    # Finding what is garbage

    def _bury(self, kept: list[Tombstone]) -> list[Tombstone]:
        """Put tombstones on what is not in use and has none. Returns them."""
        listed = {name for one in kept for name in one.record.objects}
        dead = []
        for name, size in self._objects.unused.items():
            if name in listed:
                continue
            self._hold()
            if self._is_of_open_upload(name, size_bytes=size):
                continue
            dead.append(name)
            self._sums.found = self._sums.found.plus(size)
        most = tombstones.MOST_OBJECTS
        return [self._put(dead[start : start + most]) for start in range(0, len(dead), most)]

    def _put(self, names: list[str], *, moved: tuple[str, ...] = ()) -> Tombstone:
        self._hold()
        record = TombstoneRecord(
            generation=self._lease.generation, made=self._how.clocks.now(), objects=tuple(names), moved=moved
        )
        return self._note(tombstones.put(self._store, record=record))

    def _is_of_open_upload(self, name: str, *, size_bytes: int) -> bool:
        """Tell whether an upload that is on wrote the object. Only saves work: a tombstone on it would do no harm."""
        if not self._marks.uploads:
            return False
        try:
            if name.startswith(PACKS):
                length = min(TRAILER_BYTES, size_bytes)
                tail = self._store.get_range(name, offset=size_bytes - length, length=length)
                token = read_trailer(tail, name=name).token
            elif name.startswith(MAPS):
                head = self._store.get_range(name, offset=0, length=min(MAP_HEAD_BYTES, size_bytes))
                token = map_token(head, name=name)
            else:
                return False
        except (VerificationError, ObjectNotFoundError):
            return False
        return token.hex() in self._marks.uploads

    def _rewrite(self, kept: list[Tombstone]) -> None:
        """Write what is in use of packs that are mostly garbage into new ones, and put tombstones on the old ones."""
        listed = frozenset(name for one in kept for name in one.record.objects)
        work = Rewriting(
            most_bytes=self._how.rewrite_bytes,
            hold=self._hold,
            sure=self._lease.renew,
            connections=self._how.connections,
            leave=listed,
            now=self._how.clocks.now(),
        )
        done = rewrite(self._repository, marks=self._marks, sizes=self._objects.pack_sizes, work=work)
        for name in done:
            self._sums.rewritten = self._sums.rewritten.plus(self._objects.pack_sizes[name])
        if done:
            self._put(list(done), moved=done)
