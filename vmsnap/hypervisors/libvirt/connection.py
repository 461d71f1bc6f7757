"""The connection to libvirtd: opened when needed, opened again after libvirtd restarted, errors translated.

libvirt delivers events only where a thread runs its event loop; one daemon thread does so for the process.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import libvirt

from vmsnap.errors import (
    DeadlineError,
    DriverError,
    GuestCommandError,
    GuestNotFoundError,
    GuestUnreachableError,
    NoSpaceError,
    PreconditionError,
    VmsnapError,
)

_LOG = logging.getLogger(__name__)
_KEEPALIVE_SECONDS = 5
_KEEPALIVE_MISSES = 6
_OPEN_REMEDY = "is libvirtd running, and may this user use it? try 'virsh -c URI list' with the same URI"
_NOBODY_LISTENS = frozenset({errno.ENOENT, errno.ECONNREFUSED})
_loop_lock = threading.Lock()
_loop_running = threading.Event()

# Newer than the libvirt that the binding may have been built against.
AGENT_COMMAND_TIMEOUT = 112
AGENT_COMMAND_FAILED = 113

# Values of virErrorNumber (libvirt/virterror.h) and the error an operator sees for them.
_BY_CODE: dict[int, type[VmsnapError]] = {
    libvirt.VIR_ERR_NO_DOMAIN: GuestNotFoundError,
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: GuestUnreachableError,
    libvirt.VIR_ERR_AGENT_UNSYNCED: GuestUnreachableError,
    AGENT_COMMAND_TIMEOUT: GuestUnreachableError,
    AGENT_COMMAND_FAILED: GuestCommandError,
    libvirt.VIR_ERR_OPERATION_TIMEOUT: DeadlineError,
}


def translate(error: libvirt.libvirtError, *, doing: str, remedy: str | None = None) -> VmsnapError:
    """Return the vmsnap error for a libvirt error; ``doing`` completes 'libvirt could not ...'."""
    text = error.get_error_message() or str(error)
    kind = _BY_CODE.get(error.get_error_code(), DriverError)
    if kind is DriverError and "No space left on device" in text:
        kind = NoSpaceError
    return kind(
        f"libvirt could not {doing}: {text}", details=f"libvirt error code {error.get_error_code()}", remedy=remedy
    )


@contextmanager
def translated(doing: str, *, remedy: str | None = None) -> Iterator[None]:
    """Turn libvirt's errors in the block into vmsnap's."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise translate(error, doing=doing, remedy=remedy) from error


def _ignore_errors(_context: object, _error: object) -> None:
    """Keep quiet: libvirt would print every error to stderr; they are raised as well, so nothing is lost."""


def _start_event_loop() -> None:
    with _loop_lock:
        if _loop_running.is_set():
            return
        libvirt.registerErrorHandler(_ignore_errors, None)
        libvirt.virEventRegisterDefaultImpl()

        def run() -> None:
            while True:
                try:
                    libvirt.virEventRunDefaultImpl()
                except libvirt.libvirtError as error:
                    _LOG.debug("libvirt's event loop: %s", error)

        threading.Thread(target=run, name="libvirt-events", daemon=True).start()
        # Without any timer the loop would sleep for ever and not see handles that are added later.
        libvirt.virEventAddTimeout(200, lambda _timer, _opaque: None, None)
        _loop_running.set()


class Connection:
    """One libvirt URI. Methods may be called from several threads."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._lock = threading.Lock()
        self._connection: Any = None

    def get(self) -> Any:
        """Return a live virConnect. Raises PreconditionError where no libvirtd listens, DriverError where it fails."""
        with self._lock:
            if self._connection is not None and self._is_alive():
                return self._connection
            _start_event_loop()
            with translated(f"open {self.uri}", remedy=_OPEN_REMEDY):
                self._connection = self._open()
                self._connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_MISSES)
            return self._connection

    def _open(self) -> Any:
        try:
            return libvirt.open(self.uri)
        except libvirt.libvirtError as error:
            # The first integer is errno, of the socket in this case.
            if error.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR and error.get_int1() in _NOBODY_LISTENS:
                raise PreconditionError(
                    f"no libvirt answers at {self.uri}: {error.get_error_message()}",
                    remedy="install and start it (apt install libvirt-daemon-system qemu-system-x86), "
                    "or name another [libvirt] uri",
                ) from error
            raise

    def _is_alive(self) -> bool:
        try:
            # The first says what is known here; the second asks libvirtd, which may have died a moment ago.
            return bool(self._connection.isAlive()) and bool(self._connection.getLibVersion())
        except libvirt.libvirtError:
            return False

    def domain(self, name: str) -> Any:
        """Return the virDomain of that name. Raises GuestNotFoundError with the names there are."""
        connection = self.get()
        try:
            return connection.lookupByName(name)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise translate(error, doing=f"look up the guest {name!r}") from error
            names = self.names()
            meant = get_close_matches(name, names, n=1)
            hint = f"did you mean {meant[0]!r}? " if meant else ""
            raise GuestNotFoundError(
                f"there is no guest {name!r} on {self.uri}",
                details=f"guests there: {', '.join(sorted(map(repr, names))) or 'none'}",
                remedy=f"{hint}check the name with 'virsh list --all'; names are case-sensitive",
            ) from error

    def find_domain(self, name: str) -> Any | None:
        """Return the virDomain of that name, or None."""
        try:
            return self.domain(name)
        except GuestNotFoundError:
            return None

    def find_by_uuid(self, uuid: str) -> Any | None:
        """Return the virDomain of that UUID, whatever it is called by now, or None."""
        try:
            return self.get().lookupByUUIDString(uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise translate(error, doing=f"look up the guest with UUID {uuid}") from error

    def names(self) -> tuple[str, ...]:
        """Return the names of all domains."""
        with translated("list its guests"):
            return tuple(domain.name() for domain in self.get().listAllDomains(0))

    def close(self) -> None:
        """Close the connection. May be repeated."""
        with self._lock:
            if self._connection is not None:
                try:
                    self._connection.close()
                except libvirt.libvirtError as error:
                    _LOG.debug("closing %s: %s", self.uri, error)
                self._connection = None


def gone(call: Callable[[], object], *, codes: tuple[int, ...]) -> bool:
    """Call; return True where libvirt refused with one of ``codes`` because there is nothing to do, else False."""
    try:
        call()
    except libvirt.libvirtError as error:
        if error.get_error_code() in codes:
            return True
        raise
    return False
