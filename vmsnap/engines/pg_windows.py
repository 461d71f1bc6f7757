"""PostgreSQL on Windows, as its installers and pg_ctl set it up: a service each, run by ``pg_ctl runservice``.

The same server as elsewhere, reached by other means: ``pg_ctl`` signals it through a named pipe, and psql's session comes by
TCP from 127.0.0.1. The drain is ``pg_drain``'s, the proof the control file that ``PostgreSQL`` reads from the disk.
"""

from __future__ import annotations

import math
import ntpath
import re
from datetime import timedelta

from vmsnap.engines import pg_drain, pg_recovery
from vmsnap.engines.asking import last_words
from vmsnap.engines.drain_outcome import OPENED, report_of
from vmsnap.engines.pg_control import ClusterState
from vmsnap.engines.pg_controldata import ControlData, parse_control_data
from vmsnap.engines.pg_discovery import LockFile, parse_lock_file
from vmsnap.engines.pg_drain_script import DRAIN_SCRIPT
from vmsnap.engines.postgresql import PostgreSQL
from vmsnap.engines.windows import Answer, ask_model, powershell, refuse_late, require_no_process
from vmsnap.engines.windows_paths import locate_files
from vmsnap.errors import DeadlineError, GuestCommandError, NotCleanError, PreconditionError
from vmsnap.model.command import Command, CommandResult, Procedure
from vmsnap.model.drain import DrainReport, Instance, InstanceEvidence
from vmsnap.ports.engine import GuestPath

ENGINE = "postgresql-windows"
_SUPERUSER = "postgres"
_MARGIN = timedelta(seconds=30)
_PROGRAM = re.compile(r'\s*(?:"([^"]+)"|(\S+))')
_DATA = re.compile(r'\s-D\s*(?:"([^"]+)"|(\S+))')
# psql hands a line to cmd.exe, which takes a quotation mark in front for its own.
_UNIX_STOP = r'\! "$VMSNAP_PG_CTL" stop -D "$VMSNAP_PGDATA" -m smart -W -s 1>&2'
_WINDOWS_STOP = r'\! call "%VMSNAP_PG_CTL%" stop -D "%VMSNAP_PGDATA%" -m smart -W -s 1>&2'
WINDOWS_DRAIN_SCRIPT = DRAIN_SCRIPT.replace(_UNIX_STOP, _WINDOWS_STOP)
"""The drain's script with the one line that the system's shell reads."""


class _Service(Answer):
    Service: str
    State: str
    Starts: str
    CommandLine: str


class _Server(Answer):
    Pid: int
    Parent: int


class _Found(Answer):
    Services: list[_Service]
    Servers: list[_Server]


class _Look(Answer):
    Lock: str
    Version: str
    Control: str
    Status: int
    Linked: list[str]


class WindowsPostgreSQL:
    """The engine for PostgreSQL on Windows (see ``vmsnap.ports.engine.Engine``)."""

    @property
    def name(self) -> str:
        """Return the name used in policies."""
        return ENGINE

    def discover(self) -> Procedure[tuple[Instance, ...]]:
        """Find the services that run. May be repeated.

        Raises PreconditionError where none runs, one is a standby or not up though it should be, or a server runs that is
        no service.
        """
        found = yield from _find()
        instances, known = [], set()
        for service in found.Services:
            refuse_late(service.Service, state=service.State, starts=service.Starts)
            if service.State == "Stopped":
                continue
            instance, lock = yield from _instance(service)
            instances.append(instance)
            known.add(lock.pid)
        pids = {server.Pid for server in found.Servers}
        others = [server.Pid for server in found.Servers if server.Parent not in pids and server.Pid not in known]
        if others:
            raise PreconditionError(
                f"PostgreSQL also runs with process id {others[0]}, and is no service",
                remedy="make it one (pg_ctl register), or stop it in the guest",
            )
        if not instances:
            raise PreconditionError(
                "no PostgreSQL service runs in the guest",
                details=f"services there: {', '.join(service.Service for service in found.Services) or 'none'}",
                remedy="start the service in the guest",
            )
        return tuple(instances)

    def require_recoverable(self, instance: Instance) -> Procedure[None]:
        """Refuse a server whose settings make crash recovery a matter of luck. See ``pg_recovery``."""
        result = yield from _in_session(instance, script=pg_recovery.SETTINGS_SCRIPT, deadline=timedelta(0))
        pg_recovery.require_safe(instance, result=result)

    def drain(self, instance: Instance, *, deadline: timedelta) -> Procedure[DrainReport]:
        """Refuse new work, wait for work in flight up to the deadline, end and count the rest. See ``pg_drain``."""
        result = yield from _in_session(instance, script=WINDOWS_DRAIN_SCRIPT, deadline=deadline)
        if result.exit_status != 0:
            raise GuestCommandError(
                f"the drain of {instance.name} broke off (psql ended with status {result.exit_status})",
                details=last_words(result),
            )
        return report_of(instance, result=result)

    def stop(self, instance: Instance, *, deadline: timedelta) -> Procedure[None]:
        """Stop the server by ``pg_ctl stop -m fast``, never ``immediate``. May be repeated; stopped already is fine.

        Raises DeadlineError where it still runs, NotCleanError where something started it again.
        """
        before = _lock((yield from _look(instance)))
        if before is None:
            return
        seconds = max(1, math.ceil(deadline.total_seconds()))
        result = yield Command(
            argv=(
                ntpath.join(instance.programs, "pg_ctl.exe"),
                *("stop", "-D", instance.data_directory, "-m", "fast", "-w", "-t", str(seconds)),
            ),
            timeout=timedelta(seconds=seconds) + _MARGIN,
        )
        after = _lock((yield from _look(instance)))
        if after is None:
            return
        if after.pid != before.pid:
            raise _started_again(instance)
        raise DeadlineError(
            f"the PostgreSQL server {instance.name} did not stop within {seconds} s",
            details=last_words(result),
            remedy="its log in the guest tells what it waited for: a checkpoint (raise database.stop_deadline), or an "
            "archive_command that cannot reach its target in the fence",
        )

    def require_all_stopped(self) -> Procedure[None]:
        """Make sure that no server runs any more, as a service or otherwise. Raises NotCleanError."""

        def look() -> Procedure[list[int]]:
            found = yield from _find()
            return [server.Pid for server in found.Servers]

        yield from require_no_process(look, what="PostgreSQL")

    def evidence_in_guest(self, instance: Instance) -> Procedure[InstanceEvidence]:
        """Ask ``pg_controldata`` in the guest. May be repeated. Raises NotCleanError where the server runs again."""
        look = yield from _look(instance)
        if look.Lock:
            raise _started_again(instance)
        said = _control(instance, look)
        return InstanceEvidence(
            engine=ENGINE,
            instance=instance.name,
            data_directory=instance.data_directory,
            method="in-guest",
            clean=said.state == ClusterState.SHUT_DOWN.text and not said.doubtful,
            observed=said.observed,
        )

    def evidence_paths(self, instance: Instance) -> tuple[str, ...]:
        """Return the files that prove a shutdown, and those whose presence would forbid a start without recovery."""
        return tuple(path.replace("/", "\\") for path in PostgreSQL().evidence_paths(instance))

    def judge(self, instance: Instance, *, files: tuple[bytes | None, ...]) -> InstanceEvidence:
        """Judge the evidence as ``PostgreSQL.judge`` does."""
        return PostgreSQL().judge(instance, files=files)

    def locate(self, instance: Instance) -> Procedure[tuple[GuestPath, ...]]:
        """Find the volumes of ``evidence_paths``, of the WAL folder and of every tablespace."""
        look = yield from _look(instance)
        inside = tuple(ntpath.join(folder, "PG_VERSION") for folder in look.Linked)
        return (yield from locate_files((*self.evidence_paths(instance), *inside)))


def _find() -> Procedure[_Found]:
    return (yield from ask_model(_Found, powershell("postgresql_discover"), what="cannot list the PostgreSQL services"))


def _in_session(instance: Instance, *, script: str, deadline: timedelta) -> Procedure[CommandResult]:
    result = yield powershell(
        "postgresql_psql",
        parameters={
            "Psql": ntpath.join(instance.programs, "psql.exe"),
            "PgCtl": ntpath.join(instance.programs, "pg_ctl.exe"),
            "DataDirectory": instance.data_directory,
            "Deadline": f"{deadline.total_seconds():.3f}",
            "Patience": f"{pg_drain.PATIENCE.total_seconds():.3f}",
            "Port": str(instance.port),
            "User": instance.user,
            "Database": "postgres",
            "Script": script,
        },
        timeout=deadline + pg_drain.MARGIN,
    )
    if OPENED not in result.text.splitlines():
        raise PreconditionError(
            f"cannot open a session to {instance.name} as {instance.user}; nothing was stopped",
            details=last_words(result),
            remedy="write the password into pgpass.conf in %APPDATA%\\postgresql of the account of "
            "hyperv.guest_credential, or let 127.0.0.1 in by 'sspi' in pg_hba.conf",
        )
    return result


def _instance(service: _Service) -> Procedure[tuple[Instance, LockFile]]:
    program, data = _PROGRAM.match(service.CommandLine), _DATA.search(service.CommandLine)
    if program is None or data is None:
        raise PreconditionError(
            f"cannot tell where the service {service.Service} has its data", details=service.CommandLine
        )
    found = Instance(
        engine=ENGINE,
        name=service.Service,
        data_directory=ntpath.normpath(data[1] or data[2]),
        programs=ntpath.dirname(ntpath.normpath(program[1] or program[2])),
        user=_SUPERUSER,
    )
    look = yield from _look(found)
    lock = _lock(look)
    said = _control(found, look)
    if lock is None or service.State != "Running" or lock.status not in {"ready", ""}:
        raise PreconditionError(
            f"the PostgreSQL service {service.Service} is not up: it is {service.State}, its server "
            f"{'has no postmaster.pid' if lock is None else lock.status or 'starting'}",
            remedy="wait until it takes sessions; a standby is not backed up",
        )
    if said.state == ClusterState.IN_ARCHIVE_RECOVERY.text:
        raise PreconditionError(
            f"the PostgreSQL service {service.Service} is a standby: such a copy needs recovery to start",
            remedy="back up the primary server's guest instead",
        )
    instance = Instance(
        engine=found.engine,
        name=found.name,
        data_directory=found.data_directory,
        programs=found.programs,
        user=found.user,
        version=look.Version.strip(),
        port=lock.port,
    )
    return instance, lock


def _look(instance: Instance) -> Procedure[_Look]:
    command = powershell(
        "postgresql_look", parameters={"DataDirectory": instance.data_directory, "Programs": instance.programs}
    )
    return (yield from ask_model(_Look, command, what=f"cannot look into {instance.data_directory}"))


def _lock(look: _Look) -> LockFile | None:
    return parse_lock_file(look.Lock) if look.Lock.strip() else None


def _control(instance: Instance, look: _Look) -> ControlData:
    if look.Status != 0:
        raise GuestCommandError(
            f"cannot read the state of the PostgreSQL server on {instance.data_directory}: pg_controldata ended with "
            f"status {look.Status}",
            details=look.Control[:500] or None,
        )
    return parse_control_data(look.Control)


def _started_again(instance: Instance) -> NotCleanError:
    return NotCleanError(
        f"something started the PostgreSQL server {instance.name} again after it was stopped",
        remedy="stop what does (a cluster manager, the service's recovery actions) first, with the policy's "
        "database.before_drain",
    )
