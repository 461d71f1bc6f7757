"""QEMU's own monitor, through libvirt: what libvirt has no words for.

libvirt marks a domain as tainted (``custom-monitor``) from the first command on, until it is started anew, so this is used
for guests only that are captured in a way that needs it. Commands and answers: QEMU's qapi/migration.json.
"""

from __future__ import annotations

import json
from typing import Any

import libvirt_qemu

from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt.connection import translated

BACKGROUND_SNAPSHOT = "background-snapshot"
_TAINT = "custom monitor"


class MonitorError(DriverError):
    """QEMU refused a command."""


class Monitor:
    """The monitor of one domain. Raises DriverError where libvirt cannot pass a command on, MonitorError for a refusal."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain

    def ask(self, command: str, **arguments: object) -> Any:
        """Run a command and return its result. Underscores in the names of arguments stand for hyphens."""
        with translated(f"ask QEMU for {command}"):
            answer = libvirt_qemu.qemuMonitorCommand(self._domain, _request(command, arguments), 0)
        return _result(answer, command)

    def give_file(self, descriptor: int, *, name: str) -> None:
        """Hand QEMU a copy of a file descriptor under a name, which ``fd:NAME`` in a later command stands for."""
        request = _request("getfd", {"fdname": name})
        with translated("hand QEMU a file descriptor"):
            answer, _files = libvirt_qemu.qemuMonitorCommandWithFiles(self._domain, request, [descriptor], 0)
        _result(answer, "getfd")

    def take_file_back(self, name: str) -> None:
        """Close a file descriptor that QEMU was handed. Content where it has none of that name."""
        try:
            self.ask("closefd", fdname=name)
        except MonitorError as error:
            if "not found" not in str(error):
                raise

    def is_capable(self, name: str) -> bool:
        """Tell whether a migration capability is on."""
        return any(entry["state"] for entry in self.ask("query-migrate-capabilities") if entry["capability"] == name)

    def set_capability(self, name: str, *, on: bool) -> None:
        """Turn a migration capability on or off. QEMU refuses while a migration goes on, and what it is not able to."""
        self.ask("migrate-set-capabilities", capabilities=[{"capability": name, "state": on}])

    def max_bandwidth(self) -> int:
        """Return how many bytes a second a migration may send."""
        return int(self.ask("query-migrate-parameters")["max-bandwidth"])

    def set_max_bandwidth(self, bytes_per_second: int) -> None:
        """Say how many bytes a second a migration may send."""
        self.ask("migrate-set-parameters", max_bandwidth=bytes_per_second)

    def migration(self) -> dict[str, Any]:
        """Return QEMU's MigrationInfo of the migration that goes on, or of the last; empty where there was none."""
        info: dict[str, Any] = self.ask("query-migrate")
        return info


def was_used(domain: Any) -> bool:
    """Tell whether somebody used this domain's monitor since it was started: only then may its settings be unusual."""
    with translated("ask for a guest's taints"):
        return any(_TAINT in text for text in domain.messages(0))


def _request(command: str, arguments: dict[str, object]) -> str:
    request: dict[str, object] = {"execute": command}
    if arguments:
        request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
    return json.dumps(request)


def _result(answer: str, command: str) -> Any:
    reply = json.loads(answer)
    if "error" in reply:
        raise MonitorError(f"QEMU refused {command}: {reply['error'].get('desc', reply['error'])}")
    return reply["return"]
