"""Feeding a memory image through a FIFO: everything once, memory given back, and no thread left waiting."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt.stream import StreamFeeder

PIECE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "ram.save"
    path.write_bytes(os.urandom(20 * PIECE + 12345))
    return path


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def feeders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "vmsnap-stream"]


def test_the_reader_gets_every_byte_and_the_image_is_empty(image: Path) -> None:
    wanted = image.read_bytes()
    with StreamFeeder(image) as feeder:
        assert feeder.path.read_bytes() == wanted
        feeder.require_fed()
    assert not feeder.path.exists()
    assert image.stat().st_size == len(wanted)
    assert not any(image.read_bytes())
    assert image.stat().st_blocks * 512 < PIECE
    assert feeders() == []


def test_an_image_is_empty_soon_after_it_was_read(image: Path) -> None:
    size = image.stat().st_size
    with StreamFeeder(image) as feeder, feeder.path.open("rb") as reader:
        wait_until(lambda: len(reader.read(PIECE)) < PIECE or image.stat().st_blocks * 512 < size // 2)
        rest = reader.read()
        assert 0 < len(rest) < size // 2 + 14 * PIECE
        feeder.require_fed()


def test_nobody_reads(image: Path) -> None:
    wanted = image.read_bytes()
    with StreamFeeder(image) as feeder:
        pass
    assert not feeder.path.exists()
    assert image.read_bytes() == wanted
    assert feeders() == []


def test_a_reader_that_leaves_early_is_no_reader(image: Path) -> None:
    with StreamFeeder(image) as feeder:
        descriptor = os.open(feeder.path, os.O_RDONLY)
        assert len(os.read(descriptor, 1000)) == 1000
        os.close(descriptor)
        with pytest.raises(DriverError, match="could not be read"):
            feeder.require_fed()
    assert feeders() == []


def test_a_reader_that_hangs_holds_up_nobody(image: Path) -> None:
    with StreamFeeder(image) as feeder:
        descriptor = os.open(feeder.path, os.O_RDONLY)
        assert os.read(descriptor, 1000)
    os.close(descriptor)
    assert feeders() == []


def test_an_image_that_is_gone(image: Path) -> None:
    image.unlink()
    image.mkdir()
    with StreamFeeder(image) as feeder, pytest.raises(DriverError, match="could not be read"):
        feeder.require_fed()
    assert feeders() == []
