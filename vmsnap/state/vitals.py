"""Signs of life of runs, from what the processes of this host have open (``/proc/PID/fd``, proc_pid_fd(5)).

A run keeps its journal open, and a backup its guest's lock and its place for a clone, from beginning to end, whichever
state directory they are in, and even where that was removed meanwhile. A journal that its own run began is shown by the
name of its draft, so it is asked whose it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from vmsnap.model.ids import RunId, folder_name
from vmsnap.state.events import History

_DELETED = " (deleted)"
_LOCK = re.compile(r"(guest-.+|reconcile|schedule|daemon|alarms)\.lock\Z")
_JOURNAL = re.compile(r"([0-9a-f]{10}\.jsonl|\.draft-[0-9a-f]+)\Z")
_LONGEST_COMMAND = 120
_ENOUGH_BYTES = 1 << 16


class ProcessVitals:
    """The port ``Vitals`` over a ``/proc``. ``own``: the number of a process that does not count, None: the present one."""

    def __init__(self, *, proc: Path = Path("/proc"), own: int | None = None) -> None:
        self._proc = proc
        self._own = own

    def signs(self, run: RunId, *, guest: str) -> tuple[str, ...]:
        """Return what shows that a run may be alive."""
        found: list[str] = []
        states: dict[Path, str] = {}
        blind = 0
        for pid in self._others():
            try:
                opened = self._open_files(pid)
            except PermissionError:
                blind += 1
                continue
            for descriptor, path in opened:
                what = _telling(descriptor, path=path, run=run, guest=guest)
                if what is not None:
                    found.append(f"process {pid} ({self._command(pid)}) has {what} open: {path}")
                elif _is_of_state(path):
                    states.setdefault(path.parent.parent, pid)
        for state, pid in states.items():
            if self._knows(pid, state=state, run=run):
                found.append(
                    f"run {run} is in the journals of the state directory {state}, which process {pid} "
                    f"({self._command(pid)}) uses: it is that one's to undo"
                )
        if blind:
            found.append(f"{blind} processes of this host cannot be looked into; run it as root, outside a container")
        return tuple(dict.fromkeys(found))

    def _others(self) -> Iterator[str]:
        own = str(os.getpid() if self._own is None else self._own)
        names = sorted(entry.name for entry in self._proc.iterdir())
        return (name for name in names if name.isdecimal() and name != own)

    def _open_files(self, pid: str) -> list[tuple[Path, Path]]:
        """Return what a process has open, and by which name; nothing where it is gone. Raises PermissionError."""
        found: list[tuple[Path, Path]] = []
        try:
            for descriptor in (self._proc / pid / "fd").iterdir():
                try:
                    target = str(descriptor.readlink())
                except FileNotFoundError:
                    continue  # closed meanwhile
                if target.startswith("/"):
                    found.append((descriptor, Path(target.removesuffix(_DELETED))))
        except (FileNotFoundError, ProcessLookupError):
            return found
        return found

    def _knows(self, pid: str, *, state: Path, run: RunId) -> bool:
        """Tell whether a state directory, seen as a process sees it, has a journal of the run."""
        try:
            return (self._proc / pid / "root" / str(state).lstrip("/") / "runs" / f"{run}.jsonl").exists()
        except OSError:
            return False

    def _command(self, pid: str) -> str:
        """Return the command line of a process, for messages."""
        try:
            words = (self._proc / pid / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            return "gone meanwhile"
        return " ".join(word for word in words if word)[:_LONGEST_COMMAND] or "?"


def _telling(descriptor: Path, *, path: Path, run: RunId, guest: str) -> str | None:
    """Return what an open file is of the run or of its guest; None where it is nothing of theirs."""
    kind, name = path.parent.name, path.name
    if kind == "runs" and (name == f"{run}.jsonl" or (_JOURNAL.match(name) and _is_journal_of(descriptor, run))):
        return f"the journal of run {run}"
    if kind == "admissions" and name == f"{run}.json":
        return f"the place of the clone of run {run}"
    if kind == "locks" and guest and name == f"guest-{folder_name(guest)}.lock":
        return f"the lock of guest {guest!r}"
    return None


def _is_journal_of(descriptor: Path, run: RunId) -> bool:
    try:
        opened = os.open(descriptor, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            first, newline, _ = os.pread(opened, _ENOUGH_BYTES, 0).partition(b"\n")
        finally:
            os.close(opened)
    except OSError:
        return False  # closed meanwhile, or no file
    history = History.read(first + newline, source="an open journal")
    return history is not None and history.record(alive=True).run == run


def _is_of_state(path: Path) -> bool:
    """Tell whether a file looks like one of a state directory."""
    patterns = {"locks": _LOCK, "runs": _JOURNAL}
    pattern = patterns.get(path.parent.name)
    return pattern is not None and pattern.match(path.name) is not None
