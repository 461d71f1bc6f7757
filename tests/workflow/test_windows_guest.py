"""Whole backups of a Windows guest: PowerShell Direct as the line, SQL Server or PostgreSQL in it, NTFS on its disks."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_engines_windows import FOLDER, LOCK, error_log, instances, service
from tests.workflow.invocations import backup, simply
from vmsnap.engines.pg_control import ClusterState
from vmsnap.engines.windows import names_in
from vmsnap.errors import GuestCommandError, GuestUnreachableError, NotCleanError
from vmsnap.guests.access import Access
from vmsnap.model.capture import DiskImage
from vmsnap.model.command import Command, CommandResult
from vmsnap.model.drain import FileSystemState
from vmsnap.model.guest import GuestState
from vmsnap.model.policy import DatabasePolicy, Policy
from vmsnap.ports.clock import Cancel
from vmsnap.ports.guest import AgentChannel, ProgramEnd, ProgramOutcome
from vmsnap.testing.fake_guest import FakeGuest
from vmsnap.testing.fake_host import Ended, FakeHost
from vmsnap.testing.fake_hypervisor import FakeHypervisor
from vmsnap.testing.fake_postgresql import control_file
from vmsnap.testing.faults import Faults
from vmsnap.testing.hyperv.direct import split_command_line
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.signs import signs_of
from vmsnap.workflow.world import World

SERIAL = "10203040506070AA"
SHUT_DOWN = "Server shut down by request from login DB1\\vmsnap."
OUTCOME = {"in_flight": 3, "finished": 2, "rolled_back": 1, "prepared": 0, "seconds": 0.5}
DATA, PROGRAMS = r"C:\pg data", r"C:\Program Files\PostgreSQL\16\bin"


class WindowsGuest(FakeGuest):
    """A guest that knows the scripts of the engines. ``lines`` are its error log; ``database`` which server it has.

    ``comes_up_late``: another server of PostgreSQL is there when the first has stopped.
    """

    def __init__(self, database: str, *, last_words: str = SHUT_DOWN) -> None:
        super().__init__()
        self.database = database
        self.last_words = last_words
        self.lines = ["Starting up database 'sales'."]
        self.runs = True
        self.comes_up_late = False
        self.token = ""

    def clone(self) -> WindowsGuest:
        return copy.copy(self).with_own_lines()

    def with_own_lines(self) -> WindowsGuest:
        self.lines = list(self.lines)
        return self

    def files(self) -> dict[str, bytes]:
        """Return what its NTFS holds."""
        if self.database == "sqlserver":
            return {"/sql/Log/ERRORLOG": error_log(*self.lines)}
        state = ClusterState.IN_PRODUCTION if self.runs else ClusterState.SHUT_DOWN
        return {"/pg/global/pg_control": control_file(state), "/pg/PG_VERSION": b"16\n"}

    def answer(self, argv: tuple[str, ...], stdin: bytes) -> CommandResult:
        """Run a program."""
        if not self.answers:
            raise GuestUnreachableError("the guest does not answer")
        signs = signs_of("powershell", run="", token="")  # type: ignore[arg-type]
        known: dict[tuple[str, ...], Callable[[], str]] = {
            ("hostname",): lambda: "DB1",
            signs.write.argv: lambda: self._take(stdin.decode()),
            signs.read.argv: lambda: self.token,
            signs.boot.argv: lambda: self.boot_id,
        }
        if argv in known:
            return CommandResult(exit_status=0, stdout=known[argv]().encode())
        if argv[0].endswith("pg_ctl.exe"):
            self.runs = False
            return CommandResult(exit_status=0)
        script = names_in(Command(argv=argv))[-1]
        given: dict[str, Any] = json.loads(stdin)
        answer = getattr(self, f"_{script}")(given)
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return CommandResult(exit_status=0, stdout=text.encode())

    def _take(self, words: str) -> str:
        self.token = words.split()[1]
        return ""

    def _windows_locate(self, given: dict[str, Any]) -> object:
        volume = "\\\\?\\Volume{00000000-0000-0000-0000-000000000000}\\"
        inside = {FOLDER + r"\Log": "sql\\Log", "C:\\sql": "sql", DATA: "pg", DATA + "\\global": "pg\\global"}
        return [
            {"Folder": folder, "Volume": volume, "Inside": inside[folder], "Facts": f"Nummer: 0x{SERIAL}"}
            for folder in given["Folders"]
        ]

    def _sqlserver_discover(self, given: dict[str, Any]) -> object:
        return instances(service()) if self.runs else {**instances(service(State="Stopped", Process=0)), "Servers": []}

    def _sqlserver_look(self, given: dict[str, Any]) -> object:
        return {"Files": ["C:\\sql\\sales.mdf"], "Unready": [], "Copies": []}

    def _sqlserver_drain(self, given: dict[str, Any]) -> str:
        self.lines = [self.last_words]
        self.runs = False
        return self._drained()

    def _sqlserver_stop(self, given: dict[str, Any]) -> object:
        return {"State": "Running" if self.runs else "Stopped"}

    def _sqlserver_evidence(self, given: dict[str, Any]) -> object:
        log = base64.b64encode(error_log(*self.lines)).decode()
        return {"State": "Running" if self.runs else "Stopped", "Log": log}

    def _postgresql_discover(self, given: dict[str, Any]) -> object:
        line = f'"{PROGRAMS}\\pg_ctl.exe" runservice -N "pg" -D "{DATA}" -w'
        found = {"Service": "pg", "State": "Running", "Starts": "Auto", "CommandLine": line}
        return {"Services": [found], "Servers": [{"Pid": 4711, "Parent": 1}] if self.runs or self.comes_up_late else []}

    def _postgresql_look(self, given: dict[str, Any]) -> object:
        state = "in production" if self.runs else "shut down"
        control = f"Database cluster state: {state}\n"
        return {"Lock": LOCK if self.runs else "", "Version": "16\n", "Control": control, "Status": 0, "Linked": []}

    def _postgresql_psql(self, given: dict[str, Any]) -> str:
        return self._drained()

    @staticmethod
    def _drained() -> str:
        return f"vmsnap-drain opened\r\nvmsnap-drain result {json.dumps(OUTCOME)}\r\n"


class WindowsLine:
    """What a host with PowerShell Direct offers instead of an agent's channel."""

    def __init__(self, host: FakeHost, *, domain: str) -> None:
        self._host = host
        self._domain = domain

    def send(self, request: str, *, timeout: timedelta) -> str:
        raise GuestCommandError("guests of Hyper-V have no QEMU guest agent")

    def run_program(
        self, program: str, *, arguments: str, stdin: bytes, timeout: timedelta, cancel: Cancel | None
    ) -> ProgramEnd:
        self._host.live_on()
        machine = self._host.machines.get(self._domain)
        if machine is None or machine.state is not GuestState.RUNNING or not isinstance(machine.guest, WindowsGuest):
            raise GuestUnreachableError(f"PowerShell Direct does not reach {self._domain!r}")
        argv = (program, *split_command_line(arguments))
        if machine.run is None and argv != ("hostname",):
            self._host.violations.append(f"{program} in {self._domain!r}, which is production")
        result = machine.guest.answer(argv, stdin)
        return ProgramEnd(outcome=ProgramOutcome.ENDED, code=result.exit_status, stdout=result.stdout)


class DirectHypervisor(FakeHypervisor):
    def agent(self, domain: str) -> AgentChannel:
        return WindowsLine(self._host, domain=domain)


class WindowsWorld(FakeWorld):
    """One Windows guest, ``db``, whose disk has NTFS."""

    def __init__(self, folder: Path, guest: WindowsGuest) -> None:
        super().__init__(folder)
        self.host.machines["db"].guest = guest

    def process(self, faults: Faults | None = None) -> World:
        return replace(
            super().process(faults),
            hypervisor=DirectHypervisor(self.host, clock=self.clock),
            access=Access(clock=self.clock),
        )

    def _show_disks(self, images: tuple[DiskImage, ...], ended: Ended) -> None:
        super()._show_disks(images, ended)
        assert isinstance(ended.guest, WindowsGuest)
        ntfs = FileSystemState(disk=images[0].target, kind="ntfs", uuid=SERIAL, clean=ended.in_order, observed="clean")
        self.inspector.states[images[0].target] = (ntfs,)
        self.inspector.files = {(SERIAL, path): content for path, content in ended.guest.files().items()}


def policy(engine: str) -> Policy:
    return Policy(guest="db", database=DatabasePolicy.model_validate({"engine": engine}))


@pytest.mark.parametrize("engine", ["sqlserver", "postgresql-windows"])
def test_a_windows_guest_is_drained_stopped_and_proven_clean(tmp_path: Path, engine: str) -> None:
    lab = WindowsWorld(tmp_path, WindowsGuest(engine))
    outcome = simply(lab, backup(policy(engine)))
    assert outcome.error is None
    (snapshot,) = lab.store.snapshots("db")
    manifest = snapshot.manifest
    assert [(item.engine, item.rolled_back) for item in manifest.drain] == [(engine, 1)]
    assert {item.method for item in manifest.clean.instances} == {"in-guest", "disk"}
    assert lab.leftovers() == ()
    assert lab.host.violations == []
    guest = lab.host.machines["db"].guest
    assert isinstance(guest, WindowsGuest)
    assert (guest.runs, guest.token) == (True, "")


def test_a_server_that_did_not_end_in_order_makes_no_snapshot(tmp_path: Path) -> None:
    guest = WindowsGuest("sqlserver", last_words="Server shut down by NOWAIT request from login sa.")
    lab = WindowsWorld(tmp_path, guest)
    outcome = simply(lab, backup(policy("sqlserver")))
    assert isinstance(outcome.error, NotCleanError)
    assert lab.store.snapshots("db") == ()
    assert lab.leftovers() == ()


def test_a_server_that_comes_up_late_makes_no_snapshot(tmp_path: Path) -> None:
    guest = WindowsGuest("postgresql-windows")
    guest.comes_up_late = True
    lab = WindowsWorld(tmp_path, guest)
    outcome = simply(lab, backup(policy("postgresql-windows")))
    assert isinstance(outcome.error, NotCleanError)
    assert lab.store.snapshots("db") == ()


def test_what_the_guest_says_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the clone all was well, and the disk says otherwise."""
    lab = WindowsWorld(tmp_path, WindowsGuest("sqlserver"))
    monkeypatch.setattr(WindowsGuest, "files", lambda _: {"/sql/Log/ERRORLOG": error_log("Recovery is complete.")})
    outcome = simply(lab, backup(policy("sqlserver")))
    assert isinstance(outcome.error, NotCleanError)
    assert lab.store.snapshots("db") == ()
