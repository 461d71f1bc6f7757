"""Killing a process at every step of a store on a local file system, and looking what is left.

``steps_of`` counts the calls to the operating system that an action makes; ``die_at`` runs the action in a forked process
that is killed, by SIGKILL, right before the given one.
"""
# ruff: noqa: D102, S101

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from vmsnap.errors import VmsnapError
from vmsnap.model.ids import RunId, new_run_id
from vmsnap.model.manifest import Marks, Pin, Snapshot
from vmsnap.ports.store import DiskContent
from vmsnap.stores.images import ImagesStore
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.fake_disks import FakeDiskView
from vmsnap.testing.store_contract import (
    BLOCK,
    GUEST,
    NOON,
    blocks,
    no_progress,
    sample_clean,
    sample_manifest,
)

_WATCHED = ("mkdir", "open", "pwrite", "ftruncate", "fchmod", "fsync", "rename", "replace", "unlink", "rmdir", "write")
_MINUTE = timedelta(minutes=1)


@contextmanager
def _watched(before_each: Callable[[], None]) -> Iterator[None]:
    """Call ``before_each`` before every watched call of the operating system."""
    places = [(os, name) for name in _WATCHED] + [(fcntl, "ioctl"), (fcntl, "flock")]
    originals = [getattr(module, name) for module, name in places]

    def wrap(original: Callable[..., object]) -> Callable[..., object]:
        def call(*positional: object, **named: object) -> object:
            before_each()
            return original(*positional, **named)

        return call

    for (module, name), original in zip(places, originals, strict=True):
        setattr(module, name, wrap(original))
    try:
        yield
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def die_at(step: int, action: Callable[[], object]) -> bool:
    """Run the action in a child that is killed before its ``step``th call. Returns whether it got that far."""
    child = os.fork()
    if child == 0:
        lock = threading.Lock()
        calls = 0

        def count() -> None:
            nonlocal calls
            with lock:
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1

        try:
            with _watched(count):
                action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


class StoreCrashes:
    """The suite. ``root`` is an empty folder for a store, ``allow_copies`` whether it has no reflinks."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "store"
        root.mkdir()
        return root

    @pytest.fixture
    def allow_copies(self) -> bool:
        return True

    @pytest.fixture
    def store(self, root: Path, allow_copies: bool) -> ImagesStore:  # noqa: FBT001
        return ImagesStore(root, allow_copies=allow_copies)

    @pytest.fixture
    def before(self, store: ImagesStore, tmp_path: Path) -> Snapshot:
        """Return a snapshot that is there already."""
        return self.save(store, run=new_run_id(), view=self.view(tmp_path / "before", seed=0))

    def view(self, path: Path, *, seed: int) -> FakeDiskView:
        content = {**blocks(*range(20)), **blocks(3, 4, 70, seed=seed), 9 * BLOCK: bytes(BLOCK)}
        return FakeDiskView.make(path, content=content, size_bytes=130 * BLOCK)

    def save(self, store: ImagesStore, *, run: RunId, view: FakeDiskView) -> Snapshot:
        with store.lock(GUEST, timeout=_MINUTE):
            staging = store.stage(run, guest=GUEST)
            record = store.write_disk(staging, view=view, progress=no_progress, cancel=NeverCancelled())
            store.add_file(staging, name="nvram.fd", source=view.path)
            manifest = sample_manifest(run, disks=(record,), captured=NOON + _MINUTE, nvram="nvram.fd")
            return store.publish(staging, manifest=manifest, clean=sample_clean(run))

    def reconcile(self, store: ImagesStore, *, run: RunId) -> None:
        for resource in store.owned():
            store.release(resource, deadline=_MINUTE)
        store.release(store.staging_resource(run, guest=GUEST), deadline=_MINUTE)

    def assert_whole(self, root: Path, store: ImagesStore) -> tuple[RunId, ...]:
        """Check that every folder below the guest is a snapshot that verifies, and return which."""
        snapshots = store.snapshots()
        folders = sorted(entry.name for entry in (root / GUEST).iterdir() if entry.is_dir()) if root.exists() else []
        assert folders == sorted(snapshot.id for snapshot in snapshots)
        for snapshot in snapshots:
            assert store.verify(snapshot, progress=no_progress, cancel=NeverCancelled())[1] == ()
        assert store.owned() == ()
        assert [finding for finding in store.findings(needed_bytes=0) if finding.check == "store contents"] == []
        return tuple(snapshot.manifest.run for snapshot in snapshots)

    def test_a_snapshot_is_published_whole_or_not_at_all(
        self, root: Path, store: ImagesStore, before: Snapshot, tmp_path: Path
    ) -> None:
        view = self.view(tmp_path / "after", seed=1)
        outcomes = []
        step, died = 0, True
        while died:
            run = new_run_id()
            died = die_at(step, lambda run=run: self.save(store, run=run, view=view))  # type: ignore[misc]
            listed = {snapshot.manifest.run for snapshot in store.snapshots()}
            self.reconcile(store, run=run)
            kept = self.assert_whole(root, store)
            assert set(kept) == listed
            outcomes.append(run in kept)
            if run in kept:
                assert Path(store.images(store.find(run))[0].path).read_bytes() == view.path.read_bytes()
                store.remove(store.find(run))
            assert [snapshot.id for snapshot in store.snapshots()] == [before.id]
            step += 1
        # It comes into being at one step, and never goes away at a later one.
        assert outcomes == sorted(outcomes)
        assert outcomes[-1]
        assert step > 20

    def test_a_snapshot_is_removed_whole_or_not_at_all(
        self, root: Path, store: ImagesStore, before: Snapshot, tmp_path: Path
    ) -> None:
        view = self.view(tmp_path / "after", seed=1)
        outcomes = []
        step, died = 0, True
        while died:
            snapshot = self.save(store, run=new_run_id(), view=view)
            died = die_at(step, lambda snapshot=snapshot: store.remove(snapshot))  # type: ignore[misc]
            listed = snapshot in store.snapshots()
            self.reconcile(store, run=snapshot.manifest.run)
            kept = snapshot.manifest.run in self.assert_whole(root, store)
            assert kept == listed
            outcomes.append(not kept)
            if kept:
                store.remove(snapshot)
            assert [one.id for one in store.snapshots()] == [before.id]
            step += 1
        assert outcomes == sorted(outcomes)
        assert outcomes[-1]
        assert step > 5

    def test_marks_are_the_old_or_the_new(self, store: ImagesStore, before: Snapshot) -> None:
        marks = Marks(pin=Pin(owner="ann", reason="audit", since=NOON))
        step = 0
        while die_at(step, lambda: store.mark(before, marks=marks)):
            assert store.find(before.id).marks in {Marks(), marks}
            step += 1
        assert store.find(before.id).marks == marks

    def test_a_copy_is_never_there_without_its_pin(
        self, root: Path, store: ImagesStore, before: Snapshot, tmp_path: Path
    ) -> None:
        pin = Pin(owner="ann", reason="restored", since=NOON, until=NOON + _MINUTE)
        (content,) = store.contents(before)
        image, digests = content.image.read_bytes(), content.digests.read_bytes()
        store.remove(before)

        def fill(target: DiskContent) -> None:
            target.image.write_bytes(image)
            target.digests.write_bytes(digests)

        outcomes = []
        step, died = 0, True
        while died:
            run = new_run_id()
            staging = store.stage(run, guest=GUEST)
            store.receive_disk(staging, record=content.record, fill=fill)
            store.add_file(staging, name="nvram.fd", source=tmp_path / "before")
            died = die_at(step, lambda made=staging: store.publish_copy(made, manifest=before.manifest, pin=pin))  # type: ignore[misc]
            self.reconcile(store, run=run)
            self.assert_whole(root, store)
            found = store.snapshots()
            assert [one.marks.pin for one in found] == [pin] * len(found)
            outcomes.append(bool(found))
            for one in found:
                store.remove(one)
            step += 1
        assert outcomes == sorted(outcomes)
        assert outcomes[-1]
        assert step > 10

    def test_a_hold_of_a_dead_run_is_found(self, root: Path, store: ImagesStore, before: Snapshot) -> None:
        step, died = 0, True
        while died:
            run = new_run_id()
            died = die_at(step, lambda run=run: store.hold(store.hold_resource(run, snapshot=before)))  # type: ignore[misc]
            assert store.holders(before) in {(), (run,)}
            if not died:
                with pytest.raises(VmsnapError):
                    store.remove(before)
            store.release(store.hold_resource(run, snapshot=before), deadline=_MINUTE)
            assert self.assert_whole(root, store) == (before.manifest.run,)
            assert store.holders(before) == ()
            step += 1
