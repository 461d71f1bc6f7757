"""Named network namespaces, the way iproute2 keeps them: a file in /run/netns with the namespace mounted on it.

Python 3.11 has no ``os.setns``, so the C library is called. A namespace belongs to a thread; everything that
has to happen inside one runs in a thread made for it, and no other thread ever changes its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from vmsnap.errors import DriverError, PreconditionError

T = TypeVar("T")

FOLDER = Path("/run/netns")
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_MS_BIND = 0x1000  # linux/mount.h
_MS_REC = 0x4000
_MS_SHARED = 1 << 20
_MNT_DETACH = 2  # sys/mount.h

_libc = ctypes.CDLL(None, use_errno=True)


def create(name: str) -> None:
    """Make a namespace and give it a name. Raises PreconditionError without the right or where the name is taken."""
    path = FOLDER / name
    try:
        _prepare_folder()
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o444))
    except FileExistsError as exc:
        raise PreconditionError(
            f"a network namespace named {name} exists already", remedy="run 'vmsnap reconcile'"
        ) from exc
    except OSError as exc:
        raise PreconditionError(f"cannot make {path}: {exc}", remedy="vmsnap has to run as root") from exc

    def unshare_and_mount() -> None:
        _call("unshare", _libc.unshare(_CLONE_NEWNET))
        _mount("/proc/thread-self/ns/net", path, flags=_MS_BIND)

    try:
        _Worker(unshare_and_mount).result()
    except OSError as exc:
        path.unlink(missing_ok=True)
        raise PreconditionError(
            f"cannot make the network namespace {name}: {exc}", remedy="vmsnap has to run as root (CAP_SYS_ADMIN)"
        ) from exc


def _prepare_folder() -> None:
    """Make the folder a shared mount of its own, as iproute2 does.

    Left to iproute2, it would later mount the folder over itself and keep our names busy underneath.
    """
    FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        _mount("", FOLDER, flags=_MS_SHARED | _MS_REC)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        _mount(str(FOLDER), FOLDER, flags=_MS_BIND | _MS_REC)
        _mount("", FOLDER, flags=_MS_SHARED | _MS_REC)


def remove(name: str) -> None:
    """Take the name away, whatever state it is in; a process inside keeps the nameless namespace until it ends.

    May be repeated. Raises DriverError.
    """
    path = FOLDER / name
    try:
        while _is_unmounted(path):
            pass
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise DriverError(f"cannot remove the network namespace {name}: {exc}", remedy=f"umount {path}") from exc


def _is_unmounted(path: Path) -> bool:
    """Take one mount off ``path``; return whether there was one."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOENT}:
        return False
    raise OSError(code, os.strerror(code), str(path))


def names(prefix: str) -> tuple[str, ...]:
    """Return the names that exist and begin with ``prefix``."""
    if not FOLDER.is_dir():
        return ()
    return tuple(sorted(path.name for path in FOLDER.iterdir() if path.name.startswith(prefix)))


def is_another(name: str) -> bool:
    """Tell whether the namespace of that name is a namespace, and not the one this process is in."""
    try:
        there = (FOLDER / name).stat()
        here = Path("/proc/thread-self/ns/net").stat()
    except OSError:
        return False
    return there.st_dev == here.st_dev and there.st_ino != here.st_ino


def enter(name: str) -> None:
    """Move the calling thread into a namespace for good. Only for threads made for it. Raises DriverError."""
    try:
        descriptor = os.open(FOLDER / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call("setns", _libc.setns(descriptor, _CLONE_NEWNET))
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise DriverError(
            f"cannot enter the network namespace {name}: {exc}",
            remedy="the clone's fence is gone, or vmsnap does not run as root",
        ) from exc


def inside(name: str, *, action: Callable[[], T]) -> T:
    """Run ``action`` in a thread inside the namespace; return what it returns, raise what it raises.

    Raises DriverError where the namespace cannot be entered.
    """

    def act() -> T:
        enter(name)
        return action()

    return _Worker(act).result()


class _Worker(Generic[T]):
    """One thread for one action."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._action = action
        self._results: list[T] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vmsnap-netns", daemon=True)

    def _run(self) -> None:
        try:
            self._results.append(self._action())
        except BaseException as exc:  # noqa: BLE001 - handed to the thread that waits
            self._failure = exc

    def result(self) -> T:
        self._thread.start()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._results[0]


def _call(what: str, result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _mount(source: str, target: Path, *, flags: int) -> None:
    result = _libc.mount(source.encode(), os.fsencode(target), b"none", ctypes.c_ulong(flags), None)
    _call(f"mount {target}", result)
