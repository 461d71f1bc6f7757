from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1, "days": {"here": "soon"}}', '{"version": 9, "days": 5}'])
def test_what_cannot_be_understood_counts_as_nothing(tmp_path: Path, text: str) -> None:
    book = FileSampleBook(tmp_path)
    book.note("db", replica=False, day=DAY)
    (tmp_path / "samples" / "db.json").write_text(text)
    assert book.last("db", replica=False) is None
    book.note("db", replica=True, day=DAY)
    assert book.last("db", replica=True) == DAY
