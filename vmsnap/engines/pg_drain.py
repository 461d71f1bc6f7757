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
from vmsnap.engines.drain_outcome import report_of
from vmsnap.engines.pg_drain_script import DRAIN_SCRIPT
from vmsnap.engines.pg_session import connection, in_session
from vmsnap.errors import GuestCommandError, PreconditionError
from vmsnap.model.command import Command, CommandResult, Procedure
from vmsnap.model.drain import DrainReport, Instance

PATIENCE = timedelta(seconds=1)
MARGIN = timedelta(seconds=60)
"""What a drain may take beyond its deadline: the server's answer to the stop, and sessions saying goodbye."""


def drain(instance: Instance, *, deadline: timedelta) -> Procedure[DrainReport]:
    """Put the server in its lame duck, wait for work in flight, end the rest. Not to be repeated.

    Raises PreconditionError where no superuser session can be opened or the server is a standby (nothing was stopped),
    GuestCommandError where the session was lost or its answer makes no sense.
    """

    def command(program: str, database: str) -> Command:
        return session(instance, program=program, database=database, deadline=deadline)

    result = yield from in_session(instance, command=command)
    if result.exit_status != 0:
        raise _broken(instance, result=result)
    return report_of(instance, result=result)


def session(instance: Instance, *, program: str, database: str, deadline: timedelta) -> Command:
    """Return the command that opens the session and runs the script in it."""
    return Command(
        argv=(
            *PLAIN_MESSAGES,
            f"VMSNAP_PG_CTL={posixpath.join(instance.programs, 'pg_ctl')}",
            f"VMSNAP_PGDATA={instance.data_directory}",
            program,
            "-XqAtw",
            *("-v", f"deadline_s={deadline.total_seconds():.3f}"),
            *("-v", f"patience_s={PATIENCE.total_seconds():.3f}"),
            *connection(instance, database=database),
            *("-f", "-"),
        ),
        user=instance.user,
        stdin=DRAIN_SCRIPT.encode(),
        timeout=deadline + MARGIN,
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
