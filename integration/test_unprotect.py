"""Freeing a process whose memory is protected by a userfaultfd that nobody reads, as QEMU's is when a snapshot has failed."""

from __future__ import annotations

import subprocess
import sys

from vmsnap.hypervisors.libvirt import unprotect

# linux/userfaultfd.h, x86-64: protect a page, and write to it.
_WAITER = """
import ctypes, fcntl, mmap, os, struct
libc = ctypes.CDLL(None, use_errno=True)
watch = libc.syscall(323, 0)
assert watch >= 0, os.strerror(ctypes.get_errno())
fcntl.ioctl(watch, 0xC018AA3F, struct.pack("QQQ", 0xAA, 1, 0))
memory = mmap.mmap(-1, 1 << 20)
memory[0] = 1
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(watch, 0xC020AA00, struct.pack("QQQQ", start, 1 << 20, 2, 0))
fcntl.ioctl(watch, 0xC018AA06, struct.pack("QQQ", start, 1 << 20, 1))
print("protected", flush=True)
memory[0] = 2
print("written", flush=True)
# Another watch can be set up only where the first is not on this memory any more, though it is still open.
another = libc.syscall(323, 0)
fcntl.ioctl(another, 0xC018AA3F, struct.pack("QQQ", 0xAA, 1, 0))
input()
fcntl.ioctl(another, 0xC020AA00, struct.pack("QQQQ", start, 1 << 20, 2, 0))
print("watched again", flush=True)
input()
"""


def test_a_process_that_waits_for_nobody_is_let_go_on() -> None:
    with subprocess.Popen([sys.executable, "-c", _WAITER], stdin=-1, stdout=-1, text=True) as waiter:
        assert waiter.stdout is not None
        try:
            assert waiter.stdout.readline() == "protected\n"
            assert unprotect.is_permitted()
            assert unprotect.let_go_on(waiter.pid, seconds=10)
            assert waiter.stdout.readline() == "written\n"
            assert waiter.stdin is not None
            waiter.stdin.write("\n")
            waiter.stdin.flush()
            assert waiter.stdout.readline() == "watched again\n"
            assert unprotect.let_go_on(waiter.pid, seconds=10)
        finally:
            waiter.kill()
    # What is gone is content.
    assert unprotect.let_go_on(waiter.pid, seconds=0)
