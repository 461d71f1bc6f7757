"""``vmsnap doctor`` of a Hyper-V host: what stands against backups there, and what to do about it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.unit.hyperv_hosts import EXPORTS, make_host
from vmsnap.errors import DriverError
from vmsnap.hypervisors.hyperv.commands import script_text
from vmsnap.hypervisors.hyperv.driver import HyperVHypervisor
from vmsnap.hypervisors.hyperv.examination import NEEDED, Examination, examination_of, judge
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.tags import RunFolders
from vmsnap.model.guest import Finding, Severity
from vmsnap.testing.hyperv.cmdlets import check_call
from vmsnap.testing.hyperv.running import TwinRunner
from vmsnap.testing.world import FakeClock

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
FOLDER = "D:\\vmsnap"
GOOD = Examination(
    computer="HV1",
    version="10.0.20348",
    powershell="5.1.20348.2849",
    now=NOW,
    groups=frozenset({"S-1-5-32-578"}),
    missing="",
    missing_classes="",
    management="Running",
    cluster="",
    folder_there=True,
    file_system="NTFS",
    folders=frozenset({"vmsnap-0123456789"}),
    allow_unencrypted="",
    basic="false",
    shell_megabytes="2147483647",
    shells_per_user="30",
)


def findings(
    found: Examination, *, seen: frozenset[str] | None = frozenset({"vmsnap-0123456789"}), folder: str = FOLDER
) -> list[Finding]:
    return [
        finding
        for finding in judge(found, folder=folder, mounted="/mnt/hyperv", seen=seen, now=NOW)
        if finding.severity is not Severity.OK
    ]


def test_a_host_that_is_as_it_should_be() -> None:
    assert findings(GOOD) == []
    (first, *_) = judge(GOOD, folder=FOLDER, mounted="/mnt", seen=GOOD.folders, now=NOW)
    assert "HV1 answers" in first.message


@pytest.mark.parametrize(
    ("found", "check", "severity"),
    [
        (replace(GOOD, version="6.3.9600"), "windows", Severity.REFUSAL),
        (replace(GOOD, version=""), "windows", Severity.REFUSAL),
        (replace(GOOD, missing="Export-VM CaptureLiveState"), "cmdlets", Severity.REFUSAL),
        (replace(GOOD, missing_classes="Msvm_ShutdownComponent"), "wmi", Severity.REFUSAL),
        (replace(GOOD, management=""), "service", Severity.REFUSAL),
        (replace(GOOD, management="Stopped"), "service", Severity.REFUSAL),
        (replace(GOOD, groups=frozenset({"S-1-1-0"})), "rights", Severity.REFUSAL),
        (replace(GOOD, groups=frozenset({"S-1-5-32-544"})), "rights", Severity.WARNING),
        (replace(GOOD, cluster="Running"), "cluster", Severity.WARNING),
        (replace(GOOD, folder_there=False, file_system=""), "export folder", Severity.REFUSAL),
        (replace(GOOD, file_system="FAT32"), "export folder", Severity.REFUSAL),
        (replace(GOOD, file_system="ReFS"), "export folder", Severity.WARNING),
        (replace(GOOD, now=NOW + timedelta(minutes=3)), "clock", Severity.WARNING),
        (replace(GOOD, allow_unencrypted="true"), "winrm", Severity.WARNING),
        (replace(GOOD, basic="true"), "winrm", Severity.WARNING),
        (replace(GOOD, shell_megabytes="150"), "winrm", Severity.WARNING),
        (replace(GOOD, shells_per_user="5"), "winrm", Severity.WARNING),
        (replace(GOOD, folders=frozenset()), "mount", Severity.REFUSAL),
        (replace(GOOD, folders=frozenset({"other"})), "mount", Severity.REFUSAL),
    ],
)
def test_what_is_not_as_it_should_be_is_said_with_a_remedy(found: Examination, check: str, severity: Severity) -> None:
    (finding,) = findings(found)
    assert (finding.check, finding.severity) == (check, severity)
    assert finding.remedy


def test_a_double_hop_is_told_from_a_missing_folder() -> None:
    lost = replace(GOOD, folder_there=False, file_system="")
    (finding,) = findings(lost, folder="\\\\files\\vm$\\exports")
    assert "goes no further" in finding.message
    assert "credssp" in (finding.remedy or "")


def test_a_mount_that_is_not_there() -> None:
    (finding,) = findings(GOOD, seen=None)
    assert (finding.check, finding.severity) == ("mount", Severity.REFUSAL)


def test_two_empty_folders_may_be_two() -> None:
    (finding,) = findings(replace(GOOD, folders=frozenset()), seen=frozenset())
    assert (finding.check, finding.severity) == ("mount", Severity.WARNING)


def test_kerberos_is_named_where_the_clocks_are_too_far_apart() -> None:
    (finding,) = findings(replace(GOOD, now=NOW - timedelta(minutes=6)))
    assert "Kerberos" in finding.message


def test_nonsense_is_refused() -> None:
    with pytest.raises(DriverError):
        examination_of({"UtcNow": "gestern"})


def test_what_is_looked_for_is_what_scripts_use() -> None:
    for need in NEEDED:
        name, _, parameter = need.partition(" ")
        check_call(name, parameters=[f"-{parameter}"] if parameter else [])


def test_the_script_changes_nothing() -> None:
    text = script_text("examine_host")
    assert {word.partition("-")[0] for word in text.split()}.isdisjoint(
        {"Set", "New", "Remove", "Start", "Stop", "Add"}
    )


def test_the_simulated_host_is_looked_at_and_its_mount(tmp_path: Path) -> None:
    machine = make_host(tmp_path / "host")
    mounted = machine.files.local(EXPORTS)
    folders = RunFolders(root=EXPORTS, mounted=str(mounted))

    class NoLogins:
        def login(self, guest: str) -> None:
            return None

    def look(folders: RunFolders) -> list[tuple[str, str]]:
        hypervisor = HyperVHypervisor(Host(TwinRunner(machine), folders=folders), clock=FakeClock(), logins=NoLogins())
        return [(finding.check, finding.severity.value) for finding in hypervisor.host_findings()]

    assert ("hyper-v", "ok") in look(folders)
    assert ("mount", "refusal") not in look(folders)
    (tmp_path / "other" / "vmsnap-x").mkdir(parents=True)
    assert ("mount", "refusal") in look(replace(folders, mounted=str(tmp_path / "other")))
