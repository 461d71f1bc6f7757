"""The pipe that QEMU writes a guest's memory stream to, and the process that passes it on to the clone."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
from datetime import timedelta
from types import TracebackType
from typing import Self

from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt import relay, unprotect
from vmsnap.hypervisors.libvirt.outliving import outliving
from vmsnap.hypervisors.libvirt.tools import translated_os

_READY_SECONDS = 30
_END_SECONDS = relay.LET_GO_SECONDS + 5
_REASONS: dict[int, str] = {
    relay.End.NO_READER: "the clone ended while its memory was loaded",
    relay.End.STALLED: "the clone took nothing of its memory for too long, and the guest would have waited for it",
    relay.End.NO_STREAM: "QEMU's stream does not begin as QEMU's streams do",
}


class RelayedStream:
    """The stream while the block runs; it is cut at the end of the block, and the guest goes on. ``writer_pid`` is its QEMU.

    ``held``: the pipe is full from the beginning, so that QEMU waits before it has written anything, until ``let_flow``.
    """

    def __init__(self, *, sink: int, held: bool, stall: timedelta, writer_pid: int) -> None:
        self._sink = sink
        self._held = held
        self._stall = stall
        self._writer_pid = writer_pid
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: int | None = None

    def __enter__(self) -> Self:
        """Start the process and wait until it is ready. Raises DriverError."""
        with translated_os("start the relay of the memory stream"):
            reader, self._writer = os.pipe()
            try:
                fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, relay.PIPE_BYTES)
                held_bytes = os.write(self._writer, bytes(relay.PIPE_BYTES)) if self._held else 0
                stall_ms = round(self._stall / timedelta(milliseconds=1))
                numbers = (reader, self._sink, held_bytes, stall_ms, self._writer_pid)
                # Without -P the current folder would be searched for modules.
                argv = (sys.executable, "-P", "-m", relay.__name__, *map(str, numbers))
                self._process = subprocess.Popen(
                    outliving(argv, what="relay of a memory stream"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=(reader, self._sink),
                    # Ctrl-Z in a terminal stops vmsnap; it must not stop this, and with it the guest.
                    start_new_session=True,
                )
            finally:
                os.close(reader)
        if self._answer() != relay.READY:
            self.cut()
            raise DriverError("the relay of the memory stream did not start", remedy="see the messages above")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()

    @property
    def writer(self) -> int:
        """Return the end that QEMU is to be given."""
        assert self._writer is not None  # noqa: S101 - only in the block
        return self._writer

    def close_writer(self) -> None:
        """Close the end that QEMU was given, so that the stream ends when QEMU closes its own."""
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None

    def let_flow(self) -> None:
        """Let the stream flow. Raises DriverError where the relay is gone."""
        assert self._process is not None  # noqa: S101
        assert self._process.stdin is not None  # noqa: S101
        try:
            os.write(self._process.stdin.fileno(), relay.OPEN)
        except BrokenPipeError as error:
            raise DriverError("the relay of the memory stream ended before the guest was stopped") from error

    def failure(self) -> DriverError | None:
        """Return why the relay gave up; None while it works, and after it did."""
        status = None if self._process is None else self._process.poll()
        if status is None or status == relay.End.SOURCE_ENDED:
            return None
        return DriverError(
            _REASONS.get(status, f"the relay of the memory stream ended with status {status}"),
            remedy="start the backup again when the host is less busy",
        )

    def require_ended(self, *, timeout_seconds: float) -> None:
        """Wait until all that QEMU wrote is with the clone. Raises DriverError where it is not."""
        assert self._process is not None  # noqa: S101
        try:
            self._process.wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise DriverError(f"the memory stream did not end within {timeout_seconds:.0f} s of QEMU's word") from error
        failure = self.failure()
        if failure is not None:
            raise failure

    def cut(self) -> None:
        """End the relay, whatever it is doing; QEMU's next write fails, and the guest waits for nobody. May be repeated."""
        self.close_writer()
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode != relay.End.SOURCE_ENDED:
            # The relay has done so, unless somebody killed it.
            unprotect.let_go_on(self._writer_pid, seconds=relay.LET_GO_SECONDS)

    def _answer(self) -> bytes:
        assert self._process is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        descriptor = self._process.stdout.fileno()
        readable, _, _ = select.select((descriptor,), (), (), _READY_SECONDS)
        return os.read(descriptor, 1) if readable else b""
