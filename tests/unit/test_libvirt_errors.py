"""Errors of libvirt, of programs and of the system leave the driver as vmsnap's own."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import libvirt
import pytest

from vmsnap.errors import (
    DeadlineError,
    DriverError,
    GuestCommandError,
    GuestNotFoundError,
    GuestUnreachableError,
    NoSpaceError,
    PreconditionError,
    ToolError,
    VmsnapError,
)
from vmsnap.hypervisors.libvirt.connection import Connection, translate
from vmsnap.hypervisors.libvirt.tools import run_tool, translated_os


def libvirt_error(code: int, *, text: str = "something") -> libvirt.libvirtError:
    error = libvirt.libvirtError("call failed")
    error.err = (code, 10, text, 2, "", None, None, -1, -1)
    return error


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (libvirt.VIR_ERR_NO_DOMAIN, GuestNotFoundError),
        (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, GuestUnreachableError),
        (libvirt.VIR_ERR_AGENT_UNSYNCED, GuestUnreachableError),
        (112, GuestUnreachableError),
        (113, GuestCommandError),
        (libvirt.VIR_ERR_OPERATION_TIMEOUT, DeadlineError),
        (libvirt.VIR_ERR_INTERNAL_ERROR, DriverError),
    ],
)
def test_translates_libvirts_codes(code: int, kind: type[VmsnapError]) -> None:
    error = translate(libvirt_error(code), doing="do it")
    assert type(error) is kind
    assert error.brief == "libvirt could not do it: something"
    assert error.details is not None
    assert str(code) in error.details


def test_a_full_file_system_is_recognised_by_its_text() -> None:
    full = libvirt_error(libvirt.VIR_ERR_SYSTEM_ERROR, text="cannot write: No space left on device")
    assert type(translate(full, doing="do it")) is NoSpaceError


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.ENOENT, PreconditionError),
        (errno.EROFS, PreconditionError),
        (errno.EACCES, PreconditionError),
        (errno.EIO, DriverError),
    ],
)
def test_translates_the_systems_errors(number: int, kind: type[VmsnapError]) -> None:
    with pytest.raises(kind, match="could not make the file") as caught, translated_os("make the file"):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is kind
    assert isinstance(caught.value.__cause__, OSError)


def test_vmsnaps_own_errors_pass() -> None:
    with pytest.raises(ToolError, match="own"), translated_os("make the file"):
        raise ToolError("own")


@pytest.mark.parametrize(
    ("script", "seconds", "kind", "says"),
    [
        ("import sys; sys.exit('No space left on device')", 30.0, NoSpaceError, "status 1"),
        ("import sys; sys.exit('broken')", 30.0, ToolError, "status 1"),
        ("import time; time.sleep(60)", 0.2, DeadlineError, "did not end"),
    ],
)
def test_translates_the_end_of_programs(script: str, seconds: float, kind: type[VmsnapError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        run_tool((sys.executable, "-c", script), timeout_seconds=seconds)
    assert type(caught.value) is kind


def test_a_missing_program_is_named() -> None:
    with pytest.raises(PreconditionError, match="qemu-img-of-nowhere") as caught:
        run_tool(("qemu-img-of-nowhere",))
    assert caught.value.remedy


def test_programs_speak_english_and_their_output_need_not_be_text() -> None:
    script = "import os, sys; sys.stdout.buffer.write(os.environb[b'LC_ALL'] + b'\\xff')"
    assert run_tool((sys.executable, "-c", script)) == "C\ufffd"


def test_where_no_libvirt_listens_something_is_missing_and_nothing_has_failed(tmp_path: Path) -> None:
    connection = Connection(f"qemu+unix:///system?socket={tmp_path}/gone")
    with pytest.raises(PreconditionError, match="no libvirt answers at") as caught:
        connection.get()
    assert caught.value.exit_code == 3
    assert "libvirt-daemon-system" in (caught.value.remedy or "")
