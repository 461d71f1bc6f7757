"""What a store of images does with damage, strangers, and a file system that cannot do what it needs."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from vmsnap.errors import (
    BugError,
    BusyError,
    ConfigError,
    DriverError,
    NoSpaceError,
    PreconditionError,
    SnapshotNotFoundError,
)
from vmsnap.model.guest import Severity
from vmsnap.model.history import Action
from vmsnap.model.ids import RunId, new_run_id
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.model.manifest import Marks, Snapshot
from vmsnap.model.policy import Policy
from vmsnap.stores import catalogue
from vmsnap.stores.images import ImagesStore
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.fake_disks import FakeDiskView
from vmsnap.testing.store_contract import (
    BLOCK,
    GUEST,
    blocks,
    no_progress,
    sample_clean,
    sample_manifest,
)
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.prune import prune
from vmsnap.workflow.reconcile import reconcile

SECOND = timedelta(seconds=1)
OTHER_RUN = RunId("00000000ff")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    root.mkdir()
    return root


@pytest.fixture
def store(root: Path) -> ImagesStore:
    return ImagesStore(root, allow_copies=True)


@pytest.fixture
def snapshot(store: ImagesStore, tmp_path: Path) -> Snapshot:
    view = FakeDiskView.make(tmp_path / "view", content=blocks(1, 2, 5), size_bytes=8 * BLOCK)
    run = new_run_id()
    staging = store.stage(run, guest=GUEST)
    record = store.write_disk(staging, view=view, progress=no_progress, cancel=NeverCancelled())
    return store.publish(staging, manifest=sample_manifest(run, disks=(record,)), clean=sample_clean(run))


@pytest.fixture
def folder(root: Path, snapshot: Snapshot) -> Path:
    return root / GUEST / snapshot.id


def without_reflinks(_folder: Path) -> bool:
    return False


def defects(store: ImagesStore, snapshot: Snapshot) -> tuple[str, ...]:
    return store.verify(snapshot, progress=no_progress, cancel=NeverCancelled())[1]


def test_a_file_system_without_reflinks_is_refused_with_the_remedy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmsnap.stores.images.can_reflink", without_reflinks)
    store = ImagesStore(root)
    finding = store.findings(needed_bytes=0)[0]
    assert finding.severity is Severity.REFUSAL
    assert finding.remedy is not None
    assert "mkfs.xfs" in finding.remedy
    with pytest.raises(PreconditionError, match="no reflinks") as caught:
        store.stage(new_run_id(), guest=GUEST)
    assert caught.value.remedy == finding.remedy
    assert list(root.iterdir()) == []


def test_copies_are_allowed_with_a_warning(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmsnap.stores.images.can_reflink", without_reflinks)
    finding = ImagesStore(root, allow_copies=True).findings(needed_bytes=0)[0]
    assert finding.severity is Severity.WARNING
    assert "room of all its data" in finding.message


def test_a_store_that_is_not_there_is_refused(tmp_path: Path) -> None:
    store = ImagesStore(tmp_path / "nowhere")
    (finding,) = store.findings(needed_bytes=0)
    assert finding.severity is Severity.REFUSAL
    assert "nowhere" in finding.message
    assert store.snapshots() == ()
    assert store.owned() == ()
    with pytest.raises(DriverError):
        store.stage(new_run_id(), guest=GUEST)


def test_too_little_room_is_refused_with_numbers(store: ImagesStore) -> None:
    finding = next(one for one in store.findings(needed_bytes=1 << 60) if one.check == "store room")
    assert finding.severity is Severity.REFUSAL
    assert "1,152,921,504,606,846,976" in finding.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"),
        (b'{"format_version": 2}', "format_version"),
        (b"\xff\x00", "damaged"),
        (None, "no manifest.json"),
    ],
)
def test_a_damaged_snapshot_is_reported_and_left_alone(
    store: ImagesStore,
    snapshot: Snapshot,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes | None,
    reason: str,
) -> None:
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert store.snapshots() == ()
    assert str(folder) in caplog.text
    (finding,) = (one for one in store.findings(needed_bytes=0) if one.check == "store contents")
    assert finding.severity is Severity.WARNING
    assert reason in finding.message
    assert store.owned() == ()
    store.release(store.staging_resource(snapshot.manifest.run, guest=GUEST), deadline=SECOND)
    assert (folder / "vda.raw").is_file()


def test_a_snapshot_in_the_folder_of_another_is_damaged(store: ImagesStore, folder: Path, root: Path) -> None:
    shutil.copytree(folder, folder.with_name(new_run_id()))
    shutil.copytree(folder, root / "other" / folder.name)
    assert [str(one.id) for one in store.snapshots()] == [folder.name]
    assert sum(one.check == "store contents" for one in store.findings(needed_bytes=0)) == 2


def test_a_snapshot_with_damaged_marks_counts_as_pinned(
    store: ImagesStore, snapshot: Snapshot, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "marks.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        found = store.find(snapshot.id)
    assert found.marks.pin is not None
    assert "marks.json" in found.marks.pin.reason
    assert store.mark(found, marks=Marks()) == snapshot
    assert store.find(snapshot.id) == snapshot


def test_other_things_in_a_store_are_left_alone(store: ImagesStore, root: Path, snapshot: Snapshot) -> None:
    strangers = [root / "lost+found", root / ".config", root / GUEST / "notes", root / GUEST / ".staging-mine"]
    for stranger in strangers:
        stranger.mkdir()
    (root / "README").write_text("x")
    assert store.snapshots() == (snapshot,)
    assert store.owned() == ()
    assert all(stranger.is_dir() for stranger in strangers)


@pytest.mark.parametrize(
    "detail",
    [
        "",
        "/etc",
        "..",
        "../../etc/passwd",
        f"{GUEST}",
        f"{GUEST}/..",
        f"{GUEST}/.staging-ffffffffff",
        "a/b/c/d",
        ".x/y",
    ],
)
@pytest.mark.parametrize("kind", [ResourceKind.STAGING, ResourceKind.HOLD, ResourceKind.FENCE])
def test_a_resource_that_names_something_else_removes_nothing(
    store: ImagesStore, snapshot: Snapshot, detail: str, kind: ResourceKind
) -> None:
    resource = Resource(kind=kind, run=RunId("0123456789"), guest=GUEST, name="x", detail=detail)
    with pytest.raises(BugError):
        store.release(resource, deadline=SECOND)
    assert store.snapshots() == (snapshot,)


def test_half_removed_snapshots_are_owned_and_released(store: ImagesStore, snapshot: Snapshot, folder: Path) -> None:
    (folder / "manifest.json").rename(folder / "manifest.removed")
    assert store.snapshots() == ()
    (resource,) = store.owned()
    assert (resource.kind, resource.run) == (ResourceKind.STAGING, snapshot.manifest.run)
    store.release(resource, deadline=SECOND)
    assert not folder.exists()
    assert store.owned() == ()


def test_a_removal_that_was_cut_long_ago_is_shown_and_finished_by_prune(
    store: ImagesStore, snapshot: Snapshot, folder: Path, tmp_path: Path
) -> None:
    (folder / "manifest.json").rename(folder / "manifest.removed")
    (shown,) = [item for item in store.findings(needed_bytes=0) if item.check == "store contents"]
    assert "was cut" in shown.message
    lab = FakeWorld(tmp_path / "lab")
    world = replace(lab.process(), store=store)  # whose journals know nothing of that run
    assert reconcile(world).undone == ()
    assert prune(world, policy=Policy(guest=GUEST), dry_run=True) == ()
    assert folder.exists()
    prune(world, policy=Policy(guest=GUEST), dry_run=False)
    assert not folder.exists()
    (entry,) = lab.state.history.trail()
    assert (entry.action, entry.subject, entry.detail) == (
        Action.PRUNE,
        snapshot.id,
        "a removal that was cut is finished",
    )
    assert [item for item in store.findings(needed_bytes=0) if item.check == "store contents"] == []


def test_a_held_snapshot_whose_removal_was_cut_is_a_snapshot_again(
    store: ImagesStore, snapshot: Snapshot, folder: Path
) -> None:
    store.hold(store.hold_resource(OTHER_RUN, snapshot=snapshot))
    (folder / "manifest.json").rename(folder / "manifest.removed")
    (resource,) = [item for item in store.owned() if item.kind is ResourceKind.STAGING]
    store.release(resource, deadline=SECOND)
    assert store.snapshots() == (snapshot,)
    (folder / "manifest.json").rename(folder / "manifest.removed")
    (folder / snapshot.manifest.disks[0].image).unlink()
    assert store.finish_removals(GUEST) == ()
    assert folder.exists(), "somebody holds what is left of it"


def test_a_removal_that_goes_on_is_not_finished_by_another(
    store: ImagesStore, snapshot: Snapshot, folder: Path
) -> None:
    (folder / "manifest.json").rename(folder / "manifest.removed")
    (resource,) = store.owned()
    with store.lock(GUEST, timeout=SECOND), pytest.raises(BusyError):
        store.release(resource, deadline=timedelta(milliseconds=100))
    assert (folder / "manifest.removed").exists()


def test_when_snapshots_were_captured_is_read_once(
    store: ImagesStore, snapshot: Snapshot, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_ago = time.time() - 60
    os.utime(folder, (long_ago, long_ago))
    assert store.captured(GUEST) == (snapshot.manifest.captured,)
    with monkeypatch.context() as patched:
        patched.setattr(catalogue, "read_snapshot", None)
        assert store.captured(GUEST) == (snapshot.manifest.captured,)
    (folder / "manifest.json").rename(folder / "manifest.removed")
    assert store.captured(GUEST) == ()
    (folder / "manifest.removed").rename(folder / "manifest.json")
    assert store.captured(GUEST) == (snapshot.manifest.captured,), "what has just changed may change again at once"


def test_a_full_disk_is_told_with_numbers(store: ImagesStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    staging = store.stage(new_run_id(), guest=GUEST)
    view = FakeDiskView.make(tmp_path / "view", content=blocks(1), size_bytes=8 * BLOCK)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoSpaceError, match=r"[\d,]+ bytes are free") as caught:
        store.write_disk(staging, view=view, progress=no_progress, cancel=NeverCancelled())
    assert caught.value.remedy is not None
    assert "prune" in caught.value.remedy


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "manifest.json", "marks.json", "vda.raw", "x.digests"])
def test_a_small_file_cannot_take_the_name_of_something_else(store: ImagesStore, tmp_path: Path, name: str) -> None:
    staging = store.stage(new_run_id(), guest=GUEST)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError):
        store.add_file(staging, name=name, source=tmp_path / "file")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", ""])
def test_only_files_of_the_snapshot_are_given_out(store: ImagesStore, snapshot: Snapshot, name: str) -> None:
    with pytest.raises(SnapshotNotFoundError):
        store.file(snapshot, name=name)


def test_a_run_stages_once(store: ImagesStore) -> None:
    run = new_run_id()
    store.stage(run, guest=GUEST)
    with pytest.raises(BugError):
        store.stage(run, guest=GUEST)


def test_verifying_names_every_place_that_differs(store: ImagesStore, snapshot: Snapshot, folder: Path) -> None:
    (folder / "vda.raw").chmod(0o600)
    with (folder / "vda.raw").open("r+b") as image:
        for block in (1, 2, 6):
            image.seek(block * BLOCK + 17)
            image.write(b"damage")
    assert defects(store, snapshot) == (
        "vda.raw: blocks 1 to 2 (from byte 65536) differ from their digests",
        "vda.raw: block 6 (byte 393216) differs from its digest",
    )


def test_verifying_names_lost_and_changed_files(store: ImagesStore, snapshot: Snapshot, folder: Path) -> None:
    digests = folder / "vda.digests"
    digests.chmod(0o600)
    data = bytearray(digests.read_bytes())
    data[32 * 5] ^= 1
    digests.write_bytes(data)
    assert defects(store, snapshot) == (
        "vda.digests: is not what the manifest vouches for",
        "vda.raw: block 5 (byte 327680) differs from its digest",
    )
    os.truncate(folder / "vda.raw", 3 * BLOCK)
    assert defects(store, snapshot) == ("vda.raw: has 196608 bytes instead of 524288",)
    digests.unlink()
    assert defects(store, snapshot) == ("vda.digests: missing",)
    (folder / "vda.raw").unlink()
    assert defects(store, snapshot) == ("vda.raw: missing", "vda.digests: missing")
    with pytest.raises(DriverError, match=r"vda\.raw"):
        store.images(snapshot)


def test_the_manifest_on_the_disk_is_plain_json(snapshot: Snapshot, folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["id"] == snapshot.id
    assert manifest["disks"][0]["block_bytes"] == 65536


def test_the_written_format_is_enough_to_check_a_snapshot(snapshot: Snapshot, folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    script = textwrap.dedent(page.partition("## Checking a snapshot without vmsnap")[2])

    def check() -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", script, str(folder)]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)

    assert check().returncode == 0
    (folder / "vda.raw").chmod(0o600)
    with (folder / "vda.raw").open("r+b") as image:
        image.seek(3 * BLOCK)
        image.write(b"damage")
    assert "vda.raw: block 3" in check().stderr
