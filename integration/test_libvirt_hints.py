"""Hints of what a guest wrote, from bitmaps of a real QEMU: through captures, commits, and other tools' work on the guest."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import libvirt
import pytest

from integration.bare_guest import BareGuest
from integration.lab.commands import run
from integration.lab.lab import Lab
from integration.libvirt_runs import PATIENT, RUNTIME, URI, DriverRun, new_driver, wait_until
from vmsnap.disks.export import QemuExport
from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt.driver import LibvirtHypervisor
from vmsnap.hypervisors.libvirt.hints import LibvirtHints
from vmsnap.hypervisors.libvirt.monitor import Monitor
from vmsnap.model.capture import CapturePlan, CaptureSettings, Detach, DiskSnapshot
from vmsnap.model.guest import Guest
from vmsnap.model.hints import DiskHint
from vmsnap.model.ids import SnapshotId, new_run_id
from vmsnap.model.isolation import FencePlan
from vmsnap.model.manifest import Snapshot
from vmsnap.ports.hints import ChangeHints
from vmsnap.stores.images import ImagesStore
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.hints_contract import HintsContract, HintsHarness
from vmsnap.testing.store_contract import NOON, SECOND, no_progress, sample_clean, sample_manifest

BLOCK = 64 * 1024
BLOCKS = 1024
DEADLINE = timedelta(seconds=30)
CHECKPOINT = """<domaincheckpoint><name>nightly</name><disks>
    <disk name='vda' checkpoint='bitmap'/><disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>"""


@pytest.fixture
def bare(lab: Lab) -> Iterator[BareGuest]:
    with BareGuest(lab) as guest:
        yield guest
    if RUNTIME.exists():
        RUNTIME.rmdir()


@pytest.fixture
def driver(lab: Lab) -> Iterator[LibvirtHypervisor]:
    made = new_driver(lab)
    yield made
    made.close()


def new_hints() -> LibvirtHints:
    return LibvirtHints(URI, runtime=RUNTIME)


class _Harness:
    def __init__(self, bare: BareGuest, driver: LibvirtHypervisor) -> None:
        self._driver = driver
        self._name = bare.name
        self.write = bare.write
        self.start_anew = bare.start_anew

    @property
    def hints(self) -> ChangeHints:
        return new_hints()

    def guest(self) -> Guest:
        return self._driver.inspect(self._name)


class TestLibvirtHints(HintsContract):
    @pytest.fixture
    def harness(self, bare: BareGuest, driver: LibvirtHypervisor) -> HintsHarness:
        return _Harness(bare, driver)


class Generations:
    """Snapshots of a bare guest, one after another, each with what its clone wrote, as backups make them."""

    def __init__(
        self, bare: BareGuest, driver: LibvirtHypervisor, settings: CaptureSettings, store: ImagesStore
    ) -> None:
        self.bare = bare
        self.driver = driver
        self.settings = settings
        self.store = store
        self.hints = new_hints()
        self.snapshots: list[Snapshot] = []

    def next(self, *, by_clone: tuple[int, ...], during: tuple[int, ...] = ()) -> Snapshot:
        """Take a snapshot. Its disks are compared with all that was there to read."""
        guest = self.driver.inspect(self.bare.name)
        plan = CapturePlan(run=new_run_id(), guest=guest, settings=self.settings)
        made = DriverRun(driver=self.driver, plan=plan, fence=FencePlan.for_guest(plan.run, guest=guest))
        since = self.snapshots[-1].id if self.snapshots else SnapshotId(new_run_id())
        try:
            made.prepare()
            if self.settings.on_copies:
                made.resources.insert(1, self.driver.copies_resource(plan))
                self.driver.prepare_copies(plan)
            self.hints.begin(plan)
            made.capture()
            found = {hint.target: hint for hint in self.hints.read(plan, since=since)}
            for block in during:
                for target in ("vda", "vdb"):
                    self.bare.write(target, block=block, pattern=len(self.snapshots) + 100)
            snapshot = self._store(plan, by_clone=by_clone, found=found)
        finally:
            made.release()
        self.hints.keep(guest, run=plan.run)
        self.snapshots.append(snapshot)
        return snapshot

    def _store(self, plan: CapturePlan, *, by_clone: tuple[int, ...], found: dict[str, DiskHint]) -> Snapshot:
        images = self.driver.clone_images(plan)
        for image in images:
            for block in by_clone:
                pattern = f"write -P {len(self.snapshots) + 200} {block * BLOCK} {BLOCK}"
                run(["qemu-io", "-f", "qcow2", "-c", pattern, image.path])
        export = QemuExport(runtime_dir=RUNTIME)
        staging = self.store.stage(plan.run, guest=plan.guest.name)
        try:
            views = export.open(plan.run, images=images)
            records = tuple(
                self.store.write_disk(
                    staging, view=view, progress=no_progress, cancel=NeverCancelled(), hint=found[view.target]
                )
                for view in views
            )
            whole = {view.target: view.path.read_bytes() for view in views}
        finally:
            export.release(export.resource(plan.run, guest=plan.guest.name), deadline=DEADLINE)
        captured = NOON + SECOND * len(self.snapshots)
        manifest = sample_manifest(plan.run, guest=plan.guest.name, disks=records, captured=captured)
        snapshot = self.store.publish(staging, manifest=manifest, clean=sample_clean(plan.run))
        for image in self.store.images(snapshot):
            assert Path(image.path).read_bytes() == whole[image.target], image.target
        return snapshot


@pytest.fixture
def store(lab: Lab, bare: BareGuest) -> Iterator[ImagesStore]:
    folder = bare.folder.with_name(f"{bare.name}-store")
    folder.mkdir()
    yield ImagesStore(folder)
    run(["rm", "-r", folder])


@pytest.mark.parametrize(
    "settings",
    [
        PATIENT,
        replace(PATIENT, detach=Detach.REFLINK),
        replace(PATIENT, disk_snapshot=DiskSnapshot.STORAGE),
    ],
    ids=["late", "reflink", "storage"],
)
def test_disks_stored_by_hints_are_the_disks(
    bare: BareGuest, driver: LibvirtHypervisor, store: ImagesStore, settings: CaptureSettings
) -> None:
    """Whatever is written before, during and after a capture, by the guest and by clones; to qcow2 and raw disks."""
    chance = random.Random(7)
    generations = Generations(bare, driver, settings, store)
    for block in range(0, BLOCKS, 4):
        run_of = "vda" if block % 8 else "vdb"
        bare.write(run_of, block=block, pattern=1)
    for number in range(3):
        for target in ("vda", "vdb"):
            bare.write(target, block=chance.randrange(BLOCKS), pattern=number + 2)
        clone, during = (tuple(chance.randrange(BLOCKS) for _ in range(count)) for count in (3, 2))
        snapshot = generations.next(by_clone=clone, during=during)
        for disk in snapshot.manifest.disks:
            assert disk.read is not None
            if number == 0:
                assert disk.read.since is None
            else:
                assert (disk.read.since, disk.read.full_because) == (generations.snapshots[-2].id, None)
                # What was written, and 64 blocks that were read to see whether the hint is right.
                assert disk.read.read_bytes <= (64 + 3 + 3 + 2 + 4) * BLOCK
                assert disk.read.hinted_in_a_row == number
    assert new_hints().known_since(driver.inspect(bare.name)) == (generations.snapshots[-1].id,)


def test_a_disk_that_was_changed_while_the_guest_was_off_is_read_in_full(
    bare: BareGuest, driver: LibvirtHypervisor, store: ImagesStore
) -> None:
    generations = Generations(bare, driver, PATIENT, store)
    bare.write("vda", block=3)
    generations.next(by_clone=(5,))
    bare.domain.destroy()
    run(["qemu-io", "-f", "qcow2", "-c", f"write -P 9 {7 * BLOCK} {BLOCK}", bare.disk("vda")])
    bare.domain.create()
    after = generations.next(by_clone=(6,))
    for disk in after.manifest.disks:
        assert disk.read is not None
        assert disk.read.since is None
        assert "was started anew" in (disk.read.full_because or "")
    again = generations.next(by_clone=())
    assert all(disk.read is not None and disk.read.since == after.id for disk in again.manifest.disks)


def test_another_tools_checkpoint_and_snapshot_keep_working(
    bare: BareGuest, driver: LibvirtHypervisor, store: ImagesStore, lab: Lab
) -> None:
    bare.domain.checkpointCreateXML(CHECKPOINT, 0)
    generations = Generations(bare, driver, PATIENT, store)
    bare.write("vda", block=1)
    generations.next(by_clone=(5,), during=(2,))
    bare.write("vda", block=3)
    # A snapshot that another tool takes, and merges again.
    over = bare.folder / "other.qcow2"
    disks = f"<disk name='vda' snapshot='external'><source file='{over}'/></disk><disk name='vdb' snapshot='no'/>"
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    bare.domain.snapshotCreateXML(f"<domainsnapshot><disks>{disks}</disks></domainsnapshot>", flags)
    bare.write("vda", block=4)
    run(["virsh", "blockcommit", bare.name, "vda", "--active", "--pivot", "--wait"])
    second = generations.next(by_clone=(), during=(6,))
    assert all(disk.read is not None and disk.read.since is not None for disk in second.manifest.disks)
    # The other tool's own backup since its checkpoint: exactly what was written since.
    backup = bare.folder / "incremental.qcow2"
    wanted = f"<disk name='vda' backup='yes' type='file'><driver type='qcow2'/><target file='{backup}'/></disk>"
    xml = f"<domainbackup><incremental>nightly</incremental><disks>{wanted}<disk name='vdb' backup='no'/></disks></domainbackup>"
    bare.domain.backupBegin(xml, None, 0)
    wait_until(lambda: bare.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE, "the end of the other tool's backup")
    saved = run(["qemu-img", "map", "-U", "--output=json", "-f", "qcow2", backup])
    assert _data_blocks(saved) == {1, 2, 3, 4, 6}


def _data_blocks(text: str) -> set[int]:
    return {
        block
        for entry in json.loads(text)
        if entry["data"] and entry["depth"] == 0
        for block in range(entry["start"] // BLOCK, (entry["start"] + entry["length"]) // BLOCK)
    }


DIES_READING = """
import os, sys
from pathlib import Path
from vmsnap.hypervisors.libvirt import bitmaps, driver, hints
from vmsnap.model.capture import CapturePlan, CaptureSettings
from vmsnap.state.clock import SystemClock
uri, name, run, since, runtime, scratch = sys.argv[1:]
folders = driver.LibvirtFolders(runtime=Path(runtime), environments=Path(scratch))
guest = driver.LibvirtHypervisor(uri, folders=folders, clock=SystemClock()).inspect(name)
bitmaps.run_tool = lambda *_argv, **_options: os._exit(9)
hints.LibvirtHints(uri, runtime=Path(runtime)).read(CapturePlan(run=run, guest=guest, settings=CaptureSettings()), since=since)
"""


def test_what_a_dead_reader_left_is_undone_and_the_notes_go_on(
    bare: BareGuest, driver: LibvirtHypervisor, lab: Lab
) -> None:
    hints, monitor, guest = new_hints(), Monitor(bare.domain), driver.inspect(bare.name)
    before, dying = (CapturePlan(run=new_run_id(), guest=guest, settings=PATIENT) for _ in range(2))
    hints.begin(before)
    bare.write("vda", block=7)
    hints.begin(dying)
    words = (URI, bare.name, dying.run, before.run, str(RUNTIME), str(lab.scratch))
    died = subprocess.run([sys.executable, "-c", DIES_READING, *words], timeout=60, check=False)
    assert died.returncode == 9
    assert monitor.ask("query-block-exports") != []
    for _ in range(2):
        hints.release(hints.resource(dying), deadline=DEADLINE)
        assert monitor.ask("query-block-exports") == []
        assert not RUNTIME.exists() or not list(RUNTIME.iterdir())
    assert hints.known_since(guest) == (SnapshotId(before.run),)
    disk, _ = hints.read(dying, since=SnapshotId(before.run))
    assert disk.written is not None
    assert 7 in disk.written
    hints.keep(guest, run=None)


def test_another_tool_that_serves_disks_is_left_alone(bare: BareGuest, driver: LibvirtHypervisor, lab: Lab) -> None:
    hints, monitor, guest = new_hints(), Monitor(bare.domain), driver.inspect(bare.name)
    plan = CapturePlan(run=new_run_id(), guest=guest, settings=PATIENT)
    hints.begin(plan)
    address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "10909"}}
    monitor.ask("nbd-server-start", addr=address)
    node = monitor.ask("query-block")[0]["inserted"]["node-name"]
    monitor.ask("block-export-add", id="theirs", type="nbd", node_name=node)
    with pytest.raises(DriverError, match="already running"):
        hints.read(plan, since=SnapshotId(plan.run))
    hints.release(hints.resource(plan), deadline=DEADLINE)
    assert [export["id"] for export in monitor.ask("query-block-exports")] == ["theirs"]
    monitor.ask("nbd-server-stop")
    assert not RUNTIME.exists() or not list(RUNTIME.iterdir())
