"""The program restore.py, which has nothing of vmsnap, over a plain copy of a replica."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmsnap.stores.blocks import BLOCK_BYTES
from vmsnap.stores.objects.directory import DirectoryObjects
from vmsnap.stores.packs import restore
from vmsnap.stores.packs.maps import LEAF_BLOCKS
from vmsnap.stores.packs.names import PACKS
from vmsnap.testing.packs_samples import KEY, Local, block, fresh, send

PROGRAM = Path(restore.__file__)


def run(*arguments: object, key: bytes | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"]} | ({} if key is None else {"VMSNAP_KEY": key.hex()})
    # -S and -I: nothing that is installed can be imported.
    command = [sys.executable, "-I", "-S", str(PROGRAM), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, timeout=60, check=False
    )


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "keyed"])
def test_a_snapshot_comes_out_as_it_went_in(tmp_path: Path, key: bytes | None) -> None:
    place = tmp_path / "place"
    place.mkdir()
    repository, local = fresh(DirectoryObjects(place), key=key), Local(folder=tmp_path)
    first = {"vda": block(1) + block(2)}
    disks = {
        "vda": block(1) + bytes(BLOCK_BYTES) + block(3) + block(1) + b"tail",
        "vdb": bytes(LEAF_BLOCKS * BLOCK_BYTES) + block(2),
    }
    send(repository, copy=local.snapshot(1, disks=first), index=tmp_path / "index")
    copy = local.snapshot(2, disks=disks, nvram=b"variables")
    send(repository, copy=copy, index=tmp_path / "index")

    listed = run(place, key=key)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.splitlines() == [
        "0000000001  2026-11-21T03:00:00Z  db",
        "0000000002  2026-11-21T04:00:00Z  db",
    ]
    done = run(place, "0000000002", tmp_path / "out", key=key)
    assert done.returncode == 0, done.stderr
    for target, data in disks.items():
        assert (tmp_path / "out" / f"{target}.raw").read_bytes() == data
    for content in copy.disks:
        assert (tmp_path / "out" / content.digests.name).read_bytes() == content.digests.read_bytes()
    assert (tmp_path / "out" / "nvram.fd").read_bytes() == b"variables"
    assert (tmp_path / "out" / "vdb.raw").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "keyed"])
def test_a_flipped_bit_is_found(tmp_path: Path, key: bytes | None) -> None:
    place = tmp_path / "place"
    place.mkdir()
    repository = fresh(DirectoryObjects(place), key=key)
    send(repository, copy=Local(folder=tmp_path).snapshot(disks={"vda": block(1)}), index=tmp_path / "index")
    (pack,) = (place / info.name for info in repository.store.list(PACKS))
    data = bytearray(pack.read_bytes())
    data[1000] ^= 1
    pack.write_bytes(data)
    done = run(place, "0000000001", tmp_path / "out", key=key)
    assert done.returncode == 1
    assert "restore.py: damaged: " in done.stderr


def test_a_wrong_key_is_told_at_once(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    fresh(DirectoryObjects(place), key=KEY)
    assert "this is not its key" in run(place, key=bytes(32)).stderr
