"""A guest in memory: a control that runs the few programs the engines and the contract suite ask for.

An unknown program is status 127, as in a shell, so a test notices an engine that asks for something new.
"""

from __future__ import annotations

import copy
import json
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from threading import Lock

from vmsnap.engines.asking import PLAIN_MESSAGES
from vmsnap.engines.pg_processes import LIST_UNITS
from vmsnap.errors import DeadlineError, GuestUnreachableError
from vmsnap.model.command import Command, CommandResult, Procedure, T
from vmsnap.ports.guest import GuestControl
from vmsnap.testing.fake_postgresql import FakeCluster
from vmsnap.testing.guest_contract import BOTH_STREAMS_AND_STATUS, BUSY_ON_BOTH_STREAMS, ENDS_BY_SIGNAL

FILE_SYSTEM_UUID = "5f0c7a5e-2f43-4e5c-9d0c-0d6a4b1c9f11"
_LIMIT = 16 << 20
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_LINK = re.compile(r"/proc/([0-9]+)/(cwd|exe)")


def run_procedure(procedure: Procedure[T], control: GuestControl, *, timeout: timedelta = timedelta(minutes=1)) -> T:
    """Drive an engine's procedure over a control, and return its finding."""
    try:
        command = next(procedure)
        while True:
            command = procedure.send(control.run(command, timeout=timeout))
    except StopIteration as stop:
        finding: T = stop.value
        return finding


class FakeGuest:
    """A ``GuestControl`` over a guest with PostgreSQL servers.

    ``answers`` False: it does not answer (it is off, or its agent is dead). ``extra`` maps argument lists to results,
    for a policy's own commands. ``commands`` records everything that was asked for, ``written`` the files
    that were made in ``/run``. ``frozen``: its agent has frozen the file systems, and runs no program until they are thawed.
    """

    def __init__(
        self,
        *,
        clusters: Sequence[FakeCluster] = (),
        extra: Mapping[tuple[str, ...], CommandResult] | None = None,
        boot_id: str = "0b9d2fd2-6d0e-4f0c-8a51-0d2b6c1f3a77",
    ) -> None:
        self.clusters = list(clusters)
        self.extra = dict(extra or {})
        self.boot_id = boot_id
        self.answers = True
        self.boots_for = 0
        self.frozen = False
        self.written: dict[str, bytes] = {}
        self.commands: list[Command] = []
        self._lock = Lock()

    @property
    def method(self) -> str:
        """Return ``agent``."""
        return "agent"

    def ping(self, *, timeout: timedelta) -> None:
        """Return where the guest answers. Raises GuestUnreachableError otherwise."""
        if not self.answers:
            raise GuestUnreachableError("the guest does not answer", details=f"waited {timeout}")

    def run(self, command: Command, *, timeout: timedelta) -> CommandResult:
        """Do what the command would do. See ``GuestControl.run``."""
        self.ping(timeout=timeout)
        with self._lock:
            self.commands.append(command)
            self._boot_on(command)
            result = self._do(command, limit=command.timeout or timeout)
        return CommandResult(
            exit_status=result.exit_status,
            stdout=result.stdout[:_LIMIT],
            stderr=result.stderr[:_LIMIT],
            truncated=max(len(result.stdout), len(result.stderr)) > _LIMIT,
        )

    def _boot_on(self, command: Command) -> None:
        """Come nearer to the end of the boot with each look at what systemd runs."""
        if self.boots_for and command.argv == LIST_UNITS:
            self.boots_for -= 1
            for cluster in self.clusters:
                if not self.boots_for and cluster.status == "starting":
                    cluster.status = "ready"

    def close(self) -> None:
        """Do nothing."""

    def clone(self) -> FakeGuest:
        """Return a guest in the same state whose life goes on apart from this one's."""
        twin = FakeGuest(clusters=copy.deepcopy(self.clusters), extra=self.extra, boot_id=self.boot_id)
        twin.answers = self.answers
        twin.frozen = self.frozen
        twin.written = dict(self.written)
        return twin

    def crashed(self) -> FakeGuest:
        """Return a guest that boots from this one's disks as they are now. Its servers are up after some commands."""
        twin = self.clone()
        twin.boot_id = f"{self.boot_id[:-4]}b007"
        twin.answers = True
        twin.written = {}
        twin.boots_for = 3
        for cluster in twin.clusters:
            cluster.will_finish = cluster.will_hang = 0
            cluster.status = "starting" if cluster.runs else ""
        return twin

    def file(self, path: str) -> bytes | None:
        """Return a file of the guest's only file system; None where there is none. Works on a guest that is off."""
        return self._files().get(path)

    def _files(self) -> dict[str, bytes]:
        found = {_BOOT_ID: f"{self.boot_id}\n".encode(), **self.written}
        for cluster in self.clusters:
            found.update(cluster.files())
        return found

    def _do(self, command: Command, *, limit: timedelta) -> CommandResult:
        argv = command.argv
        if argv in self.extra:
            return self.extra[argv]
        if argv[: len(PLAIN_MESSAGES)] == PLAIN_MESSAGES:
            return self._postgresql(command)
        programs: dict[str, Callable[[], CommandResult]] = {
            "true": lambda: _said(""),
            "false": lambda: CommandResult(exit_status=1),
            "echo": lambda: _said(f"{' '.join(argv[1:])}\n"),
            "printf": lambda: _said(argv[2]),
            "pwd": lambda: _said("/\n"),
            "head": lambda: CommandResult(exit_status=0, stdout=bytes(int(argv[2]))),
            "sleep": lambda: _sleep(argv, limit=limit),
            "sh": lambda: _script(command),
            "cat": lambda: self._cat(argv, stdin=command.stdin),
            "tee": lambda: self._tee(argv, stdin=command.stdin),
            "ps": self._ps,
            "test": lambda: CommandResult(exit_status=0 if self._is_process(argv[2]) else 1),
            "readlink": lambda: self._readlink(argv),
            "find": lambda: self._find(argv),
            "findmnt": _findmnt,
        }
        if argv[0] not in programs:
            return CommandResult(exit_status=127, stderr=f"sh: 1: {argv[0]}: not found\n".encode())
        return programs[argv[0]]()

    def _cat(self, argv: tuple[str, ...], *, stdin: bytes) -> CommandResult:
        if len(argv) == 1:
            return CommandResult(exit_status=0, stdout=stdin)
        content = self._files().get(argv[-1])
        if content is None:
            return CommandResult(exit_status=1, stderr=f"cat: {argv[-1]}: No such file or directory\n".encode())
        return CommandResult(exit_status=0, stdout=content)

    def _tee(self, argv: tuple[str, ...], *, stdin: bytes) -> CommandResult:
        if not argv[1].startswith("/run/"):
            return CommandResult(exit_status=1, stderr=f"tee: {argv[1]}: Permission denied\n".encode())
        self.written[argv[1]] = stdin
        return CommandResult(exit_status=0, stdout=stdin)

    def _ps(self) -> CommandResult:
        lines = [f"{1:>7} {0:>7} S {'root':<64} systemd"]
        for cluster in self.clusters:
            if cluster.runs:
                lines.append(f"{cluster.pid:>7} {1:>7} S {cluster.user:<64} postgres")
                lines.append(f"{cluster.pid + 500:>7} {cluster.pid:>7} S {cluster.user:<64} postgres")
        return _said("\n".join((*lines, "")))

    def _is_process(self, path: str) -> bool:
        return any(cluster.runs and path == f"/proc/{cluster.pid}" for cluster in self.clusters)

    def _readlink(self, argv: tuple[str, ...]) -> CommandResult:
        if "-e" in argv:
            return _said(f"{posixpath.normpath(argv[-1])}\0")
        targets = []
        for path in argv[argv.index("--") + 1 :]:
            link = _LINK.fullmatch(path)
            found = [item for item in self.clusters if link and item.runs and item.pid == int(link[1])]
            for cluster in found:
                target = cluster.data_directory if path.endswith("cwd") else f"{cluster.programs}/postgres"
                targets.append(f"{target}\n")
        return CommandResult(exit_status=0 if targets else 1, stdout="".join(targets).encode())

    def _find(self, argv: tuple[str, ...]) -> CommandResult:
        if "-exec" not in argv:
            return _said("")
        content = self._files().get(posixpath.join(argv[1], "postmaster.pid"))
        known = any(cluster.data_directory == argv[1] for cluster in self.clusters)
        if not known:
            words = f"find: \u2018{argv[1]}\u2019: No such file or directory\n"
            return CommandResult(exit_status=1, stderr=words.encode())
        return CommandResult(exit_status=0, stdout=content or b"")

    def _postgresql(self, command: Command) -> CommandResult:
        words = [word for word in command.argv[len(PLAIN_MESSAGES) :] if not word.startswith("VMSNAP_")]
        for cluster in self.clusters:
            programs: dict[str, Callable[[], CommandResult]] = {
                "pg_ctl": cluster.pg_ctl_stop,
                "pg_controldata": cluster.pg_controldata,
            }
            folder, name = posixpath.split(words[0])
            if folder != cluster.programs:
                continue
            if name == "psql" and _after(words, "-p") == str(cluster.port):
                result = cluster.psql(command)
                for other in self.clusters if cluster.status == "stopping" else ():
                    other.come_up()
                return result
            if name in programs and _after(words, "-D") == cluster.data_directory:
                return programs[name]()
        words_said = f"env: \u2018{words[0]}\u2019: No such file or directory\n"
        return CommandResult(exit_status=127, stderr=words_said.encode())


def _said(text: str) -> CommandResult:
    return CommandResult(exit_status=0, stdout=text.encode())


def _after(words: Sequence[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def _sleep(argv: tuple[str, ...], *, limit: timedelta) -> CommandResult:
    if float(argv[1]) > limit.total_seconds():
        raise DeadlineError(f"sleep did not end in the guest within {limit}", remedy="raise the limit")
    return CommandResult(exit_status=0)


def _script(command: Command) -> CommandResult:
    if command.argv == ENDS_BY_SIGNAL:
        return CommandResult(exit_status=137)
    if command.argv == BOTH_STREAMS_AND_STATUS:
        return CommandResult(exit_status=3, stdout=b"out\n", stderr=b"err\n")
    if command.argv[:-1] == BUSY_ON_BOTH_STREAMS:
        zeroes = bytes(int(command.argv[-1]))
        return CommandResult(exit_status=0, stdout=zeroes + command.stdin, stderr=zeroes)
    return CommandResult(exit_status=127, stderr=b"sh: unknown script\n")


def _findmnt() -> CommandResult:
    mount = {"source": "/dev/vda1", "target": "/", "fstype": "ext4", "uuid": FILE_SYSTEM_UUID, "fsroot": "/"}
    return _said(json.dumps({"filesystems": [mount]}))
