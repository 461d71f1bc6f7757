"""PostgreSQL 10 to 18."""

from __future__ import annotations

import posixpath
from datetime import timedelta

from vmsnap.engines import pg_discovery, pg_drain, pg_processes, pg_recovery, pg_stop
from vmsnap.engines.asking import ask
from vmsnap.engines.guest_paths import locate_files, locate_folder
from vmsnap.engines.pg_control import ClusterState, ControlFileError, parse_control_file
from vmsnap.model.command import Command, Procedure
from vmsnap.model.drain import DrainReport, Instance, InstanceEvidence
from vmsnap.model.policy import ClusterPolicy
from vmsnap.ports.engine import GuestPath

_CONTROL_FILE = "global/pg_control"
_VERSION_FILE = "PG_VERSION"
# Folders that initdb makes and an operator may have moved to a file system of their own. Tablespaces are in pg_tblspc.
_FOLDERS = ("base", "pg_wal", "pg_xact")
_TABLESPACES = "pg_tblspc"
_MUST_BE_MISSING = ("postmaster.pid", "backup_label", "standby.signal", "recovery.signal", "recovery.conf")


class PostgreSQL:
    """The engine for PostgreSQL (see ``vmsnap.ports.engine.Engine``).

    With ``clusters`` only those are looked at; without, every server that runs in the guest.
    """

    def __init__(self, *, clusters: tuple[ClusterPolicy, ...] = ()) -> None:
        self._clusters = clusters

    @property
    def name(self) -> str:
        """Return the name used in policies."""
        return pg_discovery.ENGINE

    def discover(self) -> Procedure[tuple[Instance, ...]]:
        """Find the running servers. May be repeated.

        Raises PreconditionError where none runs, or one is a standby or not up.
        """
        if self._clusters:
            return (yield from pg_discovery.discover_given(self._clusters))
        return (yield from pg_discovery.discover_running())

    def require_recoverable(self, instance: Instance) -> Procedure[None]:
        """Refuse a server whose settings make crash recovery a matter of luck. See ``pg_recovery``."""
        yield from pg_recovery.require_recoverable(instance)

    def drain(self, instance: Instance, *, deadline: timedelta) -> Procedure[DrainReport]:
        """Refuse new work, wait for work in flight up to the deadline, end and count the rest. See ``pg_drain``."""
        return (yield from pg_drain.drain(instance, deadline=deadline))

    def stop(self, instance: Instance, *, deadline: timedelta) -> Procedure[None]:
        """Stop the server in order. See ``pg_stop.stop``."""
        yield from pg_stop.stop(instance, deadline=deadline)

    def require_all_stopped(self) -> Procedure[None]:
        """Make sure that no server is left, or about to start. See ``pg_processes.require_none_left``."""
        yield from pg_processes.require_none_left()

    def evidence_in_guest(self, instance: Instance) -> Procedure[InstanceEvidence]:
        """Ask ``pg_controldata`` in the guest. See ``pg_stop.evidence_in_guest``."""
        return (yield from pg_stop.evidence_in_guest(instance))

    def evidence_paths(self, instance: Instance) -> tuple[str, ...]:
        """Return the files that prove a shutdown, and those whose presence would forbid a start without recovery."""
        names = (_CONTROL_FILE, _VERSION_FILE, *_MUST_BE_MISSING)
        return tuple(posixpath.join(instance.data_directory, name) for name in names)

    def judge(self, instance: Instance, *, files: tuple[bytes | None, ...]) -> InstanceEvidence:
        """Judge the evidence: an intact control file in state ``shut down``, and no file that asks for recovery.

        Never raises for what the files hold: damaged files are evidence that is not clean.
        """
        control, version, *rest = files
        observed = []
        clean = True
        if control is None:
            clean = False
            observed.append((_CONTROL_FILE, "missing"))
        else:
            try:
                said = parse_control_file(control)
            except ControlFileError as error:
                clean = False
                observed.append((_CONTROL_FILE, str(error)))
            else:
                clean = said.state is ClusterState.SHUT_DOWN
                observed += [
                    ("state", said.state.text),
                    ("system identifier", str(said.system_identifier)),
                    ("checkpoint", said.checkpoint),
                    ("control file version", str(said.control_version)),
                ]
        clean = clean and version is not None
        observed.append((_VERSION_FILE, "missing" if version is None else version.decode("ascii", "replace").strip()))
        for name, content in zip(_MUST_BE_MISSING, rest[: len(_MUST_BE_MISSING)], strict=True):
            clean = clean and content is None
            observed.append((name, "missing" if content is None else "present"))
        return InstanceEvidence(
            engine=instance.engine,
            instance=instance.name,
            data_directory=instance.data_directory,
            method="disk",
            clean=clean,
            observed=tuple(observed),
        )

    def locate(self, instance: Instance) -> Procedure[tuple[GuestPath, ...]]:
        """Find the file systems of ``evidence_paths``, in their order. See ``guest_paths.locate_files``.

        Refuses a folder of the cluster that is on no disk of the guest, whether by a link or by a mount of its own: it would be
        missing in the snapshot. After the evidence comes one path in each of these folders, so that the reader finds their
        file systems on the disks that were captured, or fails.
        """
        tablespaces = yield from ask(
            Command(
                argv=(
                    *("find", posixpath.join(instance.data_directory, _TABLESPACES)),
                    *("-mindepth", "1", "-maxdepth", "1", "-print0"),
                ),
                user=instance.user,
            ),
            what=f"cannot list the tablespaces of {instance.name}",
        )
        folders = [posixpath.join(instance.data_directory, name) for name in _FOLDERS]
        folders += tablespaces.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]
        elsewhere = []
        for path in folders:
            folder = yield from locate_folder(path)
            elsewhere.append(folder.file(_VERSION_FILE))
        evidence = yield from locate_files(self.evidence_paths(instance))
        return (*evidence, *elsewhere)
