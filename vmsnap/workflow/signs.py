"""By what a guest's system shows who it is: a token in its memory, and when or as what it was booted.

A token must never be part of a snapshot: on Linux it is a file in ``/run``, on Windows a volatile key of the registry
(RegCreateKeyEx, REG_OPTION_VOLATILE). Windows guests are those that are reached by PowerShell Direct.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from vmsnap.model.command import Command
from vmsnap.model.ids import RunId

BOOT_ID = "/proc/sys/kernel/random/boot_id"

_WRITE = r"""
$ErrorActionPreference = 'Stop'
$run, $token = [Console]::In.ReadToEnd().Split(' ')
$options = [Microsoft.Win32.RegistryOptions]::Volatile
$key = [Microsoft.Win32.Registry]::LocalMachine.CreateSubKey("SOFTWARE\vmsnap-$run", $true, $options)
$key.SetValue('token', $token)
$key.Close()
"""
_READ = r"""
$ErrorActionPreference = 'Stop'
$run = [Console]::In.ReadToEnd()
$key = [Microsoft.Win32.Registry]::LocalMachine.OpenSubKey("SOFTWARE\vmsnap-$run")
if ($null -ne $key) { [Console]::Out.Write([string]$key.GetValue('token')) }
"""
_BOOT_TIME = r"""
$ErrorActionPreference = 'Stop'
[Console]::Out.Write((Get-CimInstance -ClassName Win32_OperatingSystem).LastBootUpTime.ToUniversalTime().ToString('o'))
"""


@dataclass(frozen=True, kw_only=True)
class Signs:
    """The commands that give a guest a token, read it back, and tell its boot. ``token`` stands in no command line."""

    place: str
    write: Command
    read: Command
    boot: Command


def signs_of(method: str, *, run: RunId, token: str) -> Signs:
    """Return the signs of a guest that is controlled by a method (``GuestControl.method``)."""
    if method == "powershell":
        return Signs(
            place=rf"HKLM\SOFTWARE\vmsnap-{run}",
            write=Command(argv=powershell(_WRITE), stdin=f"{run} {token}".encode("ascii")),
            read=Command(argv=powershell(_READ), stdin=run.encode("ascii")),
            boot=Command(argv=powershell(_BOOT_TIME)),
        )
    place = f"/run/vmsnap-{run}"
    return Signs(
        place=place,
        write=Command(argv=("tee", place), stdin=token.encode("ascii")),
        read=Command(argv=("cat", place)),
        boot=Command(argv=("cat", BOOT_ID)),
    )


def powershell(script: str) -> tuple[str, ...]:
    """Return the arguments that run a constant script; encoded (about_PowerShell_exe), so that nothing in it is quoted."""
    encoded = base64.b64encode(script.encode("utf-16-le")).decode("ascii")
    return ("powershell.exe", "-NoProfile", "-NonInteractive", "-EncodedCommand", encoded)
