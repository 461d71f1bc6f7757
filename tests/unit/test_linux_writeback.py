from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from vmsnap.linux import writeback
from vmsnap.linux.writeback import put_on_disk

MIB = 1 << 20


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the system, in its order."""
    seen: list[str] = []
    piece, flush = writeback._libc.sync_file_range, os.fsync

    def note_piece(descriptor: int, start: int, length: int, flags: int) -> int:
        seen.append(f"{start // MIB}+{length // MIB}")
        return int(piece(descriptor, start, length, flags))

    def note_flush(descriptor: int) -> None:
        seen.append("fsync")
        flush(descriptor)

    monkeypatch.setattr(writeback._libc, "sync_file_range", note_piece)
    monkeypatch.setattr(os, "fsync", note_flush)
    return seen


@pytest.mark.parametrize(
    ("size", "pieces"), [(0, []), (1, ["0+8"]), (8 * MIB, ["0+8"]), (20 * MIB, ["0+8", "8+8", "16+8"])]
)
def test_it_is_written_a_piece_at_a_time_and_flushed(
    tmp_path: Path, calls: list[str], size: int, pieces: list[str]
) -> None:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(size))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        put_on_disk(descriptor)
    finally:
        os.close(descriptor)
    assert calls == [*pieces, "fsync"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EOPNOTSUPP, errno.EINVAL])
def test_an_error_of_the_disk_is_told(
    number: int, calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=os.strerror(number)):
        put_where_pieces_fail(number, monkeypatch=monkeypatch, path=tmp_path / "image")
    assert calls == []


def test_what_cannot_be_written_in_pieces_is_flushed_all_the_same(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_where_pieces_fail(errno.ENOSYS, monkeypatch=monkeypatch, path=tmp_path / "image")
    assert calls == ["fsync"]


def put_where_pieces_fail(number: int, *, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    def fails(*_arguments: int) -> int:
        ctypes.set_errno(number)
        return -1

    path.write_bytes(b"x")
    monkeypatch.setattr(writeback._libc, "sync_file_range", fails)
    with path.open("rb") as file:
        put_on_disk(file.fileno())
