"""The PostgreSQL servers of a guest as its process list and systemd tell of them: that run, that are to come, that are left."""

from __future__ import annotations

from dataclasses import dataclass

from vmsnap.engines.asking import ask
from vmsnap.errors import GuestCommandError, NotCleanError, PreconditionError
from vmsnap.model.command import Command, Procedure

LIST_PROCESSES = ("ps", "-eo", "pid=,ppid=,state=,user:64=,comm=", "-ww")
# The units of Debian, PGDG and Red Hat. Programs that only bear PostgreSQL's name, as exporters do, have others.
_UNITS = ("postgresql.service", "postgresql@*.service", "postgresql-[0-9]*.service")
LIST_UNITS = ("systemctl", "list-units", "--all", "--full", "--plain", "--no-legend", "--no-pager", *_UNITS)
_ENDED = "Z"
_FIRST = 1
_PROGRAM_NAMES = frozenset({"postgres", "postmaster"})
_COMING = "activating"
_FAILED = "failed"
# pg_ctl waits for postmaster.pid to go; the process itself is there for a moment longer.
_LOOKS = 10
_PATIENCE = 60
_WAIT = Command(argv=("sleep", "1"))


@dataclass(frozen=True, kw_only=True)
class Process:
    """One line of the process list."""

    pid: int
    parent: int
    user: str


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A unit of systemd that runs a server: ``active`` and ``sub`` are its states in systemd's words."""

    name: str
    active: str
    sub: str


def parse_processes(text: str) -> tuple[Process, ...]:
    """Return the postmasters in the output of ``LIST_PROCESSES``: server processes whose parent is not one.

    One that has ended, and whose parent has not taken note (state Z), is none.
    """
    found = {}
    for pid, parent, state, user, name in _rows(text):
        if name.strip() in _PROGRAM_NAMES and state != _ENDED:
            found[int(pid)] = Process(pid=int(pid), parent=int(parent), user=user)
    return tuple(process for process in found.values() if process.parent not in found)


def parse_units(text: str) -> tuple[Unit, ...]:
    """Return the units in the output of ``LIST_UNITS``. Old systemd puts a mark before a unit that failed."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if words and not words[0].endswith(".service"):
            words = words[1:]
        if len(words) >= 4:
            found.append(Unit(name=words[0], active=words[2], sub=words[3]))
    return tuple(found)


def list_postmasters() -> Procedure[tuple[Process, ...]]:
    """Return the postmasters that run in the guest. May be repeated.

    Raises GuestCommandError where the list cannot be had, or is not the whole of it: with hidepid (proc(5)) any account but
    root sees its own processes alone, and a server that is not seen would be neither drained nor judged.
    """
    listed = yield from ask(
        Command(argv=LIST_PROCESSES, user="root"),
        what="cannot list the guest's processes",
        remedy="install procps in the guest, and let commands run there as root",
    )
    if all(int(row[0]) != _FIRST for row in _rows(listed.text)):
        raise GuestCommandError(
            "the list of the guest's processes is not complete: its first process is not in it",
            details=listed.text[:500] or None,
            remedy="let commands run in the guest as root",
        )
    return parse_processes(listed.text)


def refuse_late(*, failed: bool) -> Procedure[None]:
    """Wait a minute for servers that systemd is about to start, so that they are found.

    Raises PreconditionError for one that is not up then; with ``failed``, for one that systemd could not start, too.

    The first would come up after the others were found, the second may have ended in any way. May be repeated. A guest
    without systemd, or one that gives no answer, passes: what comes up later is seen by ``require_none_left``.
    """
    units = yield from _list_units()
    for _ in range(_PATIENCE):
        if all(unit.active != _COMING for unit in units):
            break
        yield from ask(_WAIT, what="cannot wait in the guest")
        units = yield from _list_units()
    for unit in units:
        if unit.active == _COMING:
            raise PreconditionError(
                f"{unit.name} in the guest is {unit.active} ({unit.sub})",
                details="its server would come up after the others were found",
                remedy="try again when it is up; see 'systemctl status' in the guest for one that never is",
            )
        if failed and unit.active == _FAILED:
            raise PreconditionError(
                f"{unit.name} in the guest has failed, and nobody knows how its server ended",
                remedy=f"start it in the guest; where its server runs all the same (started without systemd), or is not "
                f"wanted: systemctl reset-failed {unit.name}; or name the clusters in the policy's [[database.clusters]]",
            )


def require_none_left() -> Procedure[None]:
    """Make sure that no server runs or is about to, once all that were found were stopped. May be repeated.

    Raises NotCleanError for any that does: the power-off would end it, and nobody would judge how. GuestCommandError as
    ``list_postmasters``.
    """
    left = yield from list_postmasters()
    for _ in range(_LOOKS):
        if not left:
            break
        yield from ask(_WAIT, what="cannot wait in the guest")
        left = yield from list_postmasters()
    if left:
        raise NotCleanError(
            f"PostgreSQL runs in the clone with process id {left[0].pid} (as {left[0].user}), after every server that was "
            "found had been stopped",
            remedy="a server came up while the others were drained, or something started one again: stop what does with "
            "the policy's database.before_drain, or back up when all servers of the guest are up",
        )
    for unit in (yield from _list_units()):
        if unit.active == _COMING:
            raise NotCleanError(
                f"{unit.name} in the clone is {unit.active} ({unit.sub}), after every server that was found had been stopped",
                remedy="stop what starts it with the policy's database.before_drain, or back up when it is up",
            )


def _list_units() -> Procedure[tuple[Unit, ...]]:
    result = yield Command(argv=LIST_UNITS, user="root")
    return parse_units(result.text) if result.exit_status == 0 else ()


def _rows(text: str) -> tuple[list[str], ...]:
    rows = (line.split(maxsplit=4) for line in text.splitlines())
    return tuple(row for row in rows if len(row) == 5 and row[0].isdecimal() and row[1].isdecimal())
