"""Stopping a drained PostgreSQL server in order, and asking its own tools whether it did."""

from __future__ import annotations

import math
import posixpath
from datetime import timedelta

from vmsnap.engines.asking import PLAIN_MESSAGES, last_words
from vmsnap.engines.pg_control import ClusterState
from vmsnap.engines.pg_controldata import control_data
from vmsnap.engines.pg_discovery import read_lock_file
from vmsnap.errors import DeadlineError, GuestCommandError, NotCleanError
from vmsnap.model.command import Command, Procedure
from vmsnap.model.drain import Instance, InstanceEvidence

_MARGIN = timedelta(seconds=30)


def stop(instance: Instance, *, deadline: timedelta) -> Procedure[None]:
    """Stop the server by ``pg_ctl stop -m fast``, never ``immediate``. May be repeated; stopped already is fine.

    Raises DeadlineError where it still runs after the deadline, NotCleanError where something started it again.
    """
    before = yield from read_lock_file(instance.data_directory, user=instance.user)
    if before is None:
        return
    seconds = max(1, math.ceil(deadline.total_seconds()))
    command = Command(
        argv=(
            *PLAIN_MESSAGES,
            posixpath.join(instance.programs, "pg_ctl"),
            *("stop", "-D", instance.data_directory, "-m", "fast", "-w", "-t", str(seconds)),
        ),
        user=instance.user,
        timeout=timedelta(seconds=seconds) + _MARGIN,
    )
    result = yield command
    after = yield from read_lock_file(instance.data_directory, user=instance.user)
    if after is None:
        return
    if after.pid != before.pid:
        raise _started_again(instance)
    if result.exit_status == 0:
        raise NotCleanError(
            f"pg_ctl says that {instance.name} stopped, but its postmaster.pid is still there",
            details=last_words(result),
        )
    if "does not shut down" in result.error_text + result.text:
        raise DeadlineError(
            f"the PostgreSQL server {instance.name} did not stop within {seconds} s",
            details=last_words(result),
            remedy="its log in the guest tells what it waited for: a checkpoint (raise database.stop_deadline), or "
            "an archive_command that cannot reach its target in the fence",
        )
    raise GuestCommandError(f"cannot stop the PostgreSQL server {instance.name}", details=last_words(result))


def evidence_in_guest(instance: Instance) -> Procedure[InstanceEvidence]:
    """Read the stopped server's state with ``pg_controldata``. May be repeated.

    Raises NotCleanError where the server runs again, GuestCommandError where the tool fails.
    """
    if (yield from read_lock_file(instance.data_directory, user=instance.user)) is not None:
        raise _started_again(instance)
    said = yield from control_data(instance)
    return InstanceEvidence(
        engine=instance.engine,
        instance=instance.name,
        data_directory=instance.data_directory,
        method="in-guest",
        clean=said.state == ClusterState.SHUT_DOWN.text and not said.doubtful,
        observed=said.observed,
    )


def _started_again(instance: Instance) -> NotCleanError:
    return NotCleanError(
        f"something started the PostgreSQL server {instance.name} again after it was stopped",
        remedy="stop what does (Patroni, repmgrd, pg_auto_failover, a watchdog) first, with the policy's "
        "database.before_drain",
    )
