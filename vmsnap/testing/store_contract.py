"""What every ``SnapshotStore`` must do. Subclass ``StoreContract`` and give it a fixture ``store``.

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self, tmp_path: Path) -> SnapshotStore: ...

The suite writes a few megabytes below ``tmp_path``.
"""
# ruff: noqa: D102, FBT001, S101

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vmsnap.errors import (
    BusyError,
    CancelledError,
    HeldError,
    PreconditionError,
    SafetyError,
    SnapshotNotFoundError,
    VerificationError,
    VmsnapError,
)
from vmsnap.model.capture import CaptureMode
from vmsnap.model.drain import CleanShutdown, FileSystemState, InstanceEvidence
from vmsnap.model.guest import Severity
from vmsnap.model.hints import BlockSet, DiskHint
from vmsnap.model.ids import RunId, SnapshotId, new_run_id
from vmsnap.model.isolation import Rung
from vmsnap.model.manifest import (
    CaptureRecord,
    CleanRecord,
    DiskRecord,
    FileSystemRecord,
    InstanceRecord,
    IsolationRecord,
    MachineRecord,
    Manifest,
    Marks,
    Pin,
    Snapshot,
    StoreRecord,
    Verification,
)
from vmsnap.ports.store import DiskContent, SnapshotStore, Staging
from vmsnap.testing.cancels import CancelledAtOnce, NeverCancelled
from vmsnap.testing.fake_disks import FakeDiskView

BLOCK = 64 * 1024
GUEST = "db1"
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
STRANGE_NAMES = ("two words", "a/b", "../up", "o'neil\"<x>&", "däta", "a@b", "@", ".", "%41", "x" * 255)


def no_progress(_done: int, _total: int) -> None:
    """Take no notice."""


def sample_clean(run: RunId, *, made: datetime = NOON) -> CleanShutdown:
    """Return evidence of a clean shutdown, made up."""
    return CleanShutdown(
        run=run,
        made=made,
        guest_shut_down_by="agent",
        instances=(
            InstanceEvidence(
                engine="postgresql",
                instance="15/main",
                data_directory="/var/lib/postgresql/15/main",
                method="disk",
                clean=True,
                observed=(("state", "shut down"),),
            ),
        ),
        file_systems=(FileSystemState(disk="vda", kind="ext4", uuid="u", clean=True, observed="state clean"),),
    )


def sample_manifest(
    run: RunId,
    *,
    guest: str = GUEST,
    disks: tuple[DiskRecord, ...],
    captured: datetime = NOON,
    nvram: str | None = None,
) -> Manifest:
    """Return the manifest of a snapshot with these disks, otherwise made up."""
    clean = sample_clean(run)
    return Manifest(
        id=SnapshotId(run),
        run=run,
        guest=guest,
        created=captured + timedelta(minutes=1),
        parent=None,
        machine=MachineRecord(
            hypervisor="fake", definition="<domain/>", uuid="u", memory_bytes=1 << 30, vcpus=1, nvram=nvram
        ),
        capture=CaptureRecord(mode=CaptureMode.LIVE, captured=captured, pause_ms=20.0, ram_bytes=1 << 20),
        isolation=IsolationRecord(rung=Rung.NONE, address=None, seconds=0.1, proof=()),
        drain=(),
        clean=CleanRecord(
            made=clean.made,
            guest_shut_down_by=clean.guest_shut_down_by,
            instances=(
                InstanceRecord(
                    engine="postgresql",
                    instance="15/main",
                    data_directory="/var/lib/postgresql/15/main",
                    method="disk",
                    observed={"state": "shut down"},
                ),
            ),
            file_systems=(FileSystemRecord(disk="vda", kind="ext4", uuid="u", observed="state clean"),),
        ),
        disks=disks,
        store=StoreRecord(
            logical_bytes=sum(disk.size_bytes for disk in disks),
            new_bytes=sum(disk.new_bytes for disk in disks),
            seconds=1.0,
        ),
        steps=(),
        vmsnap_version="0",
    )


def blocks(*numbers: int, seed: int = 0) -> dict[int, bytes]:
    """Return random blocks at these places, by byte offset."""
    return {number * BLOCK: random.Random(seed * 100_000 + number).randbytes(BLOCK) for number in numbers}  # noqa: S311


class StoreContract:
    """The suite. ``store`` begins empty."""

    @pytest.fixture
    def make_view(self, tmp_path: Path) -> Callable[..., FakeDiskView]:
        """Return a maker of views: content by offset, size in bytes, target."""
        counter = iter(range(1000))

        def make(
            content: Mapping[int, bytes],
            *,
            size_bytes: int = 64 * BLOCK,
            target: str = "vda",
            own: tuple[int, ...] | None = None,
        ) -> FakeDiskView:
            path = tmp_path / f"source-{next(counter)}"
            stretches = None if own is None else tuple((number * BLOCK, BLOCK) for number in own)
            return FakeDiskView.make(path, content=content, size_bytes=size_bytes, target=target, own=stretches)

        return make

    def save(
        self, store: SnapshotStore, *views: FakeDiskView, guest: str = GUEST, captured: datetime = NOON
    ) -> Snapshot:
        """Store a snapshot of these disks."""
        run = new_run_id()
        staging = store.stage(run, guest=guest)
        return self.publish(store, staging, *views, captured=captured)

    def publish(
        self, store: SnapshotStore, staging: Staging, *views: FakeDiskView, captured: datetime = NOON
    ) -> Snapshot:
        """Write the disks and publish."""
        records = tuple(
            store.write_disk(staging, view=view, progress=no_progress, cancel=NeverCancelled()) for view in views
        )
        manifest = sample_manifest(staging.run, guest=staging.guest, disks=records, captured=captured)
        return store.publish(staging, manifest=manifest, clean=sample_clean(staging.run))

    def read(self, store: SnapshotStore, snapshot: Snapshot, *, target: str = "vda") -> bytes:
        """Return a stored disk's bytes."""
        return next(Path(image.path) for image in store.images(snapshot) if image.target == target).read_bytes()

    def assert_sound(self, store: SnapshotStore, snapshot: Snapshot) -> None:
        """Check that a snapshot verifies."""
        _, defects = store.verify(snapshot, progress=no_progress, cancel=NeverCancelled())
        assert defects == ()

    # What is stored comes back.

    def test_a_stored_disk_reads_back(self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]) -> None:
        view = make_view(blocks(0, 3, 63))
        snapshot = self.save(store, view)
        assert self.read(store, snapshot) == view.path.read_bytes()
        (image,) = store.images(snapshot)
        assert (image.target, image.image_format, image.size_bytes) == ("vda", "raw", view.size_bytes)
        (record,) = snapshot.manifest.disks
        assert (record.size_bytes, record.data_bytes, record.new_bytes) == (64 * BLOCK, 3 * BLOCK, 3 * BLOCK)
        self.assert_sound(store, snapshot)

    def test_a_disk_of_zeroes_takes_no_room(self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]) -> None:
        view = make_view({0: bytes(BLOCK)}, size_bytes=1 << 30)
        snapshot = self.save(store, view)
        (record,) = snapshot.manifest.disks
        assert (record.data_bytes, record.new_bytes) == (0, 0)
        assert Path(store.images(snapshot)[0].path).stat().st_blocks == 0
        self.assert_sound(store, snapshot)

    @pytest.mark.parametrize("size_bytes", [1, 512, BLOCK - 1, BLOCK, BLOCK + 512, 200 * BLOCK + 7])
    def test_any_size_works(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView], size_bytes: int
    ) -> None:
        content = random.Random(size_bytes).randbytes(size_bytes)  # noqa: S311
        view = make_view({0: content}, size_bytes=size_bytes)
        snapshot = self.save(store, view)
        assert self.read(store, snapshot) == content
        self.assert_sound(store, snapshot)

    def test_several_disks_and_strange_targets(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        views = [make_view(blocks(index, seed=index), target=name) for index, name in enumerate(("vda", "sd/b", "é x"))]
        snapshot = self.save(store, *views)
        for view in views:
            assert self.read(store, snapshot, target=view.target) == view.path.read_bytes()

    def test_a_small_file_comes_back(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView], tmp_path: Path
    ) -> None:
        (tmp_path / "vars").write_bytes(b"firmware")
        run = new_run_id()
        staging = store.stage(run, guest=GUEST)
        store.add_file(staging, name="nvram.fd", source=tmp_path / "vars")
        snapshot = self.publish(store, staging, make_view(blocks(1)))
        assert store.file(snapshot, name="nvram.fd").read_bytes() == b"firmware"
        with pytest.raises(SnapshotNotFoundError):
            store.file(snapshot, name="other")

    # A later snapshot stores what changed, and stands on its own.

    def test_a_second_snapshot_stores_changed_blocks_only(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView], shares_blocks: bool
    ) -> None:
        first_view = make_view(blocks(*range(40)))
        first = self.save(store, first_view)
        content = {**blocks(*range(40)), **blocks(7, 8, 50, seed=1), 3 * BLOCK: bytes(BLOCK)}
        view = make_view(content)
        second = self.save(store, view, captured=NOON + SECOND)
        assert self.read(store, second) == view.path.read_bytes()
        assert self.read(store, first) == first_view.path.read_bytes()
        (record,) = second.manifest.disks
        assert record.data_bytes == 40 * BLOCK
        assert record.new_bytes == (3 if shares_blocks else 40) * BLOCK
        self.assert_sound(store, first)
        self.assert_sound(store, second)

    def test_trimmed_blocks_become_holes(self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]) -> None:
        self.save(store, make_view(blocks(*range(32))))
        view = make_view(blocks(5))
        second = self.save(store, view, captured=NOON + SECOND)
        assert self.read(store, second) == view.path.read_bytes()
        assert Path(store.images(second)[0].path).stat().st_blocks * 512 == BLOCK
        self.assert_sound(store, second)

    @pytest.mark.parametrize("size_bytes", [BLOCK // 2, 10 * BLOCK + 100, 64 * BLOCK, 64 * BLOCK + 512, 200 * BLOCK])
    @pytest.mark.parametrize("before_bytes", [64 * BLOCK, 10 * BLOCK + 512])
    def test_a_disk_may_change_its_size(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView], size_bytes: int, before_bytes: int
    ) -> None:
        before = b"".join(blocks(*range(64)).values())[:before_bytes]
        self.save(store, make_view({0: before}, size_bytes=before_bytes))
        content = (before + bytes(BLOCK) + blocks(66, seed=1)[66 * BLOCK])[:size_bytes]
        view = make_view({0: content}, size_bytes=size_bytes)
        second = self.save(store, view, captured=NOON + SECOND)
        assert self.read(store, second) == view.path.read_bytes()
        self.assert_sound(store, second)

    def test_a_new_disk_is_stored_whole_beside_the_old(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        self.save(store, make_view(blocks(1)))
        added = make_view(blocks(2), target="vdb")
        second = self.save(store, make_view(blocks(1)), added, captured=NOON + SECOND)
        assert self.read(store, second, target="vdb") == added.path.read_bytes()

    def test_a_snapshot_outlives_the_one_before_it(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        first = self.save(store, make_view(blocks(*range(20))))
        view = make_view({**blocks(*range(20)), **blocks(4, seed=1)})
        second = self.save(store, view, captured=NOON + SECOND)
        store.remove(first)
        assert self.read(store, second) == view.path.read_bytes()
        self.assert_sound(store, second)
        third = self.save(store, view, captured=NOON + 2 * SECOND)
        assert self.read(store, third) == view.path.read_bytes()

    def test_the_newest_snapshot_is_built_upon(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        assert store.stage(new_run_id(), guest=GUEST).previous is None
        first = self.save(store, make_view(blocks(1)))
        assert store.stage(new_run_id(), guest=GUEST).previous == first.id
        assert store.stage(new_run_id(), guest="another").previous is None

    # A hint of what changed saves reading; it is never believed blindly.

    def save_by_hint(
        self, store: SnapshotStore, view: FakeDiskView, *, written: tuple[int, ...], since: Snapshot | None
    ) -> Snapshot:
        """Store a snapshot with the hint that the guest wrote these blocks since that one."""
        hint = DiskHint(
            target="vda",
            since=None if since is None else since.id,
            written=BlockSet.of(((number * BLOCK, BLOCK) for number in written), size_bytes=view.size_bytes),
        )
        staging = store.stage(new_run_id(), guest=GUEST)
        record = store.write_disk(staging, view=view, progress=no_progress, cancel=NeverCancelled(), hint=hint)
        later = NOON + SECOND * (1 + len(store.snapshots()))
        manifest = sample_manifest(staging.run, disks=(record,), captured=later)
        return store.publish(staging, manifest=manifest, clean=sample_clean(staging.run))

    def test_with_a_hint_what_changed_is_stored(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView], shares_blocks: bool
    ) -> None:
        first = self.save(store, make_view(blocks(*range(40)), own=(5,)))
        # The guest wrote 7 and trimmed 8, the clone wrote 50; and where the clone before wrote, the guest's own is back.
        content = {**blocks(*range(8)), **blocks(*range(9, 40)), **blocks(5, 7, 50, seed=1)}
        view = make_view(content, own=(50,))
        second = self.save_by_hint(store, view, written=(7, 8), since=first)
        assert self.read(store, second) == view.path.read_bytes()
        self.assert_sound(store, second)
        (record,) = second.manifest.disks
        assert (record.data_bytes, record.new_bytes) == (40 * BLOCK, (3 if shares_blocks else 40) * BLOCK)
        assert record.read is not None
        assert (record.read.since, record.read.mismatch) == (first.id if shares_blocks else None, None)
        assert (record.read.full_because is None) == shares_blocks

    def test_a_hint_that_says_too_little_is_found_out_and_all_is_read(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView], shares_blocks: bool
    ) -> None:
        for content in ({**blocks(*range(40)), **blocks(7, 9, seed=1)}, blocks(*range(39)), blocks(*range(41))):
            later = NOON + SECOND * (1 + len(store.snapshots()))
            first = self.save(store, make_view(blocks(*range(40)), own=()), captured=later)
            view = make_view(content, own=())
            second = self.save_by_hint(store, view, written=(7,), since=first)
            assert self.read(store, second) == view.path.read_bytes()
            self.assert_sound(store, second)
            (record,) = second.manifest.disks
            assert record.read is not None
            assert record.read.since is None
            assert record.data_bytes == len([one for one in content if one < view.size_bytes]) * BLOCK
            assert (record.read.mismatch is not None) == shares_blocks

    def test_a_hint_since_another_snapshot_is_of_no_use(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        first = self.save(store, make_view(blocks(*range(40)), own=()))
        changed = {**blocks(*range(40)), **blocks(7, seed=1)}
        self.save_by_hint(store, make_view(changed, own=()), written=(7,), since=first)
        for since in (first, None):
            view = make_view(blocks(*range(40)), own=())
            again = self.save_by_hint(store, view, written=(), since=since)
            assert self.read(store, again) == view.path.read_bytes()
            (record,) = again.manifest.disks
            assert record.read is not None
            assert (record.read.since, record.read.mismatch) == (None, None)
            assert record.read.full_because

    def test_a_hint_of_a_disk_of_another_size_is_of_no_use(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        first = self.save(store, make_view(blocks(*range(40)), own=()))
        view = make_view(blocks(*range(40), 70), size_bytes=80 * BLOCK, own=())
        second = self.save_by_hint(store, view, written=(), since=first)
        assert self.read(store, second) == view.path.read_bytes()

    def test_without_a_hint_the_reason_is_told(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        self.save(store, make_view(blocks(1)))
        staging = store.stage(new_run_id(), guest=GUEST)
        record = store.write_disk(
            staging,
            view=make_view(blocks(1)),
            progress=no_progress,
            cancel=NeverCancelled(),
            hint=DiskHint(target="vda", reason="the guest was started anew"),
        )
        assert record.read is not None
        assert record.read.full_because in (
            "the guest was started anew",
            "there is no earlier snapshot of this disk to build upon",
        )

    # It exists whole or not at all.

    def test_nothing_exists_before_it_is_published(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        run = new_run_id()
        staging = store.stage(run, guest=GUEST)
        store.write_disk(staging, view=make_view(blocks(1)), progress=no_progress, cancel=NeverCancelled())
        assert store.snapshots() == ()
        assert store.guests() == ()
        with pytest.raises(SnapshotNotFoundError):
            store.find(run)

    def test_publishing_refuses_evidence_of_another_run(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        run = new_run_id()
        staging = store.stage(run, guest=GUEST)
        record = store.write_disk(staging, view=make_view(blocks(1)), progress=no_progress, cancel=NeverCancelled())
        mine, other = sample_manifest(run, disks=(record,)), sample_manifest(new_run_id(), disks=(record,))
        stolen = sample_manifest(run, guest="another", disks=(record,))
        for manifest, clean in (
            (mine, sample_clean(new_run_id())),
            (other, sample_clean(run)),
            (other, sample_clean(other.run)),
            (stolen, sample_clean(run)),
        ):
            with pytest.raises(SafetyError):
                store.publish(staging, manifest=manifest, clean=clean)
        assert store.snapshots() == ()
        assert store.publish(staging, manifest=mine, clean=sample_clean(run)) == store.find(run)

    def test_publishing_refuses_a_manifest_of_other_disks(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        run = new_run_id()
        staging = store.stage(run, guest=GUEST)
        records = [
            store.write_disk(
                staging, view=make_view(blocks(1), target=name), progress=no_progress, cancel=NeverCancelled()
            )
            for name in ("vda", "vdb")
        ]
        with pytest.raises(SafetyError):
            store.publish(staging, manifest=sample_manifest(run, disks=(records[0],)), clean=sample_clean(run))
        assert store.snapshots() == ()

    def test_a_run_can_be_cancelled(self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]) -> None:
        run = new_run_id()
        staging = store.stage(run, guest=GUEST)
        with pytest.raises(CancelledError):
            store.write_disk(staging, view=make_view(blocks(1)), progress=no_progress, cancel=CancelledAtOnce())
        store.release(store.staging_resource(run, guest=GUEST), deadline=SECOND)
        assert store.owned() == ()

    def test_progress_ends_at_the_size(self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]) -> None:
        seen: list[tuple[int, int]] = []
        staging = store.stage(new_run_id(), guest=GUEST)
        view = make_view(blocks(1, 30), size_bytes=300 * BLOCK)
        store.write_disk(
            staging, view=view, progress=lambda done, total: seen.append((done, total)), cancel=NeverCancelled()
        )
        assert seen[-1] == (view.size_bytes, view.size_bytes)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    # What a run made can be found and removed.

    def test_staging_is_owned_and_released(self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]) -> None:
        run = new_run_id()
        resource = store.staging_resource(run, guest=GUEST)
        assert resource.kind in store.kinds
        store.release(resource, deadline=SECOND)
        staging = store.stage(run, guest=GUEST)
        store.write_disk(staging, view=make_view(blocks(1)), progress=no_progress, cancel=NeverCancelled())
        assert store.owned() == (resource,)
        store.release(store.owned()[0], deadline=SECOND)
        assert store.owned() == ()
        store.release(resource, deadline=SECOND)

    def test_releasing_the_staging_of_a_published_run_keeps_the_snapshot(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        snapshot = self.save(store, make_view(blocks(1)))
        store.release(store.staging_resource(snapshot.manifest.run, guest=GUEST), deadline=SECOND)
        assert store.snapshots() == (snapshot,)
        self.assert_sound(store, snapshot)
        assert store.owned() == ()

    @pytest.mark.parametrize("guest", STRANGE_NAMES)
    def test_any_guest_name_works(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView], guest: str
    ) -> None:
        run = new_run_id()
        staging = store.stage(run, guest=guest)
        assert [item.run for item in store.owned()] == [run]
        snapshot = self.publish(store, staging, make_view(blocks(1)))
        assert store.guests() == (guest,)
        assert store.find(f"{guest}@latest") == snapshot
        assert store.snapshots(guest) == (snapshot,)
        hold = store.hold_resource(run, snapshot=snapshot)
        store.hold(hold)
        for resource in store.owned():
            store.release(resource, deadline=SECOND)
        assert store.owned() == ()
        assert store.remove(snapshot) > 0
        assert store.guests() == ()

    # Holds, removal, locks.

    def test_a_held_snapshot_is_not_removed(self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]) -> None:
        snapshot = self.save(store, make_view(blocks(1)))
        run = new_run_id()
        hold = store.hold_resource(run, snapshot=snapshot)
        assert hold.kind in store.kinds
        store.release(hold, deadline=SECOND)
        store.hold(hold)
        store.hold(hold)
        assert store.holders(snapshot) == (run,)
        assert hold in store.owned()
        with pytest.raises(HeldError, match=run):
            store.remove(snapshot)
        assert store.find(snapshot.id) == snapshot
        store.release(hold, deadline=SECOND)
        store.release(hold, deadline=SECOND)
        assert store.holders(snapshot) == ()
        store.remove(snapshot)
        with pytest.raises(SnapshotNotFoundError):
            store.hold(hold)
        store.release(hold, deadline=SECOND)

    def test_removal_returns_the_bytes_that_were_its_own(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView], shares_blocks: bool
    ) -> None:
        self.save(store, make_view(blocks(*range(10))))
        second = self.save(store, make_view({**blocks(*range(10)), **blocks(2, 3, seed=1)}), captured=NOON + SECOND)
        assert store.remove(second) == (2 if shares_blocks else 10) * BLOCK
        assert len(store.snapshots()) == 1

    def test_what_removing_several_frees_is_known_before(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView], shares_blocks: bool
    ) -> None:
        contents = (blocks(*range(10)), {**blocks(*range(10)), **blocks(2, 3, seed=1)})
        first, second = (self.save(store, make_view(one), captured=NOON + n * SECOND) for n, one in enumerate(contents))
        assert store.freed_by(()) == 0
        assert store.freed_by((second,)) == (2 if shares_blocks else 10) * BLOCK
        assert store.freed_by((first, second)) == (12 if shares_blocks else 20) * BLOCK
        third = self.save(store, make_view(blocks(0, *range(20, 29))), captured=NOON + 2 * SECOND)
        # Of the blocks that the first two have in common, the third has one too.
        assert store.freed_by((first, second)) == (11 if shares_blocks else 20) * BLOCK
        assert store.snapshots() == (first, second, third)

    def test_later_snapshots_do_not_need_a_removed_one(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        first = self.save(store, make_view(blocks(*range(20))))
        second = self.save_by_hint(store, make_view(blocks(*range(20))), written=(), since=first)
        store.remove(first)
        self.assert_sound(store, second)
        # What is known since one that is gone is no hint for a disk that is stored over another.
        late = {**blocks(*range(20)), **blocks(4, seed=1)}
        third = self.save_by_hint(store, make_view(late), written=(), since=first)
        assert third.manifest.disks[0].read is not None
        assert third.manifest.disks[0].read.since is None
        self.assert_sound(store, third)
        store.remove(second)
        store.remove(third)
        alone = self.save_by_hint(store, make_view(late), written=(), since=third)
        assert alone.manifest.disks[0].read is not None
        assert "no earlier snapshot" in str(alone.manifest.disks[0].read.full_because)
        assert self.read(store, alone)[4 * BLOCK : 5 * BLOCK] == late[4 * BLOCK]

    def test_a_removed_snapshot_is_gone(self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]) -> None:
        snapshot = self.save(store, make_view(blocks(1)))
        store.remove(snapshot)
        assert store.snapshots() == ()
        assert store.owned() == ()
        actions: tuple[Callable[[], object], ...] = (
            lambda: store.find(snapshot.id),
            lambda: store.images(snapshot),
            lambda: store.holders(snapshot),
            lambda: store.remove(snapshot),
            lambda: store.mark(snapshot, marks=Marks()),
            lambda: store.verify(snapshot, progress=no_progress, cancel=NeverCancelled()),
        )
        for action in actions:
            with pytest.raises(SnapshotNotFoundError):
                action()

    def test_a_guest_is_locked_once(self, store: SnapshotStore) -> None:
        with store.lock(GUEST, timeout=SECOND), store.lock("another", timeout=SECOND):
            problems: list[VmsnapError] = []

            def try_it() -> None:
                try:
                    with store.lock(GUEST, timeout=timedelta(milliseconds=100)):
                        pass
                except VmsnapError as error:
                    problems.append(error)

            thread = threading.Thread(target=try_it)
            thread.start()
            thread.join()
            assert [type(problem) for problem in problems] == [BusyError]
        with store.lock(GUEST, timeout=SECOND):
            pass

    # Finding, marking, verifying.

    def test_snapshots_are_listed_oldest_first_by_guest(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        late = self.save(store, make_view(blocks(1)), captured=NOON + 2 * SECOND)
        early = self.save(store, make_view(blocks(1)), captured=NOON)
        other = self.save(store, make_view(blocks(1)), guest="a", captured=NOON + SECOND)
        assert [one.id for one in store.snapshots()] == [other.id, early.id, late.id]
        assert [one.id for one in store.snapshots(GUEST)] == [early.id, late.id]
        assert store.snapshots("nobody") == ()
        assert store.captured(GUEST) == (early.manifest.captured, late.manifest.captured)
        assert store.captured("nobody") == ()
        store.remove(early)
        assert store.captured(GUEST) == (late.manifest.captured,)
        store.mark(late, marks=Marks(pin=None))
        assert store.captured(GUEST) == (late.manifest.captured,)

    def test_references(self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]) -> None:
        early = self.save(store, make_view(blocks(1)), captured=NOON)
        late = self.save(store, make_view(blocks(2)), captured=NOON + timedelta(hours=1))
        assert store.find(early.id) == early
        assert store.find(late.id[:9]) == late
        assert store.find(f"{GUEST}@latest") == late
        assert store.find(f"{GUEST}@2026-03-01T12:30:00Z") == early
        assert store.find(f"{GUEST}@2026-03-01T14:30:00+02:00") == early
        assert store.find(f"{GUEST}@2026-03-01T13:00") == late
        for wrong in (early.id[:3], f"{GUEST}@2026-02-28", "nobody@latest", f"{GUEST}@soon", GUEST, "", "@", "ffff?"):
            with pytest.raises(SnapshotNotFoundError) as caught:
                store.find(wrong)
            assert caught.value.remedy

    def test_marks_are_replaced(self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]) -> None:
        snapshot = self.save(store, make_view(blocks(1)))
        marks = Marks(
            pin=Pin(owner="ann", reason="audit", since=NOON),
            verification=Verification(at=NOON, blocks=64, bad_blocks=0),
        )
        assert store.mark(snapshot, marks=marks).marks == marks
        assert store.find(snapshot.id).marks == marks
        store.mark(snapshot, marks=Marks())
        assert store.find(snapshot.id) == snapshot

    def test_verifying_finds_damage(
        self,
        store: SnapshotStore,
        make_view: Callable[..., FakeDiskView],
        damage: Callable[[Snapshot], None],
    ) -> None:
        snapshot = self.save(store, make_view(blocks(1, 2)), make_view(blocks(3), target="vdb"))
        seen: list[tuple[int, int]] = []
        count, defects = store.verify(
            snapshot, progress=lambda done, total: seen.append((done, total)), cancel=NeverCancelled()
        )
        assert (count, defects) == (128, ())
        assert seen[-1] == (128 * BLOCK, 128 * BLOCK)
        damage(snapshot)
        _, defects = store.verify(snapshot, progress=no_progress, cancel=NeverCancelled())
        assert len(defects) == 1
        assert "vda.raw" in defects[0]

    def test_damage_is_repaired_with_blocks_of_another_copy(
        self,
        store: SnapshotStore,
        make_view: Callable[..., FakeDiskView],
        damage: Callable[[Snapshot], None],
    ) -> None:
        snapshot = self.save(store, make_view(blocks(1, 2)), make_view(blocks(3), target="vdb"))
        good = {image.target: Path(image.path).read_bytes() for image in store.images(snapshot)}
        damage(snapshot)

        def lost(target: str, number: int) -> bytes:
            raise VerificationError(f"block {number} of {target} is damaged there, too", remedy="none: this is a test")

        for useless in (lambda *_: b"wrong" * 100, lost):
            assert store.mend(snapshot, read=useless, cancel=NeverCancelled()) == 0
            assert len(store.verify(snapshot, progress=no_progress, cancel=NeverCancelled())[1]) == 1

        def read(target: str, number: int) -> bytes:
            return good[target][number * BLOCK : (number + 1) * BLOCK]

        assert store.mend(snapshot, read=read, cancel=NeverCancelled()) == 1
        assert store.verify(snapshot, progress=no_progress, cancel=NeverCancelled())[1] == ()
        assert store.mend(snapshot, read=read, cancel=NeverCancelled()) == 0
        assert {image.target: Path(image.path).read_bytes() for image in store.images(snapshot)} == good

    def test_verifying_can_be_cancelled(self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]) -> None:
        snapshot = self.save(store, make_view(blocks(1)))
        with pytest.raises(CancelledError):
            store.verify(snapshot, progress=no_progress, cancel=CancelledAtOnce())

    # A snapshot of another store is received.

    def test_a_copy_is_published_by_its_digests(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        snapshot = self.save(store, make_view(blocks(0, 3, 63)))
        kept = self._taken_out(store, snapshot)
        store.remove(snapshot)
        staging = store.stage(new_run_id(), guest=GUEST)
        for record, fill in kept:
            store.receive_disk(staging, record=record, fill=fill)
        assert store.snapshots() == ()
        copy = store.publish_copy(staging, manifest=snapshot.manifest)
        assert copy.manifest == snapshot.manifest
        assert store.find(snapshot.id) == copy
        self.assert_sound(store, copy)
        again = store.stage(new_run_id(), guest=GUEST)
        for record, fill in kept:
            store.receive_disk(again, record=record, fill=fill)
        with pytest.raises(PreconditionError):
            store.publish_copy(again, manifest=snapshot.manifest)
        store.release(store.staging_resource(again.run, guest=GUEST), deadline=timedelta(seconds=5))
        self.assert_sound(store, copy)

    def test_a_copy_is_pinned_as_soon_as_it_is_there(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        snapshot = self.save(store, make_view(blocks(0, 3)))
        kept = self._taken_out(store, snapshot)
        store.remove(snapshot)
        staging = store.stage(new_run_id(), guest=GUEST)
        for record, fill in kept:
            store.receive_disk(staging, record=record, fill=fill)
        pin = Pin(owner="ann", reason="restored", since=NOON, until=NOON + timedelta(days=7))
        copy = store.publish_copy(staging, manifest=snapshot.manifest, pin=pin)
        assert copy.marks == Marks(pin=pin)
        assert store.find(snapshot.id) == copy
        self.assert_sound(store, copy)
        store.mark(copy, marks=Marks())
        assert store.find(snapshot.id).marks == Marks()

    def test_a_copy_that_is_not_whole_or_is_another_is_not_published(
        self, store: SnapshotStore, make_view: Callable[..., FakeDiskView]
    ) -> None:
        snapshot = self.save(store, make_view(blocks(0, 3)))
        other = self.save(store, make_view(blocks(1)), captured=NOON + timedelta(hours=1))
        ((_, wrong),) = self._taken_out(store, other)
        store.remove(snapshot)
        staging = store.stage(new_run_id(), guest=GUEST)
        with pytest.raises(VerificationError):
            store.receive_disk(staging, record=snapshot.manifest.disks[0], fill=wrong)
        staging = store.stage(new_run_id(), guest=GUEST)
        with pytest.raises(SafetyError):
            store.publish_copy(staging, manifest=snapshot.manifest)
        assert [one.id for one in store.snapshots()] == [other.id]

    def _taken_out(
        self, store: SnapshotStore, snapshot: Snapshot
    ) -> list[tuple[DiskRecord, Callable[[DiskContent], None]]]:
        """Return each disk's record and what fills files with its bytes."""
        found: list[tuple[DiskRecord, Callable[[DiskContent], None]]] = []
        for content in store.contents(snapshot):
            image, digests = content.image.read_bytes(), content.digests.read_bytes()

            def fill(target: DiskContent, image: bytes = image, digests: bytes = digests) -> None:
                assert target.image.stat().st_size == target.record.size_bytes
                target.image.write_bytes(image)
                target.digests.write_bytes(digests)

            found.append((content.record, fill))
        return found

    def test_findings_tell_of_room(self, store: SnapshotStore) -> None:
        severities = {finding.severity for finding in store.findings(needed_bytes=1)}
        assert Severity.REFUSAL not in severities
        assert store.owned() == ()
