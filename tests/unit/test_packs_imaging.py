from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from vmsnap.stores.packs.imaging import ImageWriter


@pytest.mark.parametrize("folder", ["/dev/shm", "/var/tmp"])  # without direct writes in older kernels, and with them
@pytest.mark.parametrize("length", [1, 4095, 4096, 65536, 65536 + 4097])
def test_any_length_arrives_at_any_place(folder: str, length: int) -> None:
    if not Path(folder).is_dir():
        folder = tempfile.gettempdir()
    data = os.urandom(length)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(1 << 20)
        writer = ImageWriter(file.fileno())
        for offset in (0, 65536 * 3, 65536 * 6 + 1):
            writer.write([memoryview(data)[:100], memoryview(data)[100:]], offset=offset)
        writer.close()
        for offset in (0, 65536 * 3, 65536 * 6 + 1):
            assert os.pread(file.fileno(), length, offset) == data
        assert os.pread(file.fileno(), 100, 65536 * 9) == bytes(100)
