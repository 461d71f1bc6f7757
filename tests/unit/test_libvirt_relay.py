"""The relay of a memory stream, as a real process between real pipes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt.relay import PIPE_BYTES, STREAM_BEGIN
from vmsnap.hypervisors.libvirt.relayed import RelayedStream

STREAM = STREAM_BEGIN + os.urandom(3 * PIPE_BYTES)


@contextmanager
def relayed(*, held: bool = False, stall: timedelta = timedelta(seconds=30)) -> Iterator[tuple[RelayedStream, int]]:
    """A relay, and the end that the clone would read."""
    reader, sink = os.pipe()
    try:
        with RelayedStream(sink=sink, held=held, stall=stall, writer_pid=os.getpid()) as stream:
            os.close(sink)
            yield stream, reader
    finally:
        os.close(reader)


def write(stream: RelayedStream, text: bytes) -> threading.Thread:
    """Write to the relay as QEMU does, and close the end."""

    descriptor = os.dup(stream.writer)
    stream.close_writer()

    def work() -> None:
        rest = memoryview(text)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except BrokenPipeError:
            broken.set()
        finally:
            os.close(descriptor)

    broken = threading.Event()
    thread = threading.Thread(target=work)
    thread.broken = broken  # type: ignore[attr-defined]
    thread.start()
    return thread


def is_cut(thread: threading.Thread) -> bool:
    thread.join(timeout=10)
    assert not thread.is_alive()
    return bool(thread.broken.is_set())  # type: ignore[attr-defined]


def read_all(descriptor: int) -> bytes:
    pieces = []
    while piece := os.read(descriptor, PIPE_BYTES):
        pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize("held", [False, True])
def test_everything_but_the_beginning_arrives_once_it_may_flow(held: bool) -> None:  # noqa: FBT001
    with relayed(held=held) as (stream, reader):
        writer = write(stream, STREAM)
        time.sleep(0.2)
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        os.set_blocking(reader, True)
        stream.let_flow()
        assert read_all(reader) == STREAM[len(STREAM_BEGIN) :]
        assert not is_cut(writer)
        stream.require_ended(timeout_seconds=10)
        assert stream.failure() is None


def test_a_writer_that_is_held_has_written_nothing() -> None:
    with relayed(held=True) as (stream, _reader):
        os.set_blocking(stream.writer, False)
        with pytest.raises(BlockingIOError):
            os.write(stream.writer, b"Q")


def test_a_stream_that_is_cut_lets_its_writer_go_at_once() -> None:
    with relayed(held=True) as (stream, reader):
        writer = write(stream, STREAM)
        stream.cut()
        assert is_cut(writer)
        assert read_all(reader) == b""
        stream.cut()


def test_a_clone_that_takes_nothing_ends_the_stream() -> None:
    with relayed(stall=timedelta(milliseconds=200)) as (stream, _reader):
        writer = write(stream, STREAM)
        stream.let_flow()
        assert is_cut(writer)
        assert "took nothing" in failure_of(stream)


def test_the_end_of_a_stream_is_waited_for() -> None:
    with relayed() as (stream, reader):
        writer = write(stream, STREAM)
        stream.let_flow()
        with pytest.raises(DriverError, match="did not end within"):
            stream.require_ended(timeout_seconds=0.2)
        read_all(reader)
        assert not is_cut(writer)
        stream.require_ended(timeout_seconds=10)


def test_a_clone_that_is_gone_ends_the_stream() -> None:
    reader, sink = os.pipe()
    with RelayedStream(sink=sink, held=False, stall=timedelta(seconds=30), writer_pid=os.getpid()) as stream:
        os.close(sink)
        os.close(reader)
        writer = write(stream, STREAM)
        stream.let_flow()
        assert is_cut(writer)
        assert "the clone ended" in failure_of(stream)


def test_a_clone_may_be_done_before_qemu_says_that_the_stream_is_over() -> None:
    reader, sink = os.pipe()
    with RelayedStream(sink=sink, held=False, stall=timedelta(seconds=30), writer_pid=os.getpid()) as stream:
        os.close(sink)
        os.write(stream.writer, STREAM_BEGIN + b"pages")
        stream.let_flow()
        assert os.read(reader, PIPE_BYTES) == b"pages"
        os.close(reader)
        time.sleep(0.1)
        stream.close_writer()
        stream.require_ended(timeout_seconds=10)
        assert stream.failure() is None


def test_what_is_no_stream_of_qemu_is_not_passed_on() -> None:
    with relayed() as (stream, reader):
        writer = write(stream, b"QEVM\x00\x00\x00\x04" + STREAM)
        stream.let_flow()
        assert is_cut(writer)
        assert read_all(reader) == b""
        assert "does not begin" in failure_of(stream)


def failure_of(stream: RelayedStream) -> str:
    until = time.monotonic() + 10
    while (failure := stream.failure()) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return failure.brief
