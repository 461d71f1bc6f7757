"""Lame duck and drain of a PostgreSQL server.

Both happen in one psql session that is opened *before* the smart stop, because a smart stop refuses new sessions, those
of the superuser too. The rules, kept by ``pg_drain_script``:

- Work in flight is a session of a client with an open transaction, or executing, at the moment in which the server has
  begun to refuse sessions. Background workers are not counted.
- What is idle, or begins a new transaction or statement afterwards, is new work and is ended.
- A session whose client is elsewhere and that has waited for it for one second is ended: in the fence its client can
  never answer. A client on the guest itself (socket or loopback) may go on until the deadline.
- A commit that waits for a synchronous standby has happened in this server: it counts as finished.
- WAL senders are ended at once. Prepared transactions stay in the image; their number is logged.
- At the deadline the rest is ended. ``rolled_back`` counts work that was cut off or whose client went away in the
  middle; the commit log decides where a transaction had written. Everything else is ``finished``.

Where no session can be opened the drain refuses before anything was stopped: without one, nobody could count the work,
and invented numbers are worse than none.
"""

from __future__ import annotations

import posixpath
from datetime import timedelta

from vmsnap.engines.asking import PLAIN_MESSAGES, last_words
from vmsnap.engines.drain_outcome import OPENED, report_of
from vmsnap.engines.pg_drain_script import DRAIN_SCRIPT
from vmsnap.errors import GuestCommandError, PreconditionError
from vmsnap.model.command import Command, CommandResult, Procedure
from vmsnap.model.drain import DrainReport, Instance

PATIENCE = timedelta(seconds=1)
MARGIN = timedelta(seconds=60)
"""What a drain may take beyond its deadline: the server's answer to the stop, and sessions saying goodbye."""

_DATABASES = ("postgres", "template1")
_NO_SUCH_PROGRAM = 127
_NO_CONNECTION = 2


def drain(instance: Instance, *, deadline: timedelta) -> Procedure[DrainReport]:
    """Put the server in its lame duck, wait for work in flight, end the rest. Not to be repeated.

    Raises PreconditionError where no superuser session can be opened or the server is a standby (nothing was stopped),
    GuestCommandError where the session was lost or its answer makes no sense.
    """
    result = yield from _open_and_drain(instance, deadline=deadline)
    if result.exit_status != 0:
        raise _broken(instance, result=result)
    return report_of(instance, result=result)


def session(instance: Instance, *, program: str, database: str, deadline: timedelta) -> Command:
    """Return the command that opens the session and runs the script in it."""
    where = ["-d", database]
    if instance.socket_directory is not None:
        where += ["-h", instance.socket_directory]
    if instance.port is not None:
        where += ["-p", str(instance.port)]
    return Command(
        argv=(
            *PLAIN_MESSAGES,
            f"VMSNAP_PG_CTL={posixpath.join(instance.programs, 'pg_ctl')}",
            f"VMSNAP_PGDATA={instance.data_directory}",
            program,
            "-XqAtw",
            *("-v", f"deadline_s={deadline.total_seconds():.3f}"),
            *("-v", f"patience_s={PATIENCE.total_seconds():.3f}"),
            *where,
            *("-f", "-"),
        ),
        user=instance.user,
        stdin=DRAIN_SCRIPT.encode(),
        timeout=deadline + MARGIN,
    )


def _open_and_drain(instance: Instance, *, deadline: timedelta) -> Procedure[CommandResult]:
    program = posixpath.join(instance.programs, "psql")
    failures = []
    for database in _DATABASES:
        result = yield session(instance, program=program, database=database, deadline=deadline)
        if result.exit_status == _NO_SUCH_PROGRAM and program != "psql":
            program = "psql"
            result = yield session(instance, program=program, database=database, deadline=deadline)
        if OPENED in result.text.splitlines():
            return result
        failures.append(f"database {database}: {last_words(result) or f'status {result.exit_status}'}")
        if result.exit_status != _NO_CONNECTION:
            break
    raise PreconditionError(
        f"cannot open a session to the PostgreSQL server {instance.name} as {instance.user}; nothing was stopped",
        details="\n".join(failures),
        remedy=f"let the account {instance.user} of the guest connect locally as a superuser: a line "
        f"'local all {instance.user} peer' first in pg_hba.conf, or a password in its ~/.pgpass; psql must be there",
    )


def _broken(instance: Instance, *, result: CommandResult) -> PreconditionError | GuestCommandError:
    words = last_words(result) or ""
    if "vmsnap: the server is a standby" in words:
        return PreconditionError(
            f"the PostgreSQL server {instance.name} is a standby: such a copy needs recovery to start",
            remedy="back up the primary server's guest instead",
        )
    if "is no superuser" in words:
        return PreconditionError(
            f"{instance.user} is no superuser of the PostgreSQL server {instance.name}",
            details=words,
            remedy="name the account that runs the server as user in the policy's [[database.clusters]]",
        )
    return GuestCommandError(
        f"the drain of {instance.name} broke off (psql ended with status {result.exit_status})",
        details=words or None,
        remedy="if something else stops or restarts the server (a cluster manager, a watchdog), stop that first with "
        "the policy's database.before_drain",
    )
