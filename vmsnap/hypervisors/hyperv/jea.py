r"""A constrained session configuration (Just Enough Administration) for Hyper-V hosts: vmsnap's scripts, and nothing else.

``python3 -m vmsnap.hypervisors.hyperv.jea --account 'HV1\vmsnap' FOLDER`` writes a PowerShell module whose functions are the
scripts of this version, what the role of the account may call, and the session configuration (about_Role_Capability_Files,
about_Session_Configuration_Files). With it the account needs no rights on the host but to open the session.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from vmsnap.hypervisors.hyperv.commands import function_name, script_names, script_text

NAME = "Vmsnap"
"""Of the module, the role and the session configuration: ``hyperv.configuration`` in vmsnap.toml."""

_GUIDS = uuid.UUID("4f4a2f5e-9f0a-5c0e-8f4d-0b1f4f1f7d6a")


def jea_files(account: str) -> dict[str, str]:
    """Return the files of the module by their paths in its folder. ``account`` may be a group: it may open the session."""
    functions = [function_name(name) for name in script_names()]
    visible = ", ".join(f"'{name}'" for name in functions)
    bodies = "\n".join(f"function {function_name(name)} {{\n{script_text(name)}}}\n" for name in script_names())
    return {
        f"{NAME}.psm1": bodies,
        f"{NAME}.psd1": (
            "@{\n"
            f"    RootModule        = '{NAME}.psm1'\n"
            "    ModuleVersion     = '1.0.0'\n"
            f"    GUID              = '{_guid('module')}'\n"
            f"    FunctionsToExport = @({visible})\n"
            "    CmdletsToExport   = @()\n"
            "}\n"
        ),
        f"RoleCapabilities/{NAME}.psrc": (
            "@{\n"
            f"    GUID             = '{_guid('role')}'\n"
            f"    ModulesToImport  = @('{NAME}', 'Hyper-V')\n"
            f"    VisibleFunctions = @({visible})\n"
            "}\n"
        ),
        f"{NAME}.pssc": (
            "@{\n"
            "    SchemaVersion       = '2.0.0.0'\n"
            f"    GUID                = '{_guid('configuration')}'\n"
            "    SessionType         = 'RestrictedRemoteServer'\n"
            "    RunAsVirtualAccount = $true\n"
            f"    RoleDefinitions     = @{{ {_quoted(account)} = @{{ RoleCapabilities = '{NAME}' }} }}\n"
            "}\n"
        ),
    }


def _guid(what: str) -> str:
    return str(uuid.uuid5(_GUIDS, what))


def _quoted(text: str) -> str:
    """Return a text as a literal of PowerShell. Its other quotation marks end a literal as well (about_Quoting_Rules)."""
    return "'" + "".join(letter * 2 if letter in "'\u2018\u2019\u201a\u201b" else letter for letter in text) + "'"


def main(arguments: Sequence[str]) -> int:
    """Write the files. Return an exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m vmsnap.hypervisors.hyperv.jea", description=jea_files.__doc__)
    parser.add_argument("folder", type=Path, help=f"a folder to be called {NAME} on the Hyper-V host")
    parser.add_argument("--account", required=True, help=r"who may open the session, such as 'HV1\vmsnap'")
    given = parser.parse_args(arguments)
    for path, text in jea_files(given.account).items():
        file = given.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        # Windows PowerShell takes a file without a byte order mark for one of its ANSI code page.
        file.write_text(text.replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
