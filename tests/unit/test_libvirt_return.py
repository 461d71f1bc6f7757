"""Returning a source to its disks: from every state, never losing what an overlay holds. Files and qemu-img are real."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from datetime import timedelta
from pathlib import Path

import libvirt
import pytest

from tests.unit.libvirt_domains import RUN, UUID
from tests.unit.libvirt_fakes import FakeConnection, FakeDomain, disk_xml, domain_of
from vmsnap.errors import BusyError, DeadlineError, DriverError, SafetyError, VmsnapError
from vmsnap.hypervisors.libvirt import definitions, overlays, processes, vcpulimits
from vmsnap.hypervisors.libvirt.commit import SourceReturn, is_home
from vmsnap.hypervisors.libvirt.overlays import OverlayDetail, OverlaysDetail
from vmsnap.hypervisors.libvirt.stopped import StoppedHere
from vmsnap.hypervisors.libvirt.vcpulimits import VcpuLimit, read_limit
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.guest import DiskKind
from vmsnap.model.ids import RunId

MIB = 1 << 20
MINUTE = timedelta(seconds=60)
PAUSED = libvirt.VIR_DOMAIN_PAUSED


class Disks:
    """Two raw disks with an overlay each, made but not used yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.details = [self._make(target) for target in ("vda", "vdb")]
        overlays.create(self.detail)

    def _make(self, target: str) -> OverlayDetail:
        base = self.folder / f"{target}.raw"
        base.write_bytes(bytes(MIB))
        return OverlayDetail(
            target=target,
            overlay=str(self.folder / f"vmsnap-{RUN}-{target}.source.qcow2"),
            base=str(base),
            base_format="raw",
            base_kind=DiskKind.FILE,
            size_bytes=MIB,
        )

    @property
    def detail(self) -> OverlaysDetail:
        return OverlaysDetail(uuid=UUID, disks=tuple(self.details))

    def write(self, target: str = "vda", *, path: str | None = None) -> None:
        """Write to an overlay what only it holds."""
        file = path or next(disk.overlay for disk in self.details if disk.target == target)
        argv = ["qemu-io", "-f", "qcow2", "-c", "write -P 77 64k 64k", file]
        subprocess.run(argv, check=True, capture_output=True, timeout=30)

    def on_bases(self, **arguments: str) -> str:
        return domain_of(*(disk_xml(disk.target, disk.base, kind="raw") for disk in self.details), **arguments)

    def on_overlays(self, **arguments: str) -> str:
        return domain_of(*(disk_xml(disk.target, disk.overlay) for disk in self.details), **arguments)

    @property
    def kept(self) -> bool:
        return all(Path(disk.overlay).exists() for disk in self.details)

    @property
    def deleted(self) -> bool:
        return not any(Path(disk.overlay).exists() for disk in self.details)


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


def give_back(disks: Disks, *domains: FakeDomain, deadline: timedelta = MINUTE) -> None:
    SourceReturn(FakeConnection(*domains), run=RunId(RUN), guest="db1", detail=disks.detail).run(deadline=deadline)


def refused(
    disks: Disks, *domains: FakeDomain, error: type[VmsnapError], match: str, deadline: timedelta = MINUTE
) -> None:
    """It is refused with a remedy, and the overlays are still there."""
    with pytest.raises(error, match=match) as caught:
        give_back(disks, *domains, deadline=deadline)
    assert caught.value.remedy
    assert disks.kept


def test_overlays_never_used_are_simply_deleted(disks: Disks) -> None:
    domain = FakeDomain(live=disks.on_bases(), definition=disks.on_bases())
    give_back(disks, domain)
    assert disks.deleted
    assert domain.calls == []


def test_vcpus_that_a_dead_capture_left_slow_are_given_back(disks: Disks, tmp_path: Path) -> None:
    group = tmp_path / "vcpu0"
    group.mkdir()
    (group / "cpu.max").write_text("2500 10000\n")
    before = VcpuLimit(group=str(group), quota_us=None, period_us=100_000)
    domain = FakeDomain(live=disks.on_bases(), definition=disks.on_bases())
    detail = disks.detail.model_copy(update={"vcpu_limits": (before,)})
    # What the journal keeps is text.
    detail = OverlaysDetail.model_validate_json(detail.model_dump_json())
    SourceReturn(FakeConnection(domain), run=RunId(RUN), guest="db1", detail=detail).run(deadline=MINUTE)
    assert read_limit(str(group)) == before
    assert disks.deleted


def test_the_longest_pause_that_a_dead_capture_left_is_given_back(disks: Disks) -> None:
    domain = FakeDomain(live=disks.on_bases(), definition=disks.on_bases())
    domain.max_downtime_ms = 10
    detail = disks.detail.model_copy(update={"max_downtime_ms": 300})
    SourceReturn(FakeConnection(domain), run=RunId(RUN), guest="db1", detail=detail).run(deadline=MINUTE)
    assert domain.max_downtime_ms == 300
    assert disks.deleted


def test_what_cannot_be_given_back_does_not_keep_the_guest_on_its_overlays(
    disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_limits: object) -> None:
        raise DriverError("no such control group")

    monkeypatch.setattr(vcpulimits, "give_back", fails)
    domain = FakeDomain(live=disks.on_overlays(), definition=disks.on_overlays())
    with pytest.raises(DriverError, match="no such control group"):
        give_back(disks, domain)
    assert domain.calls == ["commit vda", "commit vdb", "pivot vda", "pivot vdb"]
    assert disks.deleted


@pytest.mark.parametrize(("started_later_s", "refuses"), [(3600, True), (-3600, False)])
def test_an_overlay_that_a_restarted_guest_left_unmerged_is_kept(
    disks: Disks, monkeypatch: pytest.MonkeyPatch, *, started_later_s: int, refuses: bool
) -> None:
    """After a power cut the definition that named the overlay may be gone, and the guest was started on its old disk."""
    disks.write()
    written_at = Path(disks.details[0].overlay).stat().st_mtime
    monkeypatch.setattr(processes, "pid_of", lambda _guest: 4711)
    monkeypatch.setattr(processes, "started_at", lambda _pid: written_at + started_later_s)
    domain = FakeDomain(live=disks.on_bases(), definition=disks.on_bases())
    if refuses:
        refused(disks, domain, error=SafetyError, match="was started on .* without it")
    else:
        # It never stopped: QEMU merged the overlay, and the run died before it removed the file.
        give_back(disks, domain)
        assert disks.deleted


def test_definitions_are_made_durable_before_overlays_go(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[bool] = []
    monkeypatch.setattr(definitions, "settle", lambda: settled.append(disks.kept))
    give_back(disks, FakeDomain(live=disks.on_overlays(), definition=disks.on_overlays()))
    assert settled == [True]


def test_a_running_guest_is_committed_pivoted_and_free_of_overlays(disks: Disks) -> None:
    disks.write()
    domain = FakeDomain(live=disks.on_overlays(), definition=disks.on_overlays())
    domain.ready_after = 3
    give_back(disks, domain)
    assert domain.calls == ["commit vda", "commit vdb", "pivot vda", "pivot vdb"]
    assert is_home(FakeConnection(domain), guest="db1", sources={disk.target: disk.base for disk in disks.details})
    assert disks.deleted
    give_back(disks, domain)


def test_a_definition_that_libvirt_did_not_change_is_mended(disks: Disks) -> None:
    domain = FakeDomain(live=disks.on_overlays(), definition=disks.on_overlays())
    domain.pivot_updates_definition = False
    give_back(disks, domain)
    assert domain.calls[-2:] == ["define vda", "define vdb"]
    assert domain.definition is not None
    assert [source.get("file") for source in parse(domain.definition).iter("source")] == [
        disk.base for disk in disks.details
    ]
    assert {driver.get("type") for driver in parse(domain.definition).iter("driver")} == {"raw"}
    assert disks.deleted


def test_a_transient_guest_has_no_definition_to_mend(disks: Disks) -> None:
    domain = FakeDomain(live=disks.on_overlays(), definition=None)
    give_back(disks, domain)
    assert disks.deleted


def test_a_commit_that_a_dead_run_began_is_carried_on(disks: Disks) -> None:
    domain = FakeDomain(live=disks.on_overlays(), definition=disks.on_overlays())
    domain.ready_after = 10**6
    refused(disks, domain, error=DeadlineError, match="not ready yet", deadline=timedelta(seconds=0.2))
    assert domain.calls == ["commit vda", "commit vdb"]
    assert domain.live is not None
    domain.live = domain.live.replace('polls="', 'polls="1" was="')
    give_back(disks, domain)
    assert domain.calls == ["commit vda", "commit vdb", "pivot vda", "pivot vdb"]
    assert disks.deleted


@pytest.mark.parametrize("job", ["copy", "active-commit"])
def test_another_tools_block_job_is_not_touched(disks: Disks, job: str) -> None:
    mirror = f"<mirror type='file' job='{job}' ready='yes'><source file='/srv/elsewhere.qcow2'/></mirror>"
    vda, vdb = disks.details
    for source in (vda.overlay, vda.base):
        live = domain_of(disk_xml("vda", source, inside=mirror), disk_xml("vdb", vdb.overlay))
        domain = FakeDomain(live=live, definition=disks.on_overlays())
        refused(disks, domain, error=BusyError, match="another block job")
        assert domain.calls == []


def test_somebodys_snapshot_on_top_is_respected_while_the_guest_runs(disks: Disks) -> None:
    vda, vdb = disks.details
    below = f"<backingStore type='file'><source file='{vda.overlay}'/></backingStore>"
    live = domain_of(disk_xml("vda", "/srv/theirs.qcow2", inside=below), disk_xml("vdb", vdb.overlay))
    domain = FakeDomain(live=live, definition=live)
    refused(disks, domain, error=SafetyError, match=r"theirs\.qcow2")
    assert domain.calls == []


@pytest.mark.parametrize("written", [True, False])
def test_somebodys_snapshot_on_top_is_respected_while_the_guest_is_off(disks: Disks, *, written: bool) -> None:
    if written:
        disks.write()
    vda, vdb = disks.details
    theirs = disks.folder / "theirs.qcow2"
    overlays.create_overlay(theirs, base=vda.overlay, base_format="qcow2", size_bytes=MIB)
    # The persistent definition says nothing of the files below.
    definition = domain_of(disk_xml("vda", str(theirs)), disk_xml("vdb", vdb.base, kind="raw"))
    refused(disks, FakeDomain(live=None, definition=definition), error=SafetyError, match=r"theirs\.qcow2")


def test_overlays_never_used_do_not_mind_another_tools_snapshot(disks: Disks) -> None:
    vda, vdb = disks.details
    theirs = disks.folder / "theirs.qcow2"
    overlays.create_overlay(theirs, base=vda.base, base_format="raw", size_bytes=MIB)
    definition = domain_of(disk_xml("vda", str(theirs)), disk_xml("vdb", vdb.base, kind="raw"))
    for live in (definition, None):
        overlays.create(disks.detail)
        give_back(disks, FakeDomain(live=live, definition=definition))
        assert disks.deleted
    assert theirs.exists()


def test_a_disk_taken_from_the_guest_keeps_what_it_wrote(disks: Disks) -> None:
    disks.write("vdb")
    vda, _ = disks.details
    rest = domain_of(disk_xml("vda", vda.base, kind="raw"))
    refused(disks, FakeDomain(live=rest, definition=rest), error=SafetyError, match="was taken from")
    refused(disks, FakeDomain(live=None, definition=rest), error=SafetyError, match="holds data")


def test_a_guest_that_is_off_is_merged_on_disk(disks: Disks) -> None:
    disks.write()
    domain = FakeDomain(live=None, definition=disks.on_overlays())
    give_back(disks, domain)
    assert Path(disks.details[0].base).read_bytes()[65536:131072] == bytes([77]) * 65536
    assert domain.calls == ["define vda", "define vdb"]
    assert disks.deleted


def test_a_merge_that_was_interrupted_before_the_definition_is_done_again(disks: Disks) -> None:
    disks.write()
    subprocess.run(["qemu-img", "commit", "-q", "-f", "qcow2", disks.details[0].overlay], check=True, timeout=30)
    domain = FakeDomain(live=None, definition=disks.on_overlays())
    give_back(disks, domain)
    assert disks.deleted


def test_a_guest_that_was_saved_on_its_overlay_keeps_it(disks: Disks) -> None:
    domain = FakeDomain(live=None, definition=disks.on_overlays())
    domain.saved = True
    refused(disks, domain, error=DriverError, match="was saved")


def test_data_of_a_guest_that_is_off_and_at_home_is_for_the_operator_to_judge(disks: Disks) -> None:
    disks.write()
    refused(disks, FakeDomain(live=None, definition=disks.on_bases()), error=SafetyError, match="cannot be told")


def test_a_guest_that_is_gone_leaves_its_data(disks: Disks) -> None:
    disks.write()
    refused(disks, error=DriverError, match="is gone")


def test_a_guest_that_is_gone_leaves_no_empty_overlays(disks: Disks) -> None:
    give_back(disks)
    assert disks.deleted


def test_a_renamed_guest_is_found(disks: Disks) -> None:
    domain = FakeDomain(live=disks.on_overlays(name="db-new"), definition=disks.on_overlays(name="db-new"))
    give_back(disks, domain)
    assert domain.calls[-1] == "pivot vdb"


@pytest.mark.parametrize("running", [True, False])
def test_an_overlay_that_a_process_has_open_is_never_deleted(disks: Disks, *, running: bool) -> None:
    # libvirtd died after QEMU had switched, before it wrote that down: its XML says that the guest is at home.
    domain = FakeDomain(live=disks.on_bases(), definition=disks.on_bases())
    descriptor = os.open(disks.details[1].overlay, os.O_RDWR)
    try:
        held = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, held)
        with_guest = (domain,) if running else ()
        refused(disks, *with_guest, error=SafetyError, match="has .*vdb.* open", deadline=timedelta(seconds=0.2))
    finally:
        os.close(descriptor)
    give_back(disks, domain)
    assert disks.deleted


@pytest.mark.parametrize(
    ("reason", "resumed"),
    [
        (libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT, True),
        (libvirt.VIR_DOMAIN_PAUSED_SAVE, True),
        (libvirt.VIR_DOMAIN_PAUSED_MIGRATION, False),
        (libvirt.VIR_DOMAIN_PAUSED_IOERROR, True),
        (libvirt.VIR_DOMAIN_PAUSED_USER, False),
        (libvirt.VIR_DOMAIN_PAUSED_WATCHDOG, False),
    ],
)
def test_a_guest_left_paused_by_us_goes_on_and_one_paused_by_others_does_not(
    disks: Disks, *, reason: int, resumed: bool
) -> None:
    domain = FakeDomain(live=disks.on_overlays(), definition=disks.on_overlays())
    domain.states = (PAUSED, reason)
    give_back(disks, domain)
    assert ("resume" in domain.calls) is resumed
    if reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR:
        assert domain.calls[-1] == "resume"


@pytest.mark.parametrize(
    ("reason", "resumed"),
    [
        (libvirt.VIR_DOMAIN_PAUSED_USER, True),
        (libvirt.VIR_DOMAIN_PAUSED_UNKNOWN, True),
        (libvirt.VIR_DOMAIN_PAUSED_MIGRATION, False),
    ],
)
def test_a_guest_that_its_run_noted_to_stop_goes_on(
    disks: Disks, tmp_path: Path, *, reason: int, resumed: bool
) -> None:
    """Its agent and its watchdog died between the suspending and the end of the pause."""
    stopped = StoppedHere(tmp_path)
    stopped.note()
    domain = FakeDomain(live=disks.on_overlays(), definition=disks.on_overlays())
    domain.states = (PAUSED, reason)
    returning = SourceReturn(FakeConnection(domain), run=RunId(RUN), guest="db1", detail=disks.detail, stopped=stopped)
    returning.run(deadline=MINUTE)
    assert ("resume" in domain.calls) is resumed
    assert not stopped.is_noted(), "the next pause is another's"
    domain.states = (PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER)
    domain.calls.clear()
    returning.run(deadline=MINUTE)
    assert domain.calls == []


def test_a_full_disk_of_its_own_is_not_ours_to_resume(disks: Disks) -> None:
    domain = FakeDomain(live=disks.on_bases(), definition=disks.on_bases())
    domain.states = (PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)
    give_back(disks, domain)
    assert domain.calls == []


def test_a_capture_going_on_is_ended(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "is_written_for", lambda run: run == RUN)
    domain = FakeDomain(live=disks.on_bases(), definition=disks.on_bases())
    domain.job = libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT
    give_back(disks, domain)
    assert domain.calls == ["abort job"]
    assert disks.deleted


@pytest.mark.parametrize(
    ("job", "home"),
    [
        (libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE, True),
        (libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT, True),
        (libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP, False),
        # Nothing writes a memory image of this run, so this one is another tool's.
        (libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT, False),
        (libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT, True),
    ],
)
def test_jobs_of_others_are_waited_for(disks: Disks, *, job: int, home: bool) -> None:
    xml = disks.on_bases() if home else disks.on_overlays()
    domain = FakeDomain(live=xml, definition=xml)
    domain.job = job
    refused(disks, domain, error=DeadlineError, match="does not end", deadline=timedelta(seconds=0.2))
    assert domain.calls == []


def test_home_means_live_on_the_own_disks_and_no_overlay_in_the_definition(disks: Disks) -> None:
    sources = {disk.target: disk.base for disk in disks.details}
    elsewhere = domain_of(disk_xml("vda", "/srv/new-disk.qcow2"))
    mirrored = disks.on_bases().replace("<target dev", "<mirror type='file' job='copy'/><target dev")
    for live, definition, expected in (
        (disks.on_bases(), disks.on_bases(), True),
        (disks.on_bases(), None, True),
        # A change that waits for the next start is the operator's.
        (disks.on_bases(), elsewhere, True),
        (disks.on_bases(), disks.on_overlays(), False),
        (disks.on_overlays(), disks.on_bases(), False),
        (mirrored, disks.on_bases(), False),
        (elsewhere, disks.on_bases(), False),
    ):
        domain = FakeDomain(live=live, definition=definition)
        assert is_home(FakeConnection(domain), guest="db1", sources=sources) is expected
