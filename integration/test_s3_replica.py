"""Snapshots in a real S3 server: sent while it is killed, verified and repaired."""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from integration.s3_server import S3Server
from vmsnap.model.ids import SnapshotId
from vmsnap.model.objects import ObjectLock, S3Place
from vmsnap.model.verification import Checked
from vmsnap.state.clock import SystemClock
from vmsnap.stores.objects.retrying import Patience, Repeating, RetryingObjects
from vmsnap.stores.objects.s3 import S3Objects
from vmsnap.stores.packs.names import INTENTS, MAPS, PACKS, snapshot_name
from vmsnap.stores.packs.replica import PacksReplica
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.packs_samples import KEY, Local, block, disks_of, fresh, send

SNAPSHOT = SnapshotId(f"{1:010x}")


def objects_of(server: S3Server, *, prefix: str, lock: ObjectLock = ObjectLock.OFF) -> RetryingObjects:
    bucket = server.bucket(object_lock=lock is not ObjectLock.OFF)
    place = S3Place(
        endpoint=server.endpoint, bucket=bucket, prefix=prefix, timeout=timedelta(seconds=5), object_lock=lock
    )
    patience = Patience(first=timedelta(milliseconds=50), give_up_after=timedelta(seconds=90))
    return RetryingObjects(
        S3Objects(place, keys=server.keys), repeating=Repeating(clock=SystemClock(), patience=patience)
    )


def replica_of(objects: RetryingObjects, *, state: Path) -> PacksReplica:
    return PacksReplica(lambda: objects, key=lambda: KEY, state=state, connections=4, clock=SystemClock())


def check(objects: RetryingObjects, *, state: Path) -> Checked:
    replica = replica_of(objects, state=state)
    return replica.check("db", snapshot=SNAPSHOT, share=None, progress=lambda *_: None, cancel=NeverCancelled())


def test_a_server_that_is_killed_in_mid_upload_and_started_again_has_the_snapshot(tmp_path: Path) -> None:
    with S3Server(tmp_path / "server") as server:
        objects = objects_of(server, prefix="killed")
        disk = random.Random(1).randbytes(80 << 20)
        copy = Local(folder=tmp_path).snapshot(disks={"vda": disk})
        repository = fresh(objects, key=KEY)
        sending = threading.Thread(target=send, args=(repository,), kwargs={"copy": copy, "index": tmp_path / "index"})
        sending.start()
        time.sleep(0.5)
        server.kill()
        server.start()
        sending.join(timeout=120)
        assert not sending.is_alive()
        assert disks_of(repository) == {"vda": disk}
        assert check(objects, state=tmp_path / "state").defects == ()
        assert list(objects.list(INTENTS)) == []


@pytest.mark.parametrize("lock", [ObjectLock.OFF, ObjectLock.COMPLIANCE])
def test_damage_on_the_server_is_found_and_repaired(tmp_path: Path, s3_server: S3Server, lock: ObjectLock) -> None:
    objects = objects_of(s3_server, prefix=f"damage/{lock}", lock=lock)
    copy = Local(folder=tmp_path).snapshot(disks={"vda": b"".join(map(block, range(1, 40)))})
    replica = replica_of(objects, state=tmp_path / "state")
    replica.send(copy, retain_until=None, progress=lambda *_: None, cancel=NeverCancelled())
    for prefix in (PACKS, MAPS, snapshot_name("db", snapshot=SNAPSHOT)):
        for name in [one.name for one in objects.list(prefix)]:
            data = objects.get(name).data
            objects.put(name, data=data[:50] + bytes([data[50] ^ 1]) + data[51:])
        found = check(objects, state=tmp_path / "state")
        assert found.defects
        assert all(name.startswith(prefix) for name in found.bad)
        replica.mend(copy, found=found, progress=lambda *_: None, cancel=NeverCancelled())
        assert check(objects, state=tmp_path / "state").defects == ()
