from __future__ import annotations

from pathlib import Path

import pytest

from vmsnap.linux import reflink
from vmsnap.linux.reflink import exclusive_bytes, freed_bytes

K = 4096
ONE, TWO, THREE, OUTSIDE = (Path(name) for name in ("one", "two", "three", "outside"))
EXTENTS = {
    # Place on the disk, length, whether another file has it too.
    ONE: [(0, 4 * K, True), (100 * K, K, False)],
    TWO: [(2 * K, 4 * K, True), (40 * K, K, True), (110 * K, 3 * K, False)],
    THREE: [(3 * K, K, True), (120 * K, 9 * K, False)],
}


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflink, "_extents", EXTENTS.get)


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize(
    ("going", "staying", "freed"),
    [
        ((), (), 0),
        ((ONE,), (TWO, THREE), 1),
        ((ONE, TWO), (), 1 + 3 + 2),
        ((ONE, TWO), (THREE,), 1 + 3 + 1),
        ((ONE, TWO, THREE), (), 1 + 3 + 9 + 2),
        ((ONE, THREE), (TWO,), 1 + 9),
    ],
)
def test_what_files_share_only_with_one_another_is_freed(
    going: tuple[Path, ...], staying: tuple[Path, ...], freed: int
) -> None:
    assert freed_bytes(going, staying=staying) == freed * K


@pytest.mark.usefixtures("_known")
def test_a_file_system_that_cannot_tell_gives_none() -> None:
    assert freed_bytes((ONE, OUTSIDE), staying=()) is None
    assert exclusive_bytes(OUTSIDE) is None
    assert exclusive_bytes(TWO) == 3 * K
