"""The replica and its place, as ``vmsnap.toml`` describes them."""

from __future__ import annotations

from pathlib import Path

from vmsnap.config.credentials import encryption_key_of, s3_keys_of
from vmsnap.config.settings import ReplicaSettings
from vmsnap.errors import BugError
from vmsnap.linux.heap import keep_heaps_small
from vmsnap.model.objects import S3Place
from vmsnap.ports.clock import Clock
from vmsnap.ports.objects import ObjectStore
from vmsnap.ports.upkeep import Upkeep
from vmsnap.stores.objects.directory import DirectoryObjects
from vmsnap.stores.objects.pacing import PacedObjects
from vmsnap.stores.objects.retrying import Patience, Repeating, RetryingObjects
from vmsnap.stores.objects.s3 import S3Objects
from vmsnap.stores.packs.replica import PacksReplica
from vmsnap.stores.packs.repository import Repository, open_repository
from vmsnap.stores.packs.upkeep import PackedUpkeep

_MIB = 1024 * 1024


def objects_of(settings: ReplicaSettings, *, clock: Clock) -> ObjectStore:
    """Return the object store of the replica, with its limits. Asks nothing of it yet.

    Raises ConfigError for a credential that cannot be read, or may be read by others.
    """
    store: ObjectStore
    if settings.kind == "directory":
        if settings.path is None:
            raise BugError("a replica in a directory has no path")
        store = DirectoryObjects(settings.path)
    else:
        s3_keys_of(settings)  # what is wrong with them is told at once
        store = S3Objects(_place(settings), keys=lambda: s3_keys_of(settings))
        repeating = Repeating(clock=clock, patience=Patience(give_up_after=settings.retry_for))
        store = RetryingObjects(store, repeating=repeating)
    if settings.bandwidth_mib_s is not None:
        store = PacedObjects(store, bytes_per_second=settings.bandwidth_mib_s * _MIB, clock=clock)
    return store


def replica_of(settings: ReplicaSettings, *, state: Path, clock: Clock) -> PacksReplica:
    """Return the replica. Reads no credential and asks nothing of the place yet: local commands work without them."""
    keep_heaps_small()
    return PacksReplica(
        lambda: objects_of(settings, clock=clock),
        key=lambda: encryption_key_of(settings),
        state=state / "replica",
        connections=settings.connections,
        clock=clock,
    )


def upkeep_of(settings: ReplicaSettings, *, clock: Clock) -> Upkeep:
    """Return what keeps the replica in order. Asks nothing of it yet, and reads no credential."""

    def opened() -> Repository:
        return open_repository(objects_of(settings, clock=clock), key=encryption_key_of(settings))

    return PackedUpkeep(opened, clock=clock, locks=settings.object_lock != "off", connections=settings.connections)


def _place(settings: ReplicaSettings) -> S3Place:
    if settings.bucket is None:
        raise BugError("a replica in S3 has no bucket")
    return S3Place(
        bucket=settings.bucket,
        prefix=settings.prefix,
        endpoint=settings.endpoint,
        region=settings.region,
        ca_file=settings.ca_file,
        path_style=settings.path_style,
        checksums=settings.checksums,
        storage_class=settings.storage_class,
        kms_key=settings.kms_key,
        object_lock=settings.object_lock,
        connections=settings.connections,
        timeout=settings.timeout,
    )
