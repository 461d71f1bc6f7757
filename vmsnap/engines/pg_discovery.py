"""Finding the PostgreSQL servers that run in a guest.

A postmaster works in its data directory (``ChangeToDataDir`` in PostgreSQL's ``main``), so ``/proc/PID/cwd`` is the
data directory and ``/proc/PID/exe`` the program, wherever Debian, Red Hat, PGDG or an operator put them and whatever
the command line says. The lock file ``postmaster.pid`` there confirms it; its lines are described in PostgreSQL's
``src/include/utils/pidfile.h``.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmsnap.engines.asking import ask, last_words
from vmsnap.engines.pg_control import ClusterState
from vmsnap.engines.pg_controldata import control_data
from vmsnap.engines.pg_processes import Process, list_postmasters, refuse_late
from vmsnap.errors import GuestCommandError, PreconditionError
from vmsnap.model.command import Command, Procedure
from vmsnap.model.drain import Instance
from vmsnap.model.policy import ClusterPolicy

ENGINE = "postgresql"
_DELETED = " (deleted)"
_POLICY_KEYS = (
    "or name it in the policy: [[database.clusters]] with data_directory, programs, user, port and socket_directory"
)


@dataclass(frozen=True, kw_only=True)
class LockFile:
    """What ``postmaster.pid`` says. ``status`` is empty before PostgreSQL 10 and while a server starts."""

    pid: int
    data_directory: str
    port: int
    socket_directory: str | None
    listen_address: str | None
    status: str


def parse_lock_file(text: str) -> LockFile:
    """Return what ``postmaster.pid`` says. Raises GuestCommandError for a file that is not one."""
    lines = [line.strip() for line in text.split("\n")]
    lines += [""] * (8 - len(lines))
    pid, data_directory, _started, port, socket_directory, listen_address, _memory, status = lines[:8]
    if not re.fullmatch(r"[0-9]{1,10}", pid) or not re.fullmatch(r"[0-9]{1,5}", port) or not data_directory:
        raise GuestCommandError("postmaster.pid makes no sense", details=text[:500])
    return LockFile(
        pid=int(pid),
        data_directory=data_directory,
        port=int(port),
        socket_directory=socket_directory or None,
        listen_address=listen_address or None,
        status=status,
    )


def discover_running() -> Procedure[tuple[Instance, ...]]:
    """Find every server that runs in the guest.

    Raises PreconditionError where there is none, where one is a standby or not yet up, or runs in a container.
    """
    yield from refuse_late(failed=True)
    instances = []
    for process in (yield from list_postmasters()):
        instance = yield from _inspect(process)
        if instance is not None:
            instances.append(instance)
    if not instances:
        raise PreconditionError(
            "no PostgreSQL server runs in the guest",
            details="looked for processes named postgres or postmaster",
            remedy=f"start the server in the guest, {_POLICY_KEYS}",
        )
    return _with_different_names(instances)


def discover_given(clusters: Sequence[ClusterPolicy]) -> Procedure[tuple[Instance, ...]]:
    """Look whether the clusters that a policy names run, and no others.

    Raises PreconditionError where one does not, or where another server runs, which nobody would drain or judge.
    """
    yield from refuse_late(failed=False)
    instances = []
    known = set()
    for cluster in clusters:
        lock = yield from read_lock_file(cluster.data_directory, user=cluster.user)
        if lock is None:
            raise PreconditionError(
                f"no PostgreSQL server runs on {cluster.data_directory}",
                details="there is no postmaster.pid in it",
                remedy="start it, or correct data_directory in the policy's [[database.clusters]]",
            )
        known.add(lock.pid)
        instance = yield from _with_version(
            Instance(
                engine=ENGINE,
                name="",
                data_directory=cluster.data_directory,
                programs=cluster.programs,
                user=cluster.user,
                port=cluster.port,
                socket_directory=cluster.socket_directory or _host(lock),
            ),
            lock=lock,
        )
        instances.append(instance)
    others = [process for process in (yield from list_postmasters()) if process.pid not in known]
    if others:
        raise PreconditionError(
            f"PostgreSQL also runs with process id {others[0].pid} (as {others[0].user}), which the policy does not name",
            remedy="name every cluster in [[database.clusters]], or none, or stop the other in the guest",
        )
    return _with_different_names(instances)


def read_lock_file(data_directory: str, *, user: str) -> Procedure[LockFile | None]:
    """Read ``postmaster.pid``; None where there is none: no server runs. Raises GuestCommandError. May be repeated."""
    command = Command(
        # Tells a missing file from a folder that cannot be read.
        argv=("find", data_directory, "-maxdepth", "1", "-name", "postmaster.pid", "-exec", "cat", "--", "{}", "+"),
        user=user,
    )
    result = yield command
    if result.exit_status != 0:
        # A server that ends may take the file away between find and cat.
        result = yield from ask(
            command,
            what=f"cannot read {data_directory} as {user}",
            remedy="correct data_directory and user in the policy's [[database.clusters]]",
        )
    return parse_lock_file(result.text) if result.stdout else None


def _inspect(process: Process) -> Procedure[Instance | None]:
    # Only root may follow these links of another account's process.
    links = yield Command(argv=("readlink", "--", f"/proc/{process.pid}/cwd", f"/proc/{process.pid}/exe"), user="root")
    lines = links.text.splitlines()
    if links.exit_status != 0 or len(lines) != 2:
        alive = yield Command(argv=("test", "-e", f"/proc/{process.pid}"))
        if alive.exit_status != 0:
            return None
        raise PreconditionError(
            f"cannot tell where the PostgreSQL server with process id {process.pid} lives",
            details=last_words(links),
            remedy=f"let commands run in the guest as root, {_POLICY_KEYS}",
        )
    data_directory, program = lines
    try:
        lock = yield from read_lock_file(data_directory, user="root")
    except GuestCommandError:
        lock = None
    if lock is None or lock.pid != process.pid:
        raise PreconditionError(
            f"the process {process.pid} ({program}) is a PostgreSQL server, but {data_directory}/postmaster.pid does "
            "not name it: it runs in a container, or is left over from a server that was killed",
            remedy="run the server in the guest itself (containers are not handled), or end the process",
        )
    return (
        yield from _with_version(
            Instance(
                engine=ENGINE,
                name="",
                data_directory=data_directory,
                programs=posixpath.dirname(program.removesuffix(_DELETED)),
                user=process.user,
                port=lock.port,
                socket_directory=_host(lock),
            ),
            lock=lock,
        )
    )


def _with_version(instance: Instance, *, lock: LockFile) -> Procedure[Instance]:
    said = yield from control_data(instance)
    _refuse_unready(instance, status=lock.status, state=said.state)
    path = posixpath.join(instance.data_directory, "PG_VERSION")
    version = yield from ask(
        Command(argv=("cat", "--", path), user=instance.user), what=f"{instance.data_directory} is no data directory"
    )
    name = f"{posixpath.basename(instance.data_directory.rstrip('/'))}:{instance.port}"
    return replace(instance, name=name, version=version.text.strip())


def _refuse_unready(instance: Instance, *, status: str, state: str) -> None:
    where = f"the PostgreSQL server on {instance.data_directory}"
    # The lock file says 'standby' of a standby that takes no sessions only.
    if status == "standby" or state == ClusterState.IN_ARCHIVE_RECOVERY.text:
        raise PreconditionError(
            f"{where} is a standby: stopped, it is 'shut down in recovery', and such a copy needs recovery to start",
            remedy="back up the primary server's guest instead",
        )
    if status in {"starting", "stopping"} or state == ClusterState.IN_CRASH_RECOVERY.text:
        raise PreconditionError(f"{where} is {status or state}", remedy="try again when it is up")


def _host(lock: LockFile) -> str | None:
    """Return what psql's ``-h`` takes: the socket's folder, or an address where the server has no socket."""
    if lock.socket_directory is not None or lock.listen_address is None:
        return lock.socket_directory
    return {"*": "localhost", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(lock.listen_address, lock.listen_address)  # noqa: S104


def _with_different_names(instances: Sequence[Instance]) -> tuple[Instance, ...]:
    count = Counter(instance.name for instance in instances)
    return tuple(
        instance if count[instance.name] == 1 else replace(instance, name=f"{instance.data_directory}:{instance.port}")
        for instance in instances
    )
