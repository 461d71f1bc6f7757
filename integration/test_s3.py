"""The contract of object stores, and faults, over a real S3 server."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from integration.s3_proxy import Proxy, Trouble, http_failure
from integration.s3_server import S3Server
from vmsnap.errors import HeldError, ObjectNotFoundError, PreconditionError, StoreUnreachableError
from vmsnap.model.guest import Severity
from vmsnap.model.objects import ObjectLock, S3Keys, S3Place
from vmsnap.ports.objects import ObjectStore
from vmsnap.state.clock import SystemClock
from vmsnap.stores.objects.retrying import Patience, Repeating, RetryingObjects
from vmsnap.stores.objects.s3 import S3Objects
from vmsnap.testing.objects_contract import ObjectsContract

_prefixes = itertools.count()


class TestS3Objects(ObjectsContract):
    many = 130

    @pytest.fixture(params=[ObjectLock.OFF, ObjectLock.COMPLIANCE])
    def place(self, request: pytest.FixtureRequest, s3_server: S3Server) -> S3Place:
        lock: ObjectLock = request.param
        bucket = s3_server.bucket(object_lock=lock is not ObjectLock.OFF)
        return S3Place(endpoint=s3_server.endpoint, bucket=bucket, prefix=f"site/{next(_prefixes)}", object_lock=lock)

    @pytest.fixture
    def locks(self, place: S3Place) -> bool:
        return place.object_lock is not ObjectLock.OFF

    @pytest.fixture
    def store(self, place: S3Place, s3_server: S3Server) -> ObjectStore:
        return S3Objects(place, keys=s3_server.keys, page=50)

    @pytest.fixture
    def again(self, place: S3Place, s3_server: S3Server) -> ObjectStore:
        return S3Objects(place, keys=s3_server.keys, page=50)


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with Proxy(s3_server.port) as way:
        yield way


@pytest.fixture
def place(s3_server: S3Server, proxy: Proxy) -> S3Place:
    prefix = f"site/{next(_prefixes)}"
    timeout = timedelta(seconds=1)
    return S3Place(endpoint=proxy.endpoint, bucket=s3_server.bucket(), prefix=prefix, timeout=timeout)


def patient(store: ObjectStore) -> RetryingObjects:
    patience = Patience(first=timedelta(milliseconds=20), give_up_after=timedelta(seconds=60))
    return RetryingObjects(store, repeating=Repeating(clock=SystemClock(), patience=patience))


def test_governance_locks_too(s3_server: S3Server, place: S3Place) -> None:
    mode, bucket = ObjectLock.GOVERNANCE, s3_server.bucket(object_lock=True)
    store = S3Objects(replace(place, bucket=bucket, object_lock=mode), keys=s3_server.keys)
    store.put_new("a", data=b"x", retain_until=datetime.now(UTC) + timedelta(minutes=1))
    store.retain("a", until=datetime.now(UTC) + timedelta(minutes=2))
    with pytest.raises(HeldError):
        store.delete("a")


LARGE = random.Random(1).randbytes(3 << 20)
TROUBLES = {
    "500": Trouble(answer=http_failure(500, "InternalError")),
    "503": Trouble(answer=http_failure(503, "SlowDown")),
    "request cut": Trouble(cut_request=1 << 20),
    "answer cut in its head": Trouble(cut_answer=40),
    "answer lost": Trouble(cut_answer=0),
    "answer cut in its body": Trouble(cut_answer=2 << 20),
    "answer stalls in its body": Trouble(cut_answer=2 << 20, stall=True),
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_every_call_gets_through_a_bad_line(
    place: S3Place, proxy: Proxy, s3_server: S3Server, trouble: Trouble
) -> None:
    bare = S3Objects(place, keys=s3_server.keys)
    store = patient(bare)
    proxy.expect(trouble)
    made = store.put_new("a", data=LARGE)
    proxy.expect(trouble, trouble)
    assert store.get("a").data == LARGE
    proxy.expect(trouble)
    assert store.get_range("a", offset=1, length=3 << 19) == LARGE[1 : 1 + (3 << 19)]
    proxy.expect(trouble)
    replaced = store.replace("a", data=LARGE[::-1], version=made.version)
    proxy.expect(trouble)
    assert store.info("a").version == replaced.version
    proxy.expect(trouble)
    assert [one.name for one in store.list("")] == ["a"]
    proxy.expect(trouble)
    store.delete("a")
    assert list(store.list("")) == []


def test_a_bad_line_is_told_where_nobody_tries_again(place: S3Place, proxy: Proxy, s3_server: S3Server) -> None:
    bare = S3Objects(place, keys=s3_server.keys)
    bare.put("a", data=LARGE)
    for name in ("503", "answer cut in its body", "answer stalls in its body"):
        proxy.expect(TROUBLES[name])
        with pytest.raises(StoreUnreachableError):
            bare.get("a")


def test_a_slow_line_is_no_fault(place: S3Place, proxy: Proxy, s3_server: S3Server) -> None:
    store = S3Objects(place, keys=s3_server.keys)
    store.put("a", data=LARGE)
    proxy.expect(Trouble(bytes_per_second=1 << 20))
    began = time.monotonic()
    assert store.get("a").data == LARGE
    assert time.monotonic() - began > place.timeout.total_seconds()


def test_a_server_that_is_killed_and_started_again_has_all_or_nothing(tmp_path: Path) -> None:
    """A server of its own, killed again and again while four threads write; what was said to be there is there."""
    with S3Server(tmp_path) as server:
        place = S3Place(endpoint=server.endpoint, bucket=server.bucket(), timeout=timedelta(seconds=5))
        store = patient(S3Objects(place, keys=server.keys))
        with ThreadPoolExecutor(4) as pool:
            puts = [pool.submit(store.put, f"packs/{number}", data=LARGE) for number in range(24)]
            for _ in range(2):
                time.sleep(0.4)
                server.kill()
                server.start()
            for put in puts:
                put.result()
        for number in range(24):
            assert store.get(f"packs/{number}").data == LARGE
        assert len(list(store.list("packs/"))) == 24


def test_wrong_keys_and_a_bucket_that_is_gone_are_told(s3_server: S3Server, place: S3Place) -> None:
    wrong = S3Keys(access_key=s3_server.access_key, secret_key="guessed")
    with pytest.raises(PreconditionError, match="does not accept the secret key"):
        S3Objects(place, keys=lambda: wrong).get("a")
    unknown = S3Keys(access_key="nobody", secret_key="guessed")
    with pytest.raises(PreconditionError, match="does not know the access key"):
        list(S3Objects(place, keys=lambda: unknown).list(""))
    gone = S3Objects(replace(place, bucket="was-here-once"), keys=s3_server.keys)
    for call in (lambda: gone.info("a"), lambda: gone.put("a", data=b"y"), lambda: gone.delete("a")):
        with pytest.raises(PreconditionError, match="there is no bucket 'was-here-once'"):
            call()
    assert [one.severity for one in gone.findings()] == [Severity.REFUSAL]


def test_keys_that_may_only_read_are_enough_to_read(s3_server: S3Server, place: S3Place) -> None:
    S3Objects(place, keys=s3_server.keys).put("a", data=b"x")
    reader = S3Objects(place, keys=s3_server.reader_keys)
    assert reader.get("a").data == b"x"
    assert [one.name for one in reader.list("")] == ["a"]
    with pytest.raises(ObjectNotFoundError):
        reader.get("b")
    with pytest.raises(PreconditionError, match="does not allow these keys to write b"):
        reader.put("b", data=b"x")
    findings = {one.check: one for one in reader.findings()}
    assert findings["replica"].severity is Severity.OK
    assert findings["replica writes"].severity is Severity.WARNING
    assert "this is enough to restore" in findings["replica writes"].message


def test_doctor_tries_conditions_and_locks(s3_server: S3Server, place: S3Place) -> None:
    found = S3Objects(place, keys=s3_server.keys).findings()
    assert [(one.check, one.severity) for one in found] == [
        ("replica", Severity.OK), ("replica writes", Severity.OK),
    ]  # fmt: skip
    wanted = replace(place, object_lock=ObjectLock.COMPLIANCE)
    refused = [one for one in S3Objects(wanted, keys=s3_server.keys).findings() if one.severity is Severity.REFUSAL]
    assert [one.check for one in refused] == ["replica locks"]
    assert "has no Object Lock" in refused[0].message
    locked = replace(wanted, bucket=s3_server.bucket(object_lock=True))
    assert {one.severity for one in S3Objects(locked, keys=s3_server.keys).findings()} == {Severity.OK}
    unlocked = S3Objects(replace(locked, object_lock=ObjectLock.OFF), keys=s3_server.keys).findings()
    assert "keeps old versions" in unlocked[-1].message
