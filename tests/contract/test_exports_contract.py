"""Exports of a replica in a directory, as processes of their own, read as a hypervisor reads them."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from vmsnap.config.settings import ReplicaSettings
from vmsnap.errors import PreconditionError, VmsnapError
from vmsnap.exporting import exports_of, place_of
from vmsnap.exports.launching import ProcessLauncher
from vmsnap.exports.processes import ExportProcesses
from vmsnap.model.export import ExportPhase, ExportPlan
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.stores.blocks import BLOCK_BYTES
from vmsnap.stores.objects.directory import DirectoryObjects
from vmsnap.stores.packs import holds
from vmsnap.testing.nbd_client import NbdClient
from vmsnap.testing.packs_samples import KEY, Local, fresh, send

RUN = RunId("0123456789")
SOON = timedelta(seconds=30)


def image() -> bytes:
    chance = random.Random(7)
    blocks = [chance.randbytes(BLOCK_BYTES) if chance.random() < 0.6 else bytes(BLOCK_BYTES) for _ in range(60)]
    return b"".join(blocks) + b"the end".ljust(512, b"\0")


class Place:
    """An encrypted replica with one snapshot of two disks, and this host's exports of it."""

    def __init__(self, folder: Path, *, runtime: Path) -> None:
        self.folder = folder
        self.replica = folder / "replica"
        self.replica.mkdir()
        self.objects = DirectoryObjects(self.replica)
        self.disks = {"vda": image(), "vdb": b"\1" * BLOCK_BYTES}
        (folder / "local").mkdir()
        copy = Local(folder=folder / "local").snapshot(disks=self.disks)
        send(fresh(self.objects, key=KEY), copy=copy, index=folder / "index")
        self.key = folder / "key.toml"
        self.key.write_text(f'encryption_key = "{KEY.hex()}"\n')
        self.key.chmod(0o600)
        self.snapshot = SnapshotId(f"{1:010x}")
        self.runtime = runtime
        self.exports = self.process()

    def process(self) -> ExportProcesses:
        """What another process of this host would have."""
        launcher = ProcessLauncher((sys.executable, "-m", "vmsnap", "env", "serve-disks"))
        return exports_of(
            self.folder / "store",
            runtime=self.runtime,
            replica=ReplicaSettings(kind="directory", path=self.replica, encryption_credential=str(self.key)),
            launcher=lambda: launcher,
        )

    def plan(self, *, hydrate: bool = False, snapshot: SnapshotId | None = None) -> ExportPlan:
        return ExportPlan(run=RUN, guest="db", snapshot=snapshot or self.snapshot, hydrate=hydrate)

    def begin(self, *, hydrate: bool = False) -> ExportPlan:
        plan = self.plan(hydrate=hydrate)
        self.exports.begin(plan)
        self.exports.wait(plan, deadline=SOON)
        return plan

    def client(self, export: str = "vda") -> NbdClient:
        return NbdClient(self.exports.socket(RUN), export=export)

    @property
    def held(self) -> bool:
        return self.snapshot in holds.held(self.objects, now=datetime.now(UTC))

    def kill(self) -> None:
        pid = int((self.folder / "store" / ".exports" / RUN / "lock").read_bytes())
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not self.alive)

    @property
    def alive(self) -> bool:
        status = self.exports.status(RUN)
        return status is not None and status.alive


def eventually(so: Callable[[], bool], *, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with TemporaryDirectory(prefix="vmsnap-") as runtime:  # a socket's path must be short
        made = Place(tmp_path, runtime=Path(runtime))
        (tmp_path / "store").mkdir()
        yield made
        made.exports.release(made.exports.resource(made.plan()), deadline=SOON)
        assert not list(Path(runtime).iterdir())
        assert not made.exports.owned()
        assert not made.held


def test_from_the_first_read_to_the_local_image(place: Place) -> None:
    data = place.disks["vda"]
    place.begin(hydrate=True)
    assert place.held
    with place.client() as client, place.client("vdb") as other:
        assert client.size_bytes == len(data)
        assert client.read(3 * BLOCK_BYTES - 5, 10) == data[3 * BLOCK_BYTES - 5 : 3 * BLOCK_BYTES + 5]
        assert client.read(len(data) - 512, 512) == data[-512:]
        assert other.read(0, BLOCK_BYTES) == place.disks["vdb"]
    with pytest.raises(PreconditionError, match="not come"):
        place.exports.images(RUN)
    place.kill()
    later = place.process()
    later.revive(RUN)
    later.revive(RUN)
    later.hurry(RUN)
    with place.client() as client:
        assert client.read(0, len(data)) == data

    def phase() -> ExportPhase:
        status = later.status(RUN)
        assert status is not None
        return status.phase

    eventually(lambda: phase() is ExportPhase.HYDRATED)
    images = {image.target: Path(image.path) for image in later.images(RUN)}
    assert {target: path.read_bytes() for target, path in images.items()} == place.disks
    later.settled(RUN)
    later.settled(RUN)
    later.revive(RUN)
    assert phase() is ExportPhase.LOCAL
    assert not place.alive
    assert not place.held
    assert images["vda"].read_bytes() == data


def test_a_restart_while_the_replica_is_away(place: Place) -> None:
    data = place.disks["vda"]
    place.begin()
    with place.client() as client:
        client.read(0, 4096)
    eventually((place.folder / "store" / ".exports" / RUN / "vda.have").exists)
    away = place.replica.rename(place.folder / "away")
    place.kill()
    place.exports.revive(RUN)
    with place.client() as client:
        assert client.read(0, 4096) == data[:4096], "what was read is here"
        client._socket.settimeout(1.5)
        with pytest.raises(TimeoutError):
            client.read(40 * BLOCK_BYTES, 512)

    def waits() -> bool:
        status = place.exports.status(RUN)
        return status is not None and status.waiting is not None

    eventually(waits)
    away.rename(place.replica)
    with place.client() as client:
        assert client.read(40 * BLOCK_BYTES, 512) == data[40 * BLOCK_BYTES : 40 * BLOCK_BYTES + 512]


def test_a_damaged_pack_is_an_error_and_never_other_bytes(place: Place) -> None:
    packs = [path for path in (place.replica / "packs").rglob("*") if path.is_file()]
    for path in packs:
        whole = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(bytes(byte ^ 1 for byte in whole))
    place.begin()
    number = next(at for at in range(60) if any(place.disks["vda"][at * BLOCK_BYTES :][:16]))
    with place.client() as client, pytest.raises(OSError, match="answered with an error") as caught:
        client.read(number * BLOCK_BYTES, 512)
    assert caught.value.errno == errno.EIO

    def told() -> bool:
        status = place.exports.status(RUN)
        return status is not None and any(f"at {number * BLOCK_BYTES}" in line for line in status.damage)

    eventually(told)


def test_what_keeps_an_export_from_beginning_is_told(place: Place) -> None:
    plan = place.plan(snapshot=SnapshotId("f" * 10))
    place.exports.begin(plan)
    with pytest.raises(PreconditionError, match="not in the replica"):
        place.exports.wait(plan, deadline=SOON)
    assert place.exports.owned()


def test_it_may_be_ended_at_any_moment(place: Place) -> None:
    resource = place.exports.resource(place.plan())
    place.exports.release(resource, deadline=SOON)
    for pause in (0.0, 0.3, 0.9):
        place.exports.begin(place.plan(hydrate=True))
        time.sleep(pause)
        place.process().release(resource, deadline=SOON)
        assert not place.exports.owned()
    with pytest.raises(VmsnapError):
        place.exports.images(RUN)
    assert place.exports.status(RUN) is None
    assert (
        place_of(ReplicaSettings(kind="directory", path=place.replica).model_dump_json(exclude_unset=True)).path
        == place.replica
    )
