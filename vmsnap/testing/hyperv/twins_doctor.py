"""The twin of what ``vmsnap doctor`` asks a host. See ``vmsnap.testing.hyperv.twins``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from vmsnap.testing.hyperv.failures import CmdletError
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.twins import Emitted, Values, text, twin


@twin("examine_host", sha256="696aeaa1dddaaf34301fb15bde2d64e2782714c58a19d105b93bcb9c652b74f9")
def _examine_host(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    folder = text(values, "Folder")
    (system,) = host.get_cim_instance(class_name="Win32_OperatingSystem")
    there = host.test_path(literal_path=folder, path_type="Container")
    try:
        file_system = host.get_volume(file_path=folder)[0].file_system_type if there else ""
    except CmdletError:
        file_system = ""
    folders = host.get_child_item(literal_path=folder, directory=True) if there else []
    yield {
        "Computer": system.properties["CSName"],
        "Version": "10.0.20348",
        "PowerShell": "5.1.20348.2849",
        "Language": 1031,
        "UtcNow": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "Groups": "S-1-1-0 S-1-5-32-578 S-1-5-32-580",
        "Missing": "",
        "MissingClasses": "",
        "Management": "Running",
        "Cluster": "",
        "FolderThere": there,
        "FileSystem": file_system,
        "Folders": " ".join(item.name for item in folders),
        "AllowUnencrypted": "",
        "Basic": "",
        "ShellMegabytes": "",
        "ShellsPerUser": "",
    }
