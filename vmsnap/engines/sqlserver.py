"""SQL Server 2016 and later on Windows, by PowerShell in the guest.

The rules of its drain, kept by ``scripts/sqlserver_drain.ps1``:

- An administrator's session is opened first. Then the service is paused: the server refuses every new session with error
  17142 and leaves those there are alone. Restricting databases instead would stay in the image.
- Work in flight is a session with a user transaction, or executing, at that moment. What is idle, or begins something new
  afterwards, is ended (``KILL``).
- A session whose client is elsewhere and that has waited for it for one second is ended: in the fence it can never answer.
- A commit that waits for a replica has happened here: it counts as finished. Prepared distributed transactions stay.
- At the deadline the rest is ended. The error log is begun anew, so that what follows is short, and the same session gives
  the order ``SHUTDOWN``, without NOWAIT: the server waits, and writes a checkpoint in every database.

The pause does not outlive the service. The proof is the error log as the disk has it: begun by the drain, it ends with the
server's own word that it was shut down on request.
"""

from __future__ import annotations

import base64
import logging
import ntpath
from datetime import timedelta

from vmsnap.engines.asking import last_words
from vmsnap.engines.drain_outcome import OPENED, report_of
from vmsnap.engines.sqlserver_log import read_log
from vmsnap.engines.windows import Answer, Parameters, ask_model, powershell, refuse_late, require_no_process
from vmsnap.engines.windows_paths import locate_files
from vmsnap.errors import DeadlineError, GuestCommandError, NotCleanError, PreconditionError
from vmsnap.model.command import Procedure
from vmsnap.model.drain import DrainReport, Instance, InstanceEvidence
from vmsnap.ports.engine import GuestPath

ENGINE = "sqlserver"
PATIENCE = timedelta(seconds=1)
_MARGIN = timedelta(seconds=60)
_DEFAULT_INSTANCE = "MSSQLSERVER"
_LOG = "Log\\ERRORLOG"
# sys.databases.state_desc. What is RESTORING or OFFLINE was left so by an administrator, and says so after each start.
_COMING = "RECOVERING"
_BROKEN = frozenset({"RECOVERY_PENDING", "SUSPECT", "EMERGENCY"})
_ADMINISTRATOR = (
    "let the account of hyperv.guest_credential be a sysadmin of the server: CREATE LOGIN [DOMAIN\\USER] FROM WINDOWS; "
    "ALTER SERVER ROLE sysadmin ADD MEMBER [DOMAIN\\USER]"
)
_log = logging.getLogger(__name__)


class _Service(Answer):
    Service: str
    State: str
    Starts: str
    Process: int
    Account: str
    Version: str
    Folder: str
    ErrorLog: str


class _Found(Answer):
    Services: list[_Service]
    Servers: list[int]


class _Databases(Answer):
    Files: list[str]
    Unready: list[str]
    Copies: list[str]


class _State(Answer):
    State: str
    Log: str = ""


class SqlServer:
    """The engine for SQL Server (see ``vmsnap.ports.engine.Engine``)."""

    @property
    def name(self) -> str:
        """Return the name used in policies."""
        return ENGINE

    def discover(self) -> Procedure[tuple[Instance, ...]]:
        """Find the running instances. May be repeated.

        Raises PreconditionError where none runs, one is paused or starting or should run, a server runs that is no
        service, an error log is not in its own folder, or a database recovers, or could not.
        """
        found = yield from _find()
        services = found.Services
        others = sorted(set(found.Servers) - {service.Process for service in services})
        if others:
            raise PreconditionError(
                f"SQL Server also runs with process id {others[0]}, and is no service",
                details="a LocalDB, or an instance of a user's own",
                remedy="end what uses it before backups: nobody would drain it, or know how it ended",
            )
        for service in services:
            refuse_late(service.Service, state=service.State, starts=service.Starts)
        instances = tuple(_instance(service) for service in services if service.State != "Stopped")
        if not instances:
            raise PreconditionError(
                "no SQL Server runs in the guest",
                details=f"services there: {', '.join(service.Service for service in services) or 'none'}",
                remedy="start the service in the guest",
            )
        for instance in instances:
            yield from _refuse_unready(instance)
        return instances

    def require_recoverable(self, instance: Instance) -> Procedure[None]:  # noqa: ARG002 - the port's
        """Do nothing: SQL Server has no setting that takes the order from its writes. Its databases were looked at."""
        yield from ()

    def drain(self, instance: Instance, *, deadline: timedelta) -> Procedure[DrainReport]:
        """Pause the service, wait for work in flight, end the rest, and order the server to stop. Not to be repeated.

        Raises PreconditionError where no administrator's session can be opened (nothing was paused), GuestCommandError
        where the session was lost or its answer makes no sense.
        """
        result = yield powershell(
            "sqlserver_open",
            "sqlserver_drain",
            parameters={
                **_server(instance),
                "DeadlineMs": round(deadline.total_seconds() * 1000),
                "PatienceMs": round(PATIENCE.total_seconds() * 1000),
            },
            timeout=deadline + _MARGIN,
        )
        if OPENED not in result.text.splitlines():
            raise PreconditionError(
                f"cannot open an administrator's session to {instance.name}; nothing was stopped",
                details=last_words(result),
                remedy=_ADMINISTRATOR,
            )
        return report_of(instance, result=result)

    def stop(self, instance: Instance, *, deadline: timedelta) -> Procedure[None]:
        """Wait until the server has stopped, as it was ordered to; order its service to stop where it was not.

        May be repeated. Raises DeadlineError.
        """
        command = powershell(
            "sqlserver_stop",
            parameters={"Service": instance.name, "DeadlineMs": round(deadline.total_seconds() * 1000)},
            timeout=deadline + _MARGIN,
        )
        state = yield from ask_model(_State, command, what=f"cannot stop {instance.name}")
        if state.State != "Stopped":
            raise DeadlineError(
                f"SQL Server {instance.name} did not stop within {deadline.total_seconds():g} s: its service is {state.State}",
                remedy="its ERRORLOG in the guest tells what it waited for: a checkpoint (raise database.stop_deadline)",
            )

    def require_all_stopped(self) -> Procedure[None]:
        """Make sure that no server runs any more, as a service or otherwise. Raises NotCleanError."""

        def look() -> Procedure[list[int]]:
            return (yield from _find()).Servers

        yield from require_no_process(look, what="SQL Server")

    def evidence_in_guest(self, instance: Instance) -> Procedure[InstanceEvidence]:
        """Read the stopped server's error log. May be repeated. Raises NotCleanError where the server runs again."""
        (log,) = self.evidence_paths(instance)
        command = powershell("sqlserver_evidence", parameters={"Service": instance.name, "ErrorLog": log})
        state = yield from ask_model(_State, command, what=f"cannot read the error log of {instance.name}")
        if state.State != "Stopped":
            raise NotCleanError(
                f"something started SQL Server {instance.name} again after it was stopped",
                remedy="stop what does (a cluster, a watchdog) first, with the policy's database.before_drain",
            )
        return self._evidence(instance, method="in-guest", log=base64.b64decode(state.Log))

    def evidence_paths(self, instance: Instance) -> tuple[str, ...]:
        """Return the error log."""
        return (ntpath.join(instance.data_directory, _LOG),)

    def judge(self, instance: Instance, *, files: tuple[bytes | None, ...]) -> InstanceEvidence:
        """Judge the error log as the disk has it. Never raises for what it holds."""
        return self._evidence(instance, method="disk", log=files[0])

    def locate(self, instance: Instance) -> Procedure[tuple[GuestPath, ...]]:
        """Find the volumes of the error log and of every file of every database.

        Raises PreconditionError for a server that holds secondary copies of availability groups: stopped, they need
        recovery to start.
        """
        found = yield from _databases(instance)
        if found.Copies:
            raise PreconditionError(
                f"{instance.name} holds secondary copies of databases: {', '.join(found.Copies)}",
                remedy="back up the guest of the primary replica instead",
            )
        for database in found.Unready:
            _log.warning("a database of %s is not online, and stays so in the snapshot: %s", instance.name, database)
        folders = {ntpath.dirname(path): path for path in found.Files}
        return (yield from locate_files((*self.evidence_paths(instance), *folders.values())))

    @staticmethod
    def _evidence(instance: Instance, *, method: str, log: bytes | None) -> InstanceEvidence:
        verdict = read_log(log)
        return InstanceEvidence(
            engine=ENGINE,
            instance=instance.name,
            data_directory=instance.data_directory,
            method=method,
            clean=verdict.clean,
            observed=verdict.observed,
        )


def _find() -> Procedure[_Found]:
    what = "cannot list the instances of SQL Server"
    return (yield from ask_model(_Found, powershell("sqlserver_discover"), what=what))


def _databases(instance: Instance) -> Procedure[_Databases]:
    what = f"cannot look at the databases of {instance.name}"
    look = powershell("sqlserver_open", "sqlserver_look", parameters=_server(instance))
    return (yield from ask_model(_Databases, look, what=what, remedy=_ADMINISTRATOR))


def _refuse_unready(instance: Instance) -> Procedure[None]:
    try:
        found = yield from _databases(instance)
    except GuestCommandError as error:
        # A server that starts lets nobody in yet.
        raise PreconditionError(error.brief, details=error.details, remedy=_ADMINISTRATOR) from error
    for text in found.Unready:
        database, _, state = text.rpartition(": ")
        if state == _COMING:
            raise PreconditionError(
                f"the database {database} of {instance.name} is {state}", remedy="try again when it is ONLINE"
            )
        if state in _BROKEN:
            raise PreconditionError(
                f"the database {database} of {instance.name} is {state}: it did not come through its recovery",
                remedy="mend it (DBCC CHECKDB, RESTORE; the ERRORLOG says why), or set it OFFLINE if it is not wanted",
            )


def _instance(service: _Service) -> Instance:
    if service.State != "Running":
        raise PreconditionError(
            f"SQL Server {service.Service} is {service.State}", remedy="wait until it runs, or resume its service"
        )
    if ntpath.normcase(service.ErrorLog) != ntpath.normcase(ntpath.join(service.Folder, _LOG)):
        raise PreconditionError(
            f"the error log of {service.Service} is not where it is looked for: {service.ErrorLog or 'unknown'}",
            remedy=f"let the server's parameter -e name {ntpath.join(service.Folder, _LOG)} (SQL Server Configuration Manager)",
        )
    return Instance(
        engine=ENGINE,
        name=service.Service,
        data_directory=service.Folder,
        programs=ntpath.join(service.Folder, "Binn"),
        user=service.Account,
        version=service.Version,
    )


def _server(instance: Instance) -> Parameters:
    suffix = "" if instance.name == _DEFAULT_INSTANCE else "\\" + instance.name.removeprefix("MSSQL$")
    return {"Server": f"lpc:.{suffix}", "Service": instance.name}
