"""The NBD server, asked by those who did not write it: QEMU's tools and libnbd's."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vmsnap.exports.cache import BLOCK_BYTES, BlockCache
from vmsnap.exports.disk import LazyDisk
from vmsnap.exports.fetching import CachedDisk, Fetcher
from vmsnap.exports.server import NbdServer
from vmsnap.testing.memory_blocks import MemoryBlocks

BAD = 17


def image() -> bytes:
    chance = random.Random(3)
    blocks = [chance.randbytes(BLOCK_BYTES) if chance.random() < 0.6 else bytes(BLOCK_BYTES) for _ in range(300)]
    blocks[BAD] = b"\7" * BLOCK_BYTES
    return b"".join(blocks) + b"the end".ljust(4096, b"\0")


@pytest.fixture
def source() -> MemoryBlocks:
    return MemoryBlocks(data=image())


@pytest.fixture
def served(tmp_path: Path, source: MemoryBlocks) -> Iterator[str]:
    """The URI of an export of the source."""
    cache = BlockCache(tmp_path / "vda.raw", size_bytes=source.size_bytes, identity=source.identity, floor=0)
    fetcher = Fetcher(now=lambda: datetime.now(UTC))
    disk = LazyDisk(CachedDisk(target="vda", source=source, cache=cache), fetcher=fetcher)
    server = NbdServer(tmp_path / "nbd", disks={"vda": (source.size_bytes, disk)}, reader=None)
    fetcher.start()
    server.start()
    yield f"nbd+unix:///vda?socket={tmp_path / 'nbd'}"
    fetcher.stop()
    server.stop()
    cache.close()


def run(*argv: str, status: int = 0) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_libnbd_agrees(served: str, source: MemoryBlocks, tmp_path: Path) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", served))["exports"]
    assert export["export-size"] == source.size_bytes
    assert export["contexts"] == ["base:allocation"]
    assert export["is_read_only"] is True
    assert export["can_multi_conn"] is True
    assert export["can_cache"] is True
    assert (export["block_size_minimum"], export["block_size_preferred"]) == (1, BLOCK_BYTES)
    listed = json.loads(run("nbdinfo", "--json", "--list", served.replace("/vda?", "/?")))
    assert [one["export-name"] for one in listed["exports"]] == ["vda"]
    run("nbdinfo", served.replace("/vda?", "/vdz?"), status=1)
    extents = json.loads(run("nbdinfo", "--json", "--map", served))
    for extent in extents:
        stretch = source.data[extent["offset"] : extent["offset"] + extent["length"]]
        assert any(stretch) == (extent["type"] == 0)
    assert sum(extent["length"] for extent in extents) == source.size_bytes
    run("nbdcopy", "--connections=4", "--requests=16", served, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == source.data


def test_qemu_agrees(served: str, source: MemoryBlocks, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.write_bytes(source.data)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", served, str(whole))
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", "-m", "16", "-W", served, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == source.data
    assert "Permission denied" in run("qemu-io", "-f", "raw", "-c", "write 0 512", served, status=1)
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", served, "-F", "raw", str(overlay))
    pattern = ("-c", "write -P 9 65000 1000", "-c", "read -P 9 65000 1000", "-c", f"read -P 7 {BAD * BLOCK_BYTES} 64k")
    assert "failed" not in run("qemu-io", *pattern, str(overlay))


def test_damage_is_an_error_for_qemu_and_the_rest_is_read(served: str, source: MemoryBlocks) -> None:
    source.damaged.add(BAD)
    said = run("qemu-io", "-r", "-f", "raw", "-c", f"read {BAD * BLOCK_BYTES} 512", served, status=1)
    assert "Input/output error" in said
    assert "512 bytes" in run("qemu-io", "-r", "-f", "raw", "-c", f"read {(BAD + 1) * BLOCK_BYTES} 512", served)
