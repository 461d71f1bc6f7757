"""A PostgreSQL server that exists in memory only: its files, its processes, and what its programs print.

The words are those of PostgreSQL 15's own tools (``pg_ctl``, ``pg_controldata``, ``psql``), so the real engine drives it.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field

from vmsnap.engines.drain_outcome import OPENED, RESULT
from vmsnap.engines.pg_control import ClusterState, crc32c
from vmsnap.engines.pg_drain_script import DRAIN_SCRIPT
from vmsnap.engines.pg_recovery import SETTINGS_SCRIPT
from vmsnap.model.command import Command, CommandResult

_CRC_OFFSET = 288
_FILE_BYTES = 8192


def control_file(state: ClusterState, *, system_identifier: int = 7710537706371104660) -> bytes:
    """Return an intact control file in a given state, with the layout of PostgreSQL 15."""
    fields = struct.pack("<QIIIxxxxqQ", system_identifier, 1300, 202209061, state, 1795249458, 0x1511A88)
    body = fields.ljust(_CRC_OFFSET, b"\0")
    return (body + struct.pack("<I", crc32c(body))).ljust(_FILE_BYTES, b"\0")


@dataclass
class FakeCluster:
    """One server. ``will_finish`` and ``will_hang`` are its transactions in flight; a drain empties both.

    ``refuses_sessions``: psql cannot connect. ``stop_fails``: pg_ctl's wait runs out. ``comes_back``: something starts
    the server again as soon as it stopped. ``comes_up_late``: it is down, and comes up while another one is drained.
    ``settings`` are what psql is told of. ``state`` overrides what the control file says after a stop.
    """

    data_directory: str = "/var/lib/postgresql/15/main"
    programs: str = "/usr/lib/postgresql/15/bin"
    socket_directory: str = "/var/run/postgresql"
    user: str = "postgres"
    port: int = 5432
    pid: int = 1000
    will_finish: int = 0
    will_hang: int = 0
    prepared: int = 0
    drain_seconds: float = 0.1
    refuses_sessions: bool = False
    stop_fails: bool = False
    comes_back: bool = False
    comes_up_late: bool = False
    stops_as: ClusterState = ClusterState.SHUT_DOWN
    status: str = "ready"
    state: ClusterState = ClusterState.IN_PRODUCTION
    settings: dict[str, str] = field(default_factory=lambda: {"fsync": "on", "full_page_writes": "on"})
    log: list[str] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Tell whether the server's process is there."""
        return self.status != ""

    def files(self) -> dict[str, bytes]:
        """Return the files that matter, by their paths."""
        found = {"global/pg_control": control_file(self.state), "PG_VERSION": b"15\n"}
        if self.runs:
            lines = (str(self.pid), self.data_directory, "1795249458", str(self.port), self.socket_directory)
            text = "\n".join((*lines, "127.0.0.1", "  2229011        24", f"{self.status:<8}", ""))
            found["postmaster.pid"] = text.encode()
        return {f"{self.data_directory}/{name}": content for name, content in found.items()}

    def crash(self) -> None:
        """End as a killed server, or one stopped immediately, does."""
        self.status = ""

    def psql(self, command: Command) -> CommandResult:
        """Do what the drain's session does, or the one that asks for settings."""
        if not self.runs or self.status == "stopping" or self.refuses_sessions:
            where = f"{self.socket_directory}/.s.PGSQL.{self.port}"
            words = (
                f'psql: error: connection to server on socket "{where}" failed: No such file or directory\n'
                if not self.runs
                else f'psql: error: connection to server on socket "{where}" failed: '
                "FATAL:  the database system is shutting down\n"
            )
            return CommandResult(exit_status=2, stderr=words.encode())
        if command.stdin == SETTINGS_SCRIPT.encode() and command.user == self.user:
            lines = (OPENED, *(f"vmsnap-setting {name} {value}" for name, value in self.settings.items()), "")
            return CommandResult(exit_status=0, stdout="\n".join(lines).encode())
        if command.stdin != DRAIN_SCRIPT.encode() or command.user != self.user:
            return CommandResult(exit_status=3, stderr=b"ERROR:  this server knows the drain's script alone\n")
        self.log.append("lame duck")
        self.status = "stopping"
        result = {
            "in_flight": self.will_finish + self.will_hang,
            "finished": self.will_finish,
            "rolled_back": self.will_hang,
            "prepared": self.prepared,
            "seconds": self.drain_seconds,
        }
        self.will_finish = self.will_hang = 0
        self.log.append("drained")
        return CommandResult(exit_status=0, stdout=f"{OPENED}\n4\n3\n{RESULT}{json.dumps(result)}\n".encode())

    def come_up(self) -> None:
        """Run, if it is to come up late."""
        if self.comes_up_late:
            self.comes_up_late, self.status, self.state = False, "ready", ClusterState.IN_PRODUCTION

    def pg_ctl_stop(self) -> CommandResult:
        """Do what ``pg_ctl stop -m fast -w`` does."""
        if not self.runs:
            words = f'pg_ctl: PID file "{self.data_directory}/postmaster.pid" does not exist\nIs server running?\n'
            return CommandResult(exit_status=1, stderr=words.encode())
        if self.stop_fails:
            self.status = "stopping"
            return CommandResult(
                exit_status=1,
                stdout=b"waiting for server to shut down.... failed\n",
                stderr=b"pg_ctl: server does not shut down\n",
            )
        self.log.append("stopped")
        self.status = ""
        self.state = self.stops_as
        if self.comes_back:
            self.status, self.pid, self.state = "ready", self.pid + 1, ClusterState.IN_PRODUCTION
        return CommandResult(exit_status=0, stdout=b"waiting for server to shut down.... done\nserver stopped\n")

    def pg_controldata(self) -> CommandResult:
        """Print what ``pg_controldata`` prints, in part."""
        lines = (
            "pg_control version number:            1300",
            "Catalog version number:               202209061",
            "Database system identifier:           7710537706371104660",
            f"Database cluster state:               {self.state.text}",
            "pg_control last modified:             Sat Nov 21 08:24:18 2026",
            "Latest checkpoint location:           0/1511A88",
        )
        return CommandResult(exit_status=0, stdout="\n".join((*lines, "")).encode())
