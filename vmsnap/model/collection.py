"""What collecting the replica's garbage came to."""

from __future__ import annotations

from pydantic import AwareDatetime, BaseModel, ConfigDict


class Heap(BaseModel):
    """Some objects: how many, and their bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objects: int = 0
    size_bytes: int = 0

    def plus(self, size_bytes: int) -> Heap:
        """Return the heap with one more object."""
        return Heap(objects=self.objects + 1, size_bytes=self.size_bytes + size_bytes)


class EndedUpload(BaseModel):
    """An upload that was called over. ``reason`` says why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    upload: str
    guest: str
    snapshot: str
    host: str
    reason: str


class CollectReport(BaseModel):
    """One pass over the replica.

    ``removed`` is gone. ``found`` was found to be garbage by this pass, and is removed by a later one. ``waiting`` was found
    before and cannot go yet: ``reasons`` say why. ``rewritten`` are packs of which less than half was in use.
    ``renewed`` objects were locked for longer; ``unlocked`` says which policy files are wrong, whose guests' copies were not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    started: AwareDatetime
    finished: AwareDatetime
    dry_run: bool
    snapshots: int = 0
    used: Heap = Heap()
    removed: Heap = Heap()
    found: Heap = Heap()
    waiting: Heap = Heap()
    rewritten: Heap = Heap()
    renewed: int = 0
    unlocked: tuple[str, ...] = ()
    uploads: int = 0
    ended: tuple[EndedUpload, ...] = ()
    reasons: tuple[str, ...] = ()
