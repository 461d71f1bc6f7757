"""A process that is killed with SIGKILL at each of its system calls that change files in turn.

By ptrace(2): PTRACE_TRACEME in the child, PTRACE_SYSCALL in the parent, which stops it before and after each call.
Between two such calls nothing changes on disk, so these are all the places where kill -9 makes a difference.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Callable

_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_TRACESYSGOOD, _EXITKILL = 1, 1 << 20
_ENTRY = 1
# open, openat, write, pwrite64, writev, fsync, fdatasync, truncate, ftruncate, rename*, link*, unlink*, mkdir*, chmod*
_CHANGING = {
    "x86_64": {2, 257, 1, 18, 20, 74, 75, 76, 77, 82, 264, 316, 86, 265, 87, 263, 83, 258, 90, 91, 268},
    "aarch64": {56, 64, 68, 66, 82, 83, 45, 46, 38, 276, 37, 35, 34, 52, 53},
}
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long


class _SyscallInfo(ctypes.Structure):
    """The beginning of ``struct ptrace_syscall_info`` (linux/ptrace.h)."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
    )


def killed_before(work: Callable[[], object], *, change: int) -> bool:
    """Do ``work`` in a child and kill it as it begins its ``change``-th call, from 1, that changes files.

    Return whether it was killed; False: it makes fewer. Raises ChildProcessError where the work itself failed.
    """
    child = os.fork()
    if child == 0:
        try:
            _trace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    _trace(_SETOPTIONS, child, data=_EXITKILL | _TRACESYSGOOD)
    changing = _CHANGING.get(platform.machine())
    while change:
        _trace(_SYSCALL, child)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status) != 0:
                raise ChildProcessError("the work failed")
            return False
        info = _SyscallInfo()
        _trace(_GET_SYSCALL_INFO, child, address=ctypes.sizeof(info), data=ctypes.addressof(info))
        if info.op == _ENTRY and (changing is None or info.number in changing):
            change -= 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _trace(request: int, child: int, *, address: int | None = None, data: int | None = None) -> None:
    if _LIBC.ptrace(request, child, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")
