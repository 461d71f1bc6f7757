"""Engines in Windows guests: what they send, and what they make of answers. Nothing here was recorded from a real Windows."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib.resources import files
from typing import Any, TypeVar

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Parser

from vmsnap.engines.pg_control import ClusterState
from vmsnap.engines.pg_recovery import SETTINGS_SCRIPT
from vmsnap.engines.pg_windows import WINDOWS_DRAIN_SCRIPT, WindowsPostgreSQL
from vmsnap.engines.registry import engine_for
from vmsnap.engines.sqlserver import SqlServer
from vmsnap.engines.sqlserver_log import read_log
from vmsnap.engines.windows import names_in, powershell
from vmsnap.errors import DeadlineError, GuestCommandError, NotCleanError, PreconditionError
from vmsnap.model.command import Command, CommandResult, Procedure
from vmsnap.model.drain import Instance
from vmsnap.model.policy import DatabasePolicy
from vmsnap.testing.fake_postgresql import control_file

T = TypeVar("T")
MINUTE = timedelta(minutes=1)
FOLDER = r"C:\Program Files\Microsoft SQL Server\MSSQL16.SALES\MSSQL"
SALES = Instance(
    engine="sqlserver",
    name="MSSQL$SALES",
    data_directory=FOLDER,
    programs=FOLDER + r"\Binn",
    user="NT SERVICE\\MSSQL$SALES",
    version="16.0.1000.6",
)
DATA = r"D:\Program Files\PostgreSQL\16\data"
PROGRAMS = r"D:\Program Files\PostgreSQL\16\bin"
CLUSTER = Instance(
    engine="postgresql-windows",
    name="postgresql-x64-16",
    data_directory=DATA,
    programs=PROGRAMS,
    user="postgres",
    version="16",
    port=5433,
)
LOCK = f"4711\n{DATA}\n1700000000\n5433\n\n127.0.0.1\n  1234 56\nready   \n"
CONTROL = "Database cluster state:               {}\nDatabase system identifier:           73\n"


def given(command: Command) -> dict[str, Any]:
    parameters: dict[str, Any] = json.loads(command.stdin)
    return parameters


class Guest:
    """Answers scripts by their names; a list is used up one answer at a time."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = dict(answers)
        self.asked: list[Command] = []

    def converse(self, procedure: Procedure[T]) -> T:
        try:
            command = next(procedure)
            while True:
                self.asked.append(command)
                command = procedure.send(self._answer(command))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _answer(self, command: Command) -> CommandResult:
        key = "+".join(names_in(command)) if "powershell" in command.argv[0] else command.argv[0].rpartition("\\")[2]
        answer = self.answers[key]
        if isinstance(answer, list) and answer and isinstance(answer[0], CommandResult | dict):
            answer = answer.pop(0)
        if isinstance(answer, CommandResult):
            return answer
        return CommandResult(exit_status=0, stdout=json.dumps(answer).encode())


def service(**changes: Any) -> dict[str, Any]:
    return {
        "Service": "MSSQL$SALES",
        "State": "Running",
        "Starts": "Auto",
        "Process": 2000,
        "Account": "NT SERVICE\\MSSQL$SALES",
        "Version": "16.0.1000.6",
        "Folder": FOLDER,
        "ErrorLog": FOLDER + r"\Log\ERRORLOG",
        **changes,
    }


def instances(*services: dict[str, Any]) -> dict[str, Any]:
    return {"Services": list(services), "Servers": [2000] if services else []}


def databases(*unready: str) -> dict[str, list[str]]:
    return {"Files": [], "Unready": list(unready), "Copies": []}


def said(*lines: str, status: int = 0, error: str = "") -> CommandResult:
    return CommandResult(exit_status=status, stdout="\r\n".join(lines).encode(), stderr=error.encode())


OUTCOME = {"in_flight": 3, "finished": 2, "rolled_back": 1, "prepared": 0, "seconds": 1.25}


class TestScripts:
    SCRIPTS = sorted(
        (entry.name, entry.read_text())
        for entry in (files("vmsnap.engines") / "scripts").iterdir()
        if entry.name[-4:] == ".ps1"
    )

    @pytest.mark.parametrize(("name", "text"), SCRIPTS, ids=[name for name, _ in SCRIPTS])
    def test_a_script_is_powershell(self, name: str, text: str) -> None:
        tree = Parser(Language(tree_sitter_powershell.language())).parse(text.encode())
        assert not tree.root_node.has_error
        assert text.startswith("# ")
        assert text.isascii()
        assert max(map(len, text.splitlines())) < 220

    def test_hostile_parameters_are_data(self) -> None:
        hostile = 'x\'; Remove-Item C:\\ -Recurse; "$(calc)" \N{SNOWMAN}'
        command = powershell("sqlserver_stop", parameters={"Service": hostile})
        assert command.argv == powershell("sqlserver_stop", parameters={"Service": "other"}).argv
        assert given(command)["Service"] == hostile
        assert command.stdin.isascii()

    def test_a_command_line_of_windows_holds_the_longest(self) -> None:
        assert len(powershell("sqlserver_open", "sqlserver_drain").argv[-1]) < 30_000


class TestSqlServer:
    def test_policies_name_it(self) -> None:
        assert engine_for(DatabasePolicy(engine="sqlserver")).name == "sqlserver"
        assert engine_for(DatabasePolicy(engine="postgresql-windows")).name == "postgresql-windows"

    def test_an_instance_is_found_by_its_service(self) -> None:
        stopped = service(Service="MSSQLSERVER", State="Stopped", Starts="Manual", Process=0, ErrorLog="")
        answers = {
            "sqlserver_discover": instances(service(), stopped),
            "sqlserver_open+sqlserver_look": databases("old: RESTORING"),
        }
        assert Guest(answers).converse(SqlServer().discover()) == (SALES,)

    @pytest.mark.parametrize(
        ("services", "words"),
        [
            ([], "no SQL Server runs"),
            ([service(State="Stopped", Starts="Disabled")], "no SQL Server runs"),
            ([service(), service(Service="MSSQLSERVER", State="Stopped")], "starts by itself"),
            ([service(Process=2001)], "is no service"),
            ([service(State="Paused")], "is Paused"),
            ([service(ErrorLog="E:\\log\\ERRORLOG")], "error log"),
        ],
    )
    def test_what_cannot_be_drained_is_refused(self, services: list[dict[str, Any]], words: str) -> None:
        with pytest.raises(PreconditionError, match=words):
            Guest({"sqlserver_discover": instances(*services)}).converse(SqlServer().discover())

    @pytest.mark.parametrize("state", ["RECOVERING", "RECOVERY_PENDING", "SUSPECT", "EMERGENCY"])
    def test_a_database_that_recovers_or_could_not_is_refused(self, state: str) -> None:
        look = databases("old: OFFLINE", f"sales: {state}")
        guest = Guest({"sqlserver_discover": instances(service()), "sqlserver_open+sqlserver_look": look})
        with pytest.raises(PreconditionError, match=f"the database sales of .* is {state}") as caught:
            guest.converse(SqlServer().discover())
        assert caught.value.remedy

    def test_a_server_that_lets_nobody_in_yet_is_not_up(self) -> None:
        refused = said(status=1, error="Login failed: the server is in script upgrade mode")
        guest = Guest({"sqlserver_discover": instances(service()), "sqlserver_open+sqlserver_look": refused})
        with pytest.raises(PreconditionError, match="cannot look at the databases") as caught:
            guest.converse(SqlServer().discover())
        assert "script upgrade mode" in (caught.value.details or "")

    def test_nothing_may_be_left_when_all_were_stopped(self) -> None:
        stopped = {**instances(service(State="Stopped", Process=0)), "Servers": []}
        Guest({"sqlserver_discover": [instances(service()), stopped]}).converse(SqlServer().require_all_stopped())
        with pytest.raises(NotCleanError, match="process id 2000"):
            Guest({"sqlserver_discover": instances(service())}).converse(SqlServer().require_all_stopped())

    def test_its_recovery_depends_on_no_setting(self) -> None:
        guest = Guest({})
        guest.converse(SqlServer().require_recoverable(SALES))
        assert guest.asked == []

    def test_the_session_comes_before_the_pause_and_the_order_to_stop_after_the_count(self) -> None:
        text = "".join(
            text for name, text in TestScripts.SCRIPTS if name in {"sqlserver_open.ps1", "sqlserver_drain.ps1"}
        )
        marks = ["Suspend-Service", "$look)", "sp_cycle_errorlog", "vmsnap-drain result", "'SHUTDOWN'"]
        (opened, drained) = (dict(TestScripts.SCRIPTS)[f"sqlserver_{name}.ps1"] for name in ("open", "drain"))
        assert "$session.Open()" in opened
        assert [drained.index(mark) for mark in marks] == sorted(drained.index(mark) for mark in marks)
        assert "NOWAIT" not in text
        assert "RESTRICTED_USER" not in text

    def test_a_drain_is_reported(self) -> None:
        guest = Guest(
            {
                "sqlserver_open+sqlserver_drain": said(
                    "vmsnap-drain opened", "vmsnap-drain result " + json.dumps(OUTCOME)
                )
            }
        )
        report = guest.converse(SqlServer().drain(SALES, deadline=MINUTE))
        assert (report.in_flight_at_start, report.finished, report.rolled_back, report.seconds) == (3, 2, 1, 1.25)
        assert given(guest.asked[0]) == {
            "Server": "lpc:.\\SALES",
            "Service": "MSSQL$SALES",
            "DeadlineMs": 60_000,
            "PatienceMs": 1_000,
        }
        assert guest.asked[0].timeout == MINUTE * 2

    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (said(status=1, error="Fehler bei der Anmeldung"), PreconditionError),
            (said("vmsnap-drain opened", status=1, error="gone"), GuestCommandError),
            (said("vmsnap-drain opened", "vmsnap-drain result {}"), GuestCommandError),
            (
                said("vmsnap-drain opened", "vmsnap-drain result " + json.dumps({**OUTCOME, "finished": 3})),
                GuestCommandError,
            ),
        ],
        ids=["no session", "broke off", "no numbers", "numbers that do not add up"],
    )
    def test_a_drain_that_cannot_be_believed_is_an_error(self, answer: CommandResult, kind: type[Exception]) -> None:
        with pytest.raises(kind):
            Guest({"sqlserver_open+sqlserver_drain": answer}).converse(SqlServer().drain(SALES, deadline=MINUTE))

    def test_a_server_that_does_not_stop(self) -> None:
        Guest({"sqlserver_stop": {"State": "Stopped"}}).converse(SqlServer().stop(SALES, deadline=MINUTE))
        with pytest.raises(DeadlineError, match="StopPending"):
            Guest({"sqlserver_stop": {"State": "StopPending"}}).converse(SqlServer().stop(SALES, deadline=MINUTE))

    def test_every_volume_of_a_database_is_looked_for(self) -> None:
        guest = Guest(
            {
                "sqlserver_open+sqlserver_look": {
                    "Files": ["E:\\data\\a.mdf", "E:\\data\\a.ldf", "F:\\b.mdf"],
                    "Unready": ["old: RESTORING"],
                    "Copies": [],
                },
                "windows_locate": [
                    _volume(FOLDER + r"\Log", serial="0x10203040506070AA", inside="Program Files\\x\\Log"),
                    _volume("E:\\data", serial="0x10203040506070bb", inside="data"),
                    _volume("F:\\", serial="0x10203040506070cc", inside=""),
                ],
            }
        )
        guest.answers["windows_locate"] = said(json.dumps(guest.answers["windows_locate"]))
        found = guest.converse(SqlServer().locate(SALES))
        assert [(item.file_system_uuid, item.path) for item in found] == [
            ("10203040506070AA", "/Program Files/x/Log/ERRORLOG"),
            ("10203040506070BB", "/data/a.ldf"),
            ("10203040506070CC", "/b.mdf"),
        ]

    def test_secondary_copies_are_refused(self) -> None:
        answer = {"Files": [], "Unready": [], "Copies": ["sales"]}
        with pytest.raises(PreconditionError, match="secondary copies"):
            Guest({"sqlserver_open+sqlserver_look": answer}).converse(SqlServer().locate(SALES))

    def test_a_volume_that_is_not_ntfs_is_refused(self) -> None:
        look: dict[str, list[str]] = {"Files": [], "Unready": [], "Copies": []}
        locate = said(json.dumps([{**_volume(FOLDER + r"\Log"), "Facts": "The FSCTL is not supported"}]))
        guest = Guest({"sqlserver_open+sqlserver_look": look, "windows_locate": locate})
        with pytest.raises(PreconditionError, match="no NTFS volume"):
            guest.converse(SqlServer().locate(SALES))

    def test_a_server_that_runs_again_is_not_clean(self) -> None:
        answer = {"State": "Running", "Log": ""}
        with pytest.raises(NotCleanError):
            Guest({"sqlserver_evidence": answer}).converse(SqlServer().evidence_in_guest(SALES))

    def test_the_log_is_judged_in_the_guest_and_on_the_disk_alike(self) -> None:
        log = error_log("Server shut down by request from login DB1\\vmsnap.")
        answer = {"State": "Stopped", "Log": base64.b64encode(log).decode()}
        inside = Guest({"sqlserver_evidence": answer}).converse(SqlServer().evidence_in_guest(SALES))
        outside = SqlServer().judge(SALES, files=(log, b"whatever else"))
        assert (inside.method, inside.clean, outside.method, outside.clean) == ("in-guest", True, "disk", True)


def _volume(folder: str, *, serial: str = "0x1122334455667788", inside: str = "x") -> dict[str, str]:
    volume = "\\\\?\\Volume{00000000-0000-0000-0000-000000000000}\\"
    return {"Folder": folder, "Volume": volume, "Inside": inside, "Facts": f"NTFS-Volumeseriennummer : {serial}\r\n"}


def error_log(*lines: str) -> bytes:
    first = "2026-11-21 10:00:00.00 spid51      The error log has been reinitialized."
    events = [f"2026-11-21 10:00:{number:02d}.50 spid51      {line}" for number, line in enumerate(lines)]
    return "\r\n".join([first, *events, ""]).encode("utf-16")


class TestErrorLog:
    @pytest.mark.parametrize(
        "line",
        [
            "Server shut down by request from login sa.",
            "SQL Server is terminating in response to a 'stop' request from Service Control Manager. It is no error.",
            "SQL Server is terminating because of a system shutdown. This is an informational message only.",
        ],
    )
    def test_an_end_in_order(self, line: str) -> None:
        assert read_log(error_log("x", line)).clean
        assert read_log(error_log(line, "SQL Trace was stopped due to server shutdown. Trace ID = '1'.")).clean

    @pytest.mark.parametrize(
        "content",
        [
            None,
            b"",
            b"\xff\xfe",
            b"\x00" * 4096,
            error_log("Recovery is complete."),
            error_log("Server shut down by NOWAIT request from login sa."),
            error_log("Server shut down by request from login sa.", "Starting up database 'tempdb'."),
            error_log("Server shut down by request from login sa.", *("Login failed." for _ in range(20))),
        ],
        ids=["missing", "empty", "a mark alone", "zeroes", "a crash", "nowait", "started again", "ran on"],
    )
    def test_what_does_not_say_so_is_not_clean(self, content: bytes | None) -> None:
        assert not read_log(content).clean


def look(**changes: Any) -> dict[str, Any]:
    control = CONTROL.format("in production")
    return {"Lock": LOCK, "Version": "16\n", "Control": control, "Status": 0, "Linked": [], **changes}


def postgresql(*, services: list[dict[str, str]] | None = None, pid: int = 4711, **changes: Any) -> Guest:
    line = f'"{PROGRAMS}\\pg_ctl.exe" runservice -N "postgresql-x64-16" -D "{DATA}" -w'
    found = {
        "Services": services
        if services is not None
        else [{"Service": "postgresql-x64-16", "State": "Running", "Starts": "Auto", "CommandLine": line}],
        "Servers": [{"Pid": pid, "Parent": 700}, {"Pid": 4800, "Parent": pid}],
    }
    return Guest({"postgresql_discover": found, "postgresql_look": [look(**changes)]})


LATE = {"Service": "other", "State": "Stopped", "CommandLine": "x"}


class TestPostgreSQL:
    def test_a_service_is_found_with_blanks_in_its_paths(self) -> None:
        guest = postgresql()
        assert guest.converse(WindowsPostgreSQL().discover()) == (CLUSTER,)
        assert given(guest.asked[1]) == {"DataDirectory": DATA, "Programs": PROGRAMS}

    @pytest.mark.parametrize(
        ("guest", "words"),
        [
            (lambda: postgresql(services=[], pid=4711), "is no service"),
            (lambda: postgresql(pid=9999), "is no service"),
            (lambda: postgresql(services=[{**LATE, "Starts": "Auto"}]), "starts by itself"),
            (lambda: postgresql(Lock=""), "is not up"),
            (lambda: postgresql(Lock=LOCK.replace("ready", "standby")), "is not up"),
            (lambda: postgresql(Control=CONTROL.format("in archive recovery")), "is a standby"),
        ],
    )
    def test_what_cannot_be_drained_is_refused(self, guest: Callable[[], Guest], words: str) -> None:
        with pytest.raises(PreconditionError, match=words):
            guest().converse(WindowsPostgreSQL().discover())

    def test_nothing_may_be_left_when_all_were_stopped(self) -> None:
        none: dict[str, list[object]] = {"Services": [], "Servers": []}
        guest = Guest({"postgresql_discover": [postgresql().answers["postgresql_discover"], none]})
        guest.converse(WindowsPostgreSQL().require_all_stopped())
        with pytest.raises(NotCleanError, match="process id 4711"):
            postgresql().converse(WindowsPostgreSQL().require_all_stopped())

    @pytest.mark.parametrize(("fsync", "trusted"), [("on", True), ("off", False)])
    def test_its_recovery_is_trusted_by_its_settings(self, fsync: str, *, trusted: bool) -> None:
        answer = said("vmsnap-drain opened", f"vmsnap-setting fsync {fsync}", "vmsnap-setting full_page_writes on")
        guest = Guest({"postgresql_psql": answer})
        if trusted:
            guest.converse(WindowsPostgreSQL().require_recoverable(CLUSTER))
        else:
            with pytest.raises(PreconditionError, match="fsync = off"):
                guest.converse(WindowsPostgreSQL().require_recoverable(CLUSTER))
        assert given(guest.asked[0])["Script"] == SETTINGS_SCRIPT

    def test_the_drain_is_that_of_every_postgresql_but_for_the_shell(self) -> None:
        assert WINDOWS_DRAIN_SCRIPT.count("%VMSNAP_PG_CTL%") == 1
        assert "$VMSNAP" not in WINDOWS_DRAIN_SCRIPT
        outcome = "vmsnap-drain result " + json.dumps(OUTCOME)
        guest = Guest({"postgresql_psql": said("vmsnap-drain opened", outcome)})
        report = guest.converse(WindowsPostgreSQL().drain(CLUSTER, deadline=MINUTE))
        assert (report.engine, report.rolled_back) == ("postgresql-windows", 1)
        assert given(guest.asked[0])["Psql"] == PROGRAMS + r"\psql.exe"
        assert given(guest.asked[0])["Port"] == "5433"

    def test_without_a_session_nothing_is_stopped(self) -> None:
        guest = Guest({"postgresql_psql": said(status=2, error="fe_sendauth: no password supplied")})
        with pytest.raises(PreconditionError, match="nothing was stopped") as caught:
            guest.converse(WindowsPostgreSQL().drain(CLUSTER, deadline=MINUTE))
        assert "pgpass.conf" in (caught.value.remedy or "")

    def test_it_is_stopped_in_order(self) -> None:
        guest = Guest({"postgresql_look": [look(), look(Lock="")], "pg_ctl.exe": said("server stopped")})
        guest.converse(WindowsPostgreSQL().stop(CLUSTER, deadline=MINUTE))
        assert guest.asked[1].argv[1:] == ("stop", "-D", DATA, "-m", "fast", "-w", "-t", "60")

    def test_one_that_has_stopped_is_left_alone(self) -> None:
        guest = Guest({"postgresql_look": [look(Lock="")]})
        guest.converse(WindowsPostgreSQL().stop(CLUSTER, deadline=MINUTE))
        assert len(guest.asked) == 1

    @pytest.mark.parametrize(("after", "kind"), [(LOCK, DeadlineError), (LOCK.replace("4711", "5000"), NotCleanError)])
    def test_one_that_does_not_stop(self, after: str, kind: type[Exception]) -> None:
        guest = Guest({"postgresql_look": [look(), look(Lock=after)], "pg_ctl.exe": said(status=1)})
        with pytest.raises(kind):
            guest.converse(WindowsPostgreSQL().stop(CLUSTER, deadline=MINUTE))

    @pytest.mark.parametrize(("state", "clean"), [("shut down", True), ("in production", False)])
    def test_its_own_tool_is_asked(self, state: str, *, clean: bool) -> None:
        guest = Guest({"postgresql_look": [look(Lock="", Control=CONTROL.format(state))]})
        assert guest.converse(WindowsPostgreSQL().evidence_in_guest(CLUSTER)).clean is clean

    def test_the_disk_is_judged_by_the_control_file(self) -> None:
        engine = WindowsPostgreSQL()
        assert engine.evidence_paths(CLUSTER)[0] == DATA + r"\global\pg_control"
        absent = (None,) * (len(engine.evidence_paths(CLUSTER)) - 2)
        good = control_file(state=ClusterState.SHUT_DOWN)
        assert engine.judge(CLUSTER, files=(good, b"16\n", *absent)).clean
        assert not engine.judge(CLUSTER, files=(control_file(state=ClusterState.IN_PRODUCTION), b"16\n", *absent)).clean
        assert not engine.judge(CLUSTER, files=(good, b"16\n", b"4711", *absent[1:])).clean
