"""What goes wrong on a Hyper-V host, told by error ids and codes. Messages are in the host's language and decide nothing.

A record's FullyQualifiedErrorId is ``REASON,CLASS OF THE CMDLET``; a script that throws a text has that text as its id.
Where a cmdlet of the Hyper-V module met a Windows error, its code stands in hexadecimal digits in the message, in every
language.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmsnap.errors import (
    DriverError,
    GuestNotFoundError,
    GuestUnreachableError,
    NoSpaceError,
    PreconditionError,
    VmsnapError,
)

# winerror.h
ACCESS_DENIED = 0x80070005
OUT_OF_MEMORY = 0x8007000E
DISK_FULL = frozenset({0x80070070, 0x80070027})
_MASK = 0xFFFFFFFF
_CODE = re.compile(r"0x([0-9A-Fa-f]{8})(?![0-9A-Fa-f])")


@dataclass(frozen=True, kw_only=True)
class ErrorRecord:
    """An error of a script, as it came. ``hresult`` is that of the exception, unsigned; 0 where it has none."""

    error_id: str
    hresult: int = 0
    category: str = ""
    message: str = ""

    @property
    def reason(self) -> str:
        """Return the first part of the id, which says what happened."""
        return self.error_id.partition(",")[0]

    @property
    def cmdlet(self) -> str:
        """Return the class of the cmdlet that failed, without its namespace; empty where the script itself did."""
        return self.error_id.partition(",")[2].rpartition(".")[2]

    @property
    def codes(self) -> frozenset[int]:
        """Return Windows' codes for what happened: the exception's own, and those in the message."""
        found = {int(code, 16) for code in _CODE.findall(self.message)}
        return frozenset(found | ({self.hresult & _MASK} if self.hresult else set()))


class RemoteError(DriverError):
    """A script failed on the host. ``record`` says why, for whoever knows what the script was to do."""

    def __init__(self, brief: str, *, record: ErrorRecord, remedy: str | None = None) -> None:
        super().__init__(brief, details=f"{record.error_id}: {record.message}".strip(": "), remedy=remedy)
        self.record = record


@dataclass(frozen=True, kw_only=True)
class _Meaning:
    """What a record means where its reason, a code of it, or reason and cmdlet together are of these."""

    kind: type[VmsnapError]
    says: str
    remedy: str
    reasons: frozenset[str] = frozenset()
    codes: frozenset[int] = frozenset()
    cmdlets: frozenset[str] = frozenset()

    def fits(self, record: ErrorRecord) -> bool:
        if self.cmdlets and record.cmdlet not in self.cmdlets:
            return False
        return record.reason in self.reasons or bool(record.codes & self.codes)


# The first that fits counts.
_MEANINGS = (
    _Meaning(
        reasons=frozenset({"InvalidParameter"}),
        cmdlets=frozenset({"GetVM", "GetVMCommand"}),
        kind=GuestNotFoundError,
        says="it has no such VM",
        remedy="look with Get-VM on the host",
    ),
    _Meaning(
        codes=DISK_FULL,
        kind=NoSpaceError,
        says="a volume is full",
        remedy="make room on the volume that the host names",
    ),
    _Meaning(
        reasons=frozenset({"OutOfMemory"}),
        codes=frozenset({OUT_OF_MEMORY}),
        kind=PreconditionError,
        says="too little memory is free",
        remedy="free memory on the host, or back up later",
    ),
    _Meaning(
        reasons=frozenset({"InvalidCredential", "CredentialIsNotValid"}),
        kind=PreconditionError,
        says="the guest refuses the account",
        remedy="correct the guest's credential",
    ),
    _Meaning(
        reasons=frozenset({"CreateRemoteRunspaceForVMFailed", "PSSessionStateBroken", "PSDirectException"}),
        kind=GuestUnreachableError,
        says="PowerShell Direct reaches no guest",
        remedy="does the guest run Windows 10, Windows Server 2016 or later, and is it up?",
    ),
    _Meaning(
        reasons=frozenset({"AccessDenied", "UnauthorizedAccessException"}),
        codes=frozenset({ACCESS_DENIED}),
        kind=PreconditionError,
        says="the account may not do it",
        remedy="put the account into the host's group 'Hyper-V Administrators', or use the session configuration of "
        "docs/hyper-v.md",
    ),
    _Meaning(
        reasons=frozenset({"CommandNotFoundException"}),
        kind=PreconditionError,
        says="a command is not there",
        remedy="install the module: Install-WindowsFeature Hyper-V-PowerShell; with a session configuration, install its "
        "files again (docs/hyper-v.md)",
    ),
)


def translate(record: ErrorRecord, *, doing: str) -> VmsnapError:
    """Return the error for a record; ``doing`` completes 'the Hyper-V host could not ...'.

    A RemoteError where nothing better is known.
    """
    brief = f"the Hyper-V host could not {doing}"
    meaning = next((meaning for meaning in _MEANINGS if meaning.fits(record)), None)
    if meaning is None:
        return RemoteError(brief, record=record)
    details = f"{record.error_id}: {record.message}"
    return meaning.kind(f"{brief}: {meaning.says}", details=details, remedy=meaning.remedy)
