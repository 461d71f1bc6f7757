"""The contract of object stores, and faults, over a real S3 server."""

from __future__ import annotations

import itertools

import pytest

from integration.s3_server import S3Server
from vmsnap.model.objects import ObjectLock, S3Place
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.objects.s3 import S3Objects
from vmsnap.testing.objects_contract import ObjectsContract

_prefixes = itertools.count()


class TestS3Objects(ObjectsContract):
    @pytest.fixture(params=[ObjectLock.OFF, ObjectLock.COMPLIANCE, ObjectLock.GOVERNANCE])
    def place(self, request: pytest.FixtureRequest, s3_server: S3Server) -> S3Place:
        lock: ObjectLock = request.param
        bucket = s3_server.bucket(object_lock=lock is not ObjectLock.OFF)
        return S3Place(endpoint=s3_server.endpoint, bucket=bucket, prefix=f"site/{next(_prefixes)}", object_lock=lock)

    @pytest.fixture
    def locks(self, place: S3Place) -> bool:
        return place.object_lock is not ObjectLock.OFF

    @pytest.fixture
    def store(self, place: S3Place, s3_server: S3Server) -> ObjectStore:
        return S3Objects(place, keys=s3_server.keys)

    @pytest.fixture
    def again(self, place: S3Place, s3_server: S3Server) -> ObjectStore:
        return S3Objects(place, keys=s3_server.keys)
