"""Workflow tests make hundreds of runs fail; what they log of it helps nobody."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_MEMORY = Path("/dev/shm")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("vmsnap")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(before)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory, where there is such a place: removing thousands of folders takes a disk long."""
    with tempfile.TemporaryDirectory(prefix="vmsnap-test-", dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        yield Path(folder)
