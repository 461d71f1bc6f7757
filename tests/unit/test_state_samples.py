from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from vmsnap.model.ids import SnapshotId
from vmsnap.ports.state import SampleBook
from vmsnap.state.samples import FileSampleBook
from vmsnap.testing.memory_state import MemoryState

DAY = date(2026, 11, 21)


@pytest.fixture(params=["file", "memory"])
def book(tmp_path: Path, request: pytest.FixtureRequest) -> SampleBook:
    return FileSampleBook(tmp_path) if request.param == "file" else MemoryState().samples


def test_days_are_noted_by_guest_and_place(book: SampleBook) -> None:
    assert book.last("db", replica=False) is None
    book.note("db", replica=False, day=DAY)
    book.note("a/b", replica=True, day=date(2026, 11, 20))
    assert book.last("db", replica=False) == DAY
    assert book.last("db", replica=True) is None
    assert book.last("a/b", replica=True) == date(2026, 11, 20)
    book.note("db", replica=True, day=DAY)
    book.note("db", replica=False, day=date(2026, 11, 22))
    assert (book.last("db", replica=False), book.last("db", replica=True)) == (date(2026, 11, 22), DAY)


def test_damage_there_is_known_until_it_is_taken_back(book: SampleBook) -> None:
    one, other = SnapshotId("00000000a1"), SnapshotId("00000000a2")
    assert book.damaged("db") == {}
    book.mark("db", snapshot=one, damage=None)
    book.mark("db", snapshot=one, damage="a block is \xe4")
    book.mark("db", snapshot=other, damage="gone")
    book.note("db", replica=True, day=DAY)
    assert book.damaged("db") == {one: "a block is \xe4", other: "gone"}
    book.mark("db", snapshot=one, damage="two blocks are")
    book.mark("db", snapshot=other, damage=None)
    assert book.damaged("db") == {one: "two blocks are"}
    assert (book.damaged("x"), book.last("db", replica=True)) == ({}, DAY)


def test_a_record_of_a_version_that_knew_no_damage_is_understood(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir(mode=0o700)
    (tmp_path / "samples" / "db.json").write_text('{"version": 1, "guest": "db", "days": {"here": "2026-11-21"}}')
    book = FileSampleBook(tmp_path)
    assert (book.last("db", replica=False), book.damaged("db")) == (DAY, {})


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1, "days": {"here": "soon"}}', '{"version": 9, "days": 5}'])
def test_what_cannot_be_understood_counts_as_nothing(tmp_path: Path, text: str) -> None:
    book = FileSampleBook(tmp_path)
    book.note("db", replica=False, day=DAY)
    (tmp_path / "samples" / "db.json").write_text(text)
    assert book.last("db", replica=False) is None
    book.note("db", replica=True, day=DAY)
    assert book.last("db", replica=True) == DAY
