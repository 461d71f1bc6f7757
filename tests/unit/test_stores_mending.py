from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from vmsnap.errors import CancelledError, VerificationError
from vmsnap.model.manifest import DiskRecord
from vmsnap.stores.blocks import BLOCK_BYTES, Scope, digest_of
from vmsnap.stores.mending import mend_disk
from vmsnap.stores.verification import verify_disk
from vmsnap.testing.cancels import CancelledAtOnce, NeverCancelled
from vmsnap.testing.memory_state import ProcessDied
from vmsnap.testing.packs_samples import block

SEEDS = [1, 2, 0, *range(3, 80)]
GOOD = b"".join(map(block, SEEDS)) + b"tail"
COUNT = len(SEEDS) + 1


class Disk:
    """A stored disk, and another copy of it."""

    def __init__(self, folder: Path) -> None:
        parts = (GOOD[at : at + BLOCK_BYTES] for at in range(0, len(GOOD), BLOCK_BYTES))
        digests = b"".join(digest_of(memoryview(part)) for part in parts)
        self.folder = folder
        self.record = DiskRecord(
            target="vda", image="vda.raw", digests="vda.digests", digests_sha256=hashlib.sha256(digests).hexdigest(),
            size_bytes=len(GOOD), data_bytes=0, new_bytes=0,
        )  # fmt: skip
        self.image, self.digests = folder / "vda.raw", folder / "vda.digests"
        self.image.write_bytes(GOOD)
        self.digests.write_bytes(digests)
        for path in (self.image, self.digests):
            path.chmod(0o400)
        self.asked: list[int] = []

    def read(self, number: int) -> bytes:
        self.asked.append(number)
        return GOOD[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]

    def change(self, path: Path, data: bytes) -> None:
        path.chmod(0o600)
        path.write_bytes(data)
        path.chmod(0o400)

    def defects(self) -> tuple[str, ...]:
        scope = Scope(size_bytes=len(GOOD), progress=lambda *_: None, cancel=NeverCancelled())
        return verify_disk(self.folder, record=self.record, scope=scope)[1]

    def mend(self, read: Callable[[int], bytes] | None = None) -> int:
        return mend_disk(self.folder, record=self.record, read=read or self.read, cancel=NeverCancelled())

    def is_whole(self) -> bool:
        modes = {path.stat().st_mode & 0o777 for path in (self.image, self.digests)}
        return self.defects() == () and self.image.read_bytes() == GOOD and modes == {0o400}


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def spoiled(*numbers: int) -> bytes:
    data = bytearray(GOOD)
    for number in numbers:
        data[number * BLOCK_BYTES + 1] ^= 8
    return bytes(data)


@pytest.mark.parametrize("bad", [(0,), (2,), (COUNT - 1,), (1, 2, 3, 66), tuple(range(COUNT))])
def test_only_bad_blocks_are_asked_for_and_written(disk: Disk, bad: tuple[int, ...]) -> None:
    disk.change(disk.image, spoiled(*bad) if bad[-1] != COUNT - 1 else spoiled(*bad[:-1])[:-4] + b"tAIL")
    assert disk.defects()
    assert disk.mend() == len(bad)
    assert disk.asked == list(bad)
    assert disk.is_whole()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda disk: disk.image.unlink(),
        lambda disk: disk.change(disk.image, GOOD[:100_000]),
        lambda disk: disk.change(disk.image, GOOD + b"more"),
        lambda disk: disk.digests.unlink(),
        lambda disk: disk.change(disk.digests, disk.digests.read_bytes()[:-32]),
        lambda disk: disk.change(disk.digests, b"\1" + disk.digests.read_bytes()[1:]),
        lambda disk: (disk.digests.unlink(), disk.change(disk.image, spoiled(7))),
        lambda disk: (disk.digests.unlink(), disk.image.unlink()),
    ],
    ids=["no image", "short", "long", "no digests", "short digests", "bad digests", "no digests, bad block", "nothing"],
)
def test_whatever_is_damaged_is_repaired(disk: Disk, spoil: Callable[[Disk], object]) -> None:
    spoil(disk)
    assert disk.defects()
    disk.mend()
    assert disk.is_whole()


def test_digests_that_can_be_made_again_cost_no_reading_elsewhere(disk: Disk) -> None:
    disk.digests.unlink()
    assert disk.mend() == 0
    assert disk.asked == []


def test_what_is_bad_there_too_stays_and_the_rest_is_repaired(disk: Disk) -> None:
    disk.change(disk.image, spoiled(1, 5, 9))

    def read(number: int) -> bytes:
        if number == 5:
            raise VerificationError("damaged there, too", remedy="none: this is a test")
        return disk.read(number) if number != 9 else b"something else"

    assert disk.mend(read) == 1
    assert disk.image.read_bytes() == spoiled(5, 9)


def test_without_digests_anywhere_nothing_is_touched(disk: Disk) -> None:
    disk.digests.unlink()
    disk.change(disk.image, spoiled(3))
    with pytest.raises(VerificationError, match="the other copy is not what the manifest vouches for"):
        disk.mend(lambda _: bytes(BLOCK_BYTES))
    assert disk.image.read_bytes() == spoiled(3)


def test_a_repair_that_dies_leaves_no_block_worse(disk: Disk) -> None:
    disk.change(disk.image, spoiled(1, 5, 9))

    def read(number: int) -> bytes:
        if number == 5:
            raise ProcessDied
        return disk.read(number)

    with pytest.raises(ProcessDied):
        disk.mend(read)
    assert disk.image.read_bytes() == spoiled(5, 9)
    disk.mend()
    assert disk.is_whole()


def test_it_can_be_cancelled(disk: Disk) -> None:
    disk.change(disk.image, spoiled(1))
    with pytest.raises(CancelledError):
        mend_disk(disk.folder, record=disk.record, read=disk.read, cancel=CancelledAtOnce())
