"""The protocol between uploads, removals and collectors of a packs store, as a model: no bytes, no clocks, no network.

Every actor is a generator that yields before each of its calls of the store, so that a test decides who is next, who stands
still for ever, and who dies where. Nothing in it knows the time: an upload may be called over, and a collector presumed dead,
at any moment. ``docs/collecting.md`` is the same in words.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace

Step = Generator[str, None, None]


class ConflictError(Exception):
    """A conditional write found something else."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the protocol says. The model with any of these off must fail: that is what shows that it looks."""

    tombstones_before_packs: bool = True
    heeds_tombstones: bool = True
    heeds_tombstones_of_shared: bool = True
    ends_token_with_place: bool = True
    waits_for_uploads: bool = True
    looks_for_uploads_after_tombstones: bool = True
    looks_again: bool = True
    intents_before_manifests: bool = True
    revokes: bool = True
    names_never_return: bool = True
    asks_for_lease: bool = True


@dataclass(frozen=True, kw_only=True)
class Intent:
    """An upload in the making, of any number of processes one after another. ``seen``: the version in the manifest's place."""

    upload: str
    snapshot: str
    seen: int | None


@dataclass(frozen=True, kw_only=True)
class Absence:
    """What stands in a manifest's place where there is none any more, or where an upload was called over."""

    by: str


@dataclass(frozen=True, kw_only=True)
class Tombstone:
    """Packs that nobody may refer to who looks from now on. ``waits``: uploads that may have looked before."""

    packs: frozenset[str]
    waits: frozenset[str] | None = None


@dataclass
class Place:
    """The object store: one object a name, versions, conditional writes."""

    objects: dict[str, tuple[int, object]] = field(default_factory=dict)
    versions: int = 0

    def put(self, name: str, value: object) -> int:
        self.versions += 1
        self.objects[name] = (self.versions, value)
        return self.versions

    def put_new(self, name: str, value: object) -> int:
        if name in self.objects:
            raise ConflictError(name)
        return self.put(name, value)

    def replace(self, name: str, value: object, *, version: int) -> int:
        if name not in self.objects or self.objects[name][0] != version:
            raise ConflictError(name)
        return self.put(name, value)

    def get(self, name: str) -> tuple[int, object] | None:
        return self.objects.get(name)

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name in self.objects if name.startswith(prefix))

    def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    def values(self, prefix: str) -> dict[str, object]:
        return {name: self.objects[name][1] for name in self.names(prefix)}


def used_by(place: Place) -> set[str]:
    """Return the packs that manifests name."""
    return {pack for packs in place.values("snapshots/").values() if isinstance(packs, frozenset) for pack in packs}


@dataclass
class Uploader:
    """One process that uploads. ``over``: it is dead or done."""

    place: Place
    rules: Rules
    upload: str
    snapshot: str
    wanted: tuple[str, ...]
    over: bool = False
    published: bool = False
    attempt: int = 0

    def run(self) -> Step:
        try:
            yield from self._upload()
        except ConflictError:
            return
        finally:
            self.over = True

    def _upload(self) -> Step:
        manifest = f"snapshots/{self.snapshot}"
        yield "look at manifest"
        seen = self.place.get(manifest)
        version = None if seen is None else seen[0]
        name = yield from self._begin(version)
        if seen is None or isinstance(seen[1], Absence):
            used = yield from self._packs()
            yield "put manifest"
            if version is None:
                self.place.put_new(manifest, used)
            else:
                self.place.replace(manifest, used, version=version)
        self.published = True
        yield "delete intent"
        self.place.delete(name)

    def _begin(self, version: int | None) -> Generator[str, None, str]:
        """Put the intent, or take up that of a dead process of this upload while its place is as it was."""
        yield "look at intent"
        found = self.place.get(f"intents/{self.upload}")
        old = found[1] if found else None
        if self.rules.ends_token_with_place and (old is None or not isinstance(old, Intent) or old.seen != version):
            self.attempt += 1
            self.upload = f"{self.upload.partition('.')[0]}.{self.attempt}"
        yield "put intent"
        self.place.put(f"intents/{self.upload}", Intent(upload=self.upload, snapshot=self.snapshot, seen=version))
        return f"intents/{self.upload}"

    def _packs(self) -> Generator[str, None, frozenset[str]]:
        dead: set[str] = set()
        if self.rules.tombstones_before_packs:
            dead = yield from self._tombstoned()
        yield "list packs"
        there = self.place.names("packs/")
        yield "list manifests"
        shared = used_by(self.place)
        if not self.rules.tombstones_before_packs:
            dead = yield from self._tombstoned()
        used: set[str] = set()
        for content in self.wanted:
            pack = next((one for one in there if one.startswith(f"packs/{content}.") and one not in dead), None)
            if pack is None and not self.rules.heeds_tombstones_of_shared:
                pack = next((one for one in shared if one.startswith(f"packs/{content}.")), None)
            if pack is None:
                pack = self._new_name(content, dead)
                yield f"put {pack}"
                self.place.put(pack, content)
            used.add(pack)
        return frozenset(used)

    def _tombstoned(self) -> Generator[str, None, set[str]]:
        yield "list tombstones"
        if not self.rules.heeds_tombstones:
            return set()
        tombstones = self.place.values("tombstones/").values()
        return {pack for one in tombstones if isinstance(one, Tombstone) for pack in one.packs}

    def _new_name(self, content: str, dead: set[str]) -> str:
        if self.rules.names_never_return:
            return f"packs/{content}.{self.upload}"
        return next(
            name for name in (f"packs/{content}.{number}" for number in range(len(dead) + 1)) if name not in dead
        )


@dataclass
class Remover:
    """Removes a snapshot: a mark in the place of its manifest."""

    place: Place
    snapshot: str

    def run(self) -> Step:
        yield "look at manifest"
        found = self.place.get(f"snapshots/{self.snapshot}")
        if found is None or isinstance(found[1], Absence):
            return
        yield "remove manifest"
        try:
            self.place.replace(f"snapshots/{self.snapshot}", Absence(by="remover"), version=found[0])
        except ConflictError:
            return


@dataclass
class Collector:
    """One pass of a collector. ``patient``: it calls no upload over, but those whose process it is told is over."""

    place: Place
    rules: Rules
    name: str
    over: Callable[[str], bool]
    patient: bool
    lease: int = 0
    losses: list[str] = field(default_factory=list)

    def run(self) -> Step:
        try:
            yield from self._take_lease()
            yield from self._end_uploads()
            yield from self._sweep()
            yield from self._bury()
        except ConflictError:
            return

    def _take_lease(self) -> Step:
        yield "take lease"
        found = self.place.get("locks/collector")
        if found is None:
            self.lease = self.place.put_new("locks/collector", self.name)
        else:
            self.lease = self.place.replace("locks/collector", self.name, version=found[0])

    def _remove(self, name: str) -> Step:
        """Delete, if the lease is still held: asking and deleting are one step, as lease and request have their bounds."""
        yield f"delete {name}"
        found = self.place.get("locks/collector")
        if self.rules.asks_for_lease and (found is None or found[0] != self.lease):
            raise ConflictError(name)
        self.place.delete(name)

    def _end_uploads(self) -> Step:
        """Call uploads over: first nobody can publish for them, then their intents go."""
        yield "list intents"
        for name, intent in self.place.values("intents/").items():
            assert isinstance(intent, Intent)
            manifest = f"snapshots/{intent.snapshot}"
            yield "look at manifest"
            seen = self.place.get(manifest)
            if seen is None or isinstance(seen[1], Absence):
                if self.patient and not self.over(intent.upload):
                    continue
                if self.rules.revokes:
                    yield "revoke"
                    try:
                        if seen is None:
                            self.place.put_new(manifest, Absence(by=self.name))
                        else:
                            self.place.replace(manifest, Absence(by=self.name), version=seen[0])
                    except ConflictError:
                        continue
            yield "delete intent"
            self.place.delete(name)

    def _look(self) -> Generator[str, None, tuple[set[str], set[str]]]:
        """Return the uploads that are open, and the packs in use."""
        opened: set[str] = set()
        used: set[str] = set()
        for part in ("intents", "manifests") if self.rules.intents_before_manifests else ("manifests", "intents"):
            yield f"list {part}"
            if part == "manifests":
                used |= used_by(self.place)
                continue
            for intent in self.place.values("intents/").values():
                assert isinstance(intent, Intent)
                opened.add(intent.upload)
        return opened, used

    def _sweep(self) -> Step:
        yield "list tombstones"
        for name in self.place.names("tombstones/"):
            yield "get tombstone"
            found = self.place.get(name)
            if found is None:
                continue
            version, tombstone = found
            assert isinstance(tombstone, Tombstone)
            if tombstone.waits is None:
                tombstone = yield from self._note_uploads(name, tombstone, version)
            opened, used = yield from self._look()
            if self.rules.waits_for_uploads and (tombstone.waits or frozenset()) & opened:
                continue
            for pack in sorted(tombstone.packs):
                if pack not in used or not self.rules.looks_again:
                    yield from self._remove(pack)
            yield from self._remove(name)

    def _bury(self) -> Step:
        yield "list tombstones"
        tombstones = [one for one in self.place.values("tombstones/").values() if isinstance(one, Tombstone)]
        _, used = yield from self._look()
        yield "list packs"
        dead = set(self.place.names("packs/")) - used
        dead -= {pack for one in tombstones for pack in one.packs}
        if not dead:
            return
        waits = None
        if not self.rules.looks_for_uploads_after_tombstones:
            opened, _ = yield from self._look()
            waits = frozenset(opened)
        name = f"tombstones/{self.lease}"
        tombstone = Tombstone(packs=frozenset(dead), waits=waits)
        yield "put tombstone"
        version = self.place.put_new(name, tombstone)
        if waits is None:
            yield from self._note_uploads(name, tombstone, version)

    def _note_uploads(self, name: str, tombstone: Tombstone, version: int) -> Generator[str, None, Tombstone]:
        opened, _ = yield from self._look()
        noted = replace(tombstone, waits=frozenset(opened))
        yield "note uploads"
        self.place.replace(name, noted, version=version)
        return noted
