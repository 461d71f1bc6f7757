"""What a Hyper-V host must be, and what no documentation says of it: for ``vmsnap doctor``. Pure, over what the host said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from vmsnap.errors import DriverError
from vmsnap.hypervisors.hyperv import rows
from vmsnap.hypervisors.hyperv.connection import Row
from vmsnap.model.guest import Finding, Severity

NEEDED = (
    "Get-VM",
    "Get-VHD",
    "Test-VHD",
    "New-VHD Differencing",
    "Export-VM CaptureLiveState",
    "Compare-VM GenerateNewId",
    "Compare-VM CompatibilityReport",
    "Import-VM CompatibilityReport",
    "Set-VM AutomaticCheckpointsEnabled",
    "New-VMSwitch Notes",
    "Connect-VMNetworkAdapter VMSwitch",
    "Disconnect-VMNetworkAdapter",
    "Add-VMNetworkAdapter StaticMacAddress",
    "Get-VMAssignableDevice",
    "Invoke-Command VMId",
    "Invoke-CimMethod",
    "Get-Volume FilePath",
)
"""Cmdlets, and the parameters of them that are newest."""

# Well-known SIDs (MS-DTYP 2.4.2.4): they are the same in every language.
_ADMINISTRATORS = "S-1-5-32-544"
_HYPER_V_ADMINISTRATORS = "S-1-5-32-578"
_OLDEST_BUILD = 14393  # Windows Server 2016
_FILE_SYSTEMS = frozenset({"NTFS", "REFS", "CSVFS_NTFS", "CSVFS_REFS"})
_KERBEROS_SKEW = timedelta(minutes=5)
_SKEW = timedelta(minutes=1)
_LEAST_SHELL_MEGABYTES = 512
_LEAST_SHELLS = 10
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+\Z")


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a host said of itself. Texts that are empty were not to be had."""

    computer: str
    version: str
    powershell: str
    now: datetime
    groups: frozenset[str]
    missing: str
    missing_classes: str
    management: str
    cluster: str
    folder_there: bool
    file_system: str
    folders: frozenset[str]
    allow_unencrypted: str
    basic: str
    shell_megabytes: str
    shells_per_user: str


def examination_of(row: Row) -> Examination:
    """Return what ``examine_host`` emitted. Raises DriverError."""
    try:
        now = datetime.strptime(rows.text(row, "UtcNow"), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError as error:
        raise DriverError("the Hyper-V host's clock makes no sense", details=rows.text(row, "UtcNow")) from error
    return Examination(
        computer=rows.text(row, "Computer"),
        version=rows.text(row, "Version"),
        powershell=rows.text(row, "PowerShell"),
        now=now,
        groups=frozenset(rows.text(row, "Groups").split()),
        missing=rows.text(row, "Missing"),
        missing_classes=rows.text(row, "MissingClasses"),
        management=rows.text(row, "Management"),
        cluster=rows.text(row, "Cluster"),
        folder_there=rows.flag(row, "FolderThere"),
        file_system=rows.text(row, "FileSystem"),
        folders=frozenset(rows.text(row, "Folders").lower().split()),
        allow_unencrypted=rows.text(row, "AllowUnencrypted"),
        basic=rows.text(row, "Basic"),
        shell_megabytes=rows.text(row, "ShellMegabytes"),
        shells_per_user=rows.text(row, "ShellsPerUser"),
    )


def judge(
    found: Examination, *, folder: str, mounted: str, seen: frozenset[str] | None, now: datetime
) -> tuple[Finding, ...]:
    """Return what stands against backups on a host. ``seen``: folders here in ``mounted``; None: it cannot be read."""
    return (
        Finding(
            check="hyper-v",
            severity=Severity.OK,
            message=f"{found.computer} answers: Windows {found.version}, PowerShell {found.powershell}",
        ),
        *_windows(found),
        *_rights(found),
        *_folder(found, folder=folder),
        *_mount(found, folder=folder, mounted=mounted, seen=seen),
        *_clock(found, now=now),
        *_winrm(found),
    )


def _refusal(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, severity=Severity.REFUSAL, message=message, remedy=remedy)


def _warning(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, severity=Severity.WARNING, message=message, remedy=remedy)


def _windows(found: Examination) -> Iterator[Finding]:
    build = found.version.rpartition(".")[2]
    if not build.isdecimal() or int(build) < _OLDEST_BUILD:
        yield _refusal(
            "windows",
            f"Windows {found.version or 'of an unknown version'} cannot export a running VM's memory as it is needed",
            "Windows Server 2016 (10.0.14393) or later is needed",
        )
    if found.missing:
        yield _refusal(
            "cmdlets",
            f"commands, or parameters of them, are not there: {found.missing}",
            "Install-WindowsFeature Hyper-V-PowerShell; with a session configuration, install its files again",
        )
    if found.missing_classes:
        yield _refusal(
            "wmi",
            f"classes of root/virtualization/v2 cannot be read: {found.missing_classes}",
            "is the role Hyper-V installed, and is the account in the group 'Hyper-V Administrators'?",
        )
    if found.management != "Running":
        yield _refusal(
            "service",
            f"Hyper-V's management service (vmms) is {found.management or 'not there'}",
            "Install-WindowsFeature Hyper-V -Restart, or Start-Service vmms",
        )
    if found.cluster == "Running":
        yield _warning(
            "cluster",
            "the host is a node of a failover cluster: guests that the cluster owns are refused",
            "let vmsnap back up guests of this host alone",
        )


def _rights(found: Examination) -> Iterator[Finding]:
    if not found.groups & {_ADMINISTRATORS, _HYPER_V_ADMINISTRATORS}:
        yield _refusal(
            "rights",
            "the account is in neither 'Hyper-V Administrators' nor 'Administrators': it sees no VMs",
            "Add-LocalGroupMember -SID S-1-5-32-578 -Member ACCOUNT, on the host",
        )
    elif _ADMINISTRATORS in found.groups:
        yield _warning(
            "rights",
            "the account is an administrator of the host, which is more than vmsnap needs",
            "use an account in 'Hyper-V Administrators' and 'Remote Management Users', or the session configuration of "
            "docs/hyper-v.md",
        )


def _folder(found: Examination, *, folder: str) -> Iterator[Finding]:
    if not found.folder_there and folder.startswith("\\\\"):
        yield _refusal(
            "export folder",
            f"the session does not reach {folder}: a login by NTLM or Kerberos ends at the host and goes no further",
            'use a local folder of the host as hyperv.export_folder; else hyperv.authentication = "credssp", or '
            "constrained delegation of the host to cifs on that server",
        )
    elif not found.folder_there:
        yield _refusal(
            "export folder",
            f"there is no folder {folder} on the host that the account may see",
            f"New-Item -ItemType Directory -Path '{folder}', and let the account write there",
        )
    elif found.file_system and found.file_system.upper() not in _FILE_SYSTEMS:
        yield _refusal(
            "export folder",
            f"{folder} is on {found.file_system}, on which large virtual disks cannot be",
            "use a folder on NTFS or ReFS",
        )
    elif found.file_system.upper() != "NTFS":
        yield _warning(
            "export folder",
            f"{folder} is on {found.file_system or 'a file system that does not say which it is'}; only NTFS was thought through",
            "try a backup of a guest that nobody needs first",
        )


def _mount(found: Examination, *, folder: str, mounted: str, seen: frozenset[str] | None) -> Iterator[Finding]:
    if seen is None:
        yield _refusal(
            "mount",
            f"{mounted} cannot be read here",
            f"mount the share of {folder} there: mount -t cifs -o seal,vers=3.1.1",
        )
        return
    here = {name.lower() for name in seen if _PLAIN_NAME.match(name)}
    if found.folder_there and here != found.folders:
        only_here, only_there = sorted(here - found.folders)[:3], sorted(found.folders - here)[:3]
        yield _refusal(
            "mount",
            f"{mounted} is not {folder} of the host: "
            + "; ".join(
                text
                for text in (
                    f"only here: {', '.join(only_here)}" if only_here else "",
                    f"only there: {', '.join(only_there)}" if only_there else "",
                )
                if text
            ),
            "mount the share of the folder that hyperv.export_folder names",
        )
    elif found.folder_there and not here:
        yield _warning(
            "mount",
            f"whether {mounted} is {folder} of the host cannot be told: both are empty",
            f"make a folder in one and look for it in the other: New-Item -ItemType Directory '{folder}\\same'",
        )


def _clock(found: Examination, *, now: datetime) -> Iterator[Finding]:
    skew = abs(found.now - now)
    if skew > _SKEW:
        kerberos = "; Kerberos refuses logins" if skew > _KERBEROS_SKEW else ""
        yield _warning(
            "clock",
            f"the clocks of the host and of this one differ by {skew.total_seconds():.0f} s{kerberos}",
            "let both follow one time server",
        )


def _winrm(found: Examination) -> Iterator[Finding]:
    if found.allow_unencrypted == "true":
        yield _warning(
            "winrm",
            "the host takes messages in clear text; vmsnap sends none, others may",
            r"Set-Item WSMan:\localhost\Service\AllowUnencrypted $false",
        )
    if found.basic == "true":
        yield _warning(
            "winrm", "the host takes logins by Basic", r"Set-Item WSMan:\localhost\Service\Auth\Basic $false"
        )
    if found.shell_megabytes.isdecimal() and 0 < int(found.shell_megabytes) < _LEAST_SHELL_MEGABYTES:
        yield _warning(
            "winrm",
            f"a session has {found.shell_megabytes} MB; output of programs in guests may not fit",
            r"Set-Item WSMan:\localhost\Shell\MaxMemoryPerShellMB 1024",
        )
    if found.shells_per_user.isdecimal() and int(found.shells_per_user) < _LEAST_SHELLS:
        yield _warning(
            "winrm",
            f"an account may have {found.shells_per_user} sessions; runs at the same time may find no room",
            r"Set-Item WSMan:\localhost\Shell\MaxShellsPerUser 30",
        )
