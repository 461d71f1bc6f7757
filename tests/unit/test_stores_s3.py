from __future__ import annotations

import base64
import hashlib
import logging
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.unit.s3_server import Answer, ScriptedS3, failure, scripted
from vmsnap.errors import (
    DriverError,
    HeldError,
    NoSpaceError,
    ObjectConflictError,
    ObjectNotFoundError,
    PreconditionError,
    StoreUnreachableError,
    VmsnapError,
)
from vmsnap.model.guest import Severity
from vmsnap.model.objects import ObjectLock, S3Keys, S3Place
from vmsnap.stores.objects.s3 import S3Objects

KEYS = S3Keys(access_key="AKIAEXAMPLE", secret_key="very-secret-key", session_token="very-secret-token")
LISTED = Answer(body=b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")


_ADDRESS = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")


def port(server: ScriptedS3) -> int:
    return int(server.endpoint.rsplit(":", maxsplit=1)[1])


def store(server: ScriptedS3, *, keys: S3Keys | None = KEYS, **more: object) -> S3Objects:
    place = S3Place(bucket="abc", endpoint=server.endpoint, timeout=timedelta(seconds=2), **more)  # type: ignore[arg-type]
    return S3Objects(place, keys=lambda: keys)


@pytest.mark.parametrize(
    ("status", "code", "kind", "said", "advised"),
    [
        (404, "NoSuchKey", ObjectNotFoundError, "could not read a/b: it is not there", "verify"),
        (404, "NoSuchBucket", PreconditionError, "there is no bucket 'abc' at 127.0.0.1:", "create it"),
        (403, "InvalidAccessKeyId", PreconditionError, "does not know the access key", "credential"),
        (403, "SignatureDoesNotMatch", PreconditionError, "does not accept the secret key", "credential"),
        (403, "AccessDenied", PreconditionError, "does not allow these keys to read a/b", "s3:GetObject"),
        (400, "ExpiredToken", PreconditionError, "session token has expired", "credential"),
        (403, "RequestTimeTooSkewed", PreconditionError, "this host's clock differs too much", "chrony"),
        (301, "PermanentRedirect", PreconditionError, "names no region for 'abc'", "region"),
        (400, "IllegalLocationConstraintException", PreconditionError, "'abc' is in another region", "region"),
        (403, "InvalidObjectState", PreconditionError, "is in an archive", "lifecycle"),
        (400, "KMS.DisabledException", PreconditionError, "the key of its KMS", "kms_key"),
        (403, "QuotaExceeded", NoSpaceError, "the quota of the bucket 'abc'", "prune"),
        (507, "Odd", NoSpaceError, "has no room left", "prune"),
        (501, "NotImplemented", DriverError, "cannot do what was asked", "vmsnap doctor"),
        (416, "InvalidRange", DriverError, "an object ends before", "verify"),
        (418, "Teapot", DriverError, "could not read a/b: 418 Teapot: in words", "log"),
        (500, "InternalError", StoreUnreachableError, "did not answer, or not in order", "vmsnap doctor"),
        (503, "SlowDown", StoreUnreachableError, "did not answer, or not in order", "vmsnap doctor"),
        (502, "Odd", StoreUnreachableError, "did not answer, or not in order", "vmsnap doctor"),
        (429, "Odd", StoreUnreachableError, "did not answer, or not in order", "vmsnap doctor"),
        (409, "ConditionalRequestConflict", StoreUnreachableError, "did not answer", "vmsnap doctor"),
    ],
)
def test_errors_of_the_server_say_what_to_do(
    status: int, code: str, kind: type[VmsnapError], said: str, advised: str
) -> None:
    with scripted(failure(status, code)) as server, pytest.raises(VmsnapError) as caught:
        store(server).get("a/b")
    assert type(caught.value) is kind
    assert said in caught.value.brief
    assert advised in (caught.value.remedy or "")
    assert code in f"{caught.value.brief} {caught.value.details}" or kind is ObjectNotFoundError


def test_both_clocks_are_told_where_they_differ() -> None:
    more = "<RequestTime>20261121T000000Z</RequestTime><ServerTime>2026-11-21T09:00:00Z</ServerTime>"
    with (
        scripted(failure(403, "RequestTimeTooSkewed", more=more)) as server,
        pytest.raises(PreconditionError) as caught,
    ):
        store(server).get("a")
    assert "this host: 20261121T000000Z; of the server: 2026-11-21T09:00:00Z" in (caught.value.details or "")


def test_what_is_cut_in_the_middle_may_be_tried_again() -> None:
    with scripted(Answer(body=b"half", promised=8)) as server:
        with pytest.raises(StoreUnreachableError):
            store(server).get("a")
        with pytest.raises(StoreUnreachableError):
            S3Objects(S3Place(bucket="abc", endpoint="http://127.0.0.1:9"), keys=lambda: KEYS).get("a")
        assert len(server.asked) == 1, "nothing is tried again in secret"


def test_a_page_that_is_no_xml_is_an_error_of_the_server() -> None:
    with scripted(Answer(status=502, body=b"<html>Bad Gateway</html>")) as server, pytest.raises(StoreUnreachableError):
        list(store(server).list(""))
    with scripted(Answer(body=b"<html>Log in to the hotel's network</html")) as server, pytest.raises(DriverError):
        list(store(server).list(""))


def test_a_server_that_knows_no_ranges_is_found_out() -> None:
    with scripted(Answer(body=b"all of it")) as server, pytest.raises(DriverError, match="knows no ranges"):
        store(server).get_range("a", offset=1, length=2)


def test_a_missing_object_in_a_missing_bucket_is_told_as_the_bucket() -> None:
    with scripted(Answer(status=404), failure(404, "NoSuchBucket")) as server, pytest.raises(PreconditionError):
        store(server).info("a")
    with scripted(Answer(status=404), LISTED, Answer(status=404)) as server:
        objects = store(server)
        for _ in range(3):
            with pytest.raises(ObjectNotFoundError):
                objects.info("a")
        assert len(server.asked) == 4, "the bucket is looked for once"


def test_a_write_asks_for_all_that_was_set() -> None:
    with scripted(Answer()) as server:
        objects = store(server, storage_class="STANDARD_IA", kms_key="arn:key", object_lock=ObjectLock.GOVERNANCE)
        until = datetime.now(UTC) + timedelta(days=9)
        large = bytes(128 << 10)
        objects.put_new("packs/x", data=large, retain_until=until)
        objects.replace("lease", data=b"small", version="e")
        first, second = server.asked
    assert first.path == "/abc/packs/x"
    assert first.headers["If-None-Match"] == "*"
    assert first.headers["x-amz-storage-class"] == "STANDARD_IA"
    assert first.headers["x-amz-server-side-encryption"] == "aws:kms"
    assert first.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "arn:key"
    assert first.headers["x-amz-object-lock-mode"] == "GOVERNANCE"
    assert first.headers["x-amz-object-lock-retain-until-date"].startswith(f"{until:%Y-%m-%dT%H:%M}")
    assert first.headers["Content-MD5"] == base64.b64encode(hashlib.md5(large, usedforsecurity=False).digest()).decode()
    assert first.headers["x-amz-security-token"] == "very-secret-token"
    assert first.headers.get("x-amz-checksum-crc32") is None
    assert second.headers["If-Match"] == '"e"'
    assert second.headers["x-amz-storage-class"] is None
    assert second.headers["x-amz-object-lock-mode"] is None


def test_a_lock_that_would_have_ended_already_is_not_asked_for() -> None:
    with scripted(Answer()) as server:
        past = datetime.now(UTC) - timedelta(days=1)
        info = store(server, object_lock=ObjectLock.COMPLIANCE).put("a", data=b"y", retain_until=past)
        assert info.retained_until is None
        assert server.asked[0].headers["x-amz-object-lock-mode"] is None


def test_new_checksums_are_sent_where_they_are_wanted() -> None:
    with scripted(Answer()) as server:
        store(server, checksums=True).put("a", data=b"x")
        assert server.asked[0].headers["x-amz-sdk-checksum-algorithm"] is not None


def test_buckets_can_stand_in_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(Answer()) as server:
        endpoint = server.endpoint.replace("127.0.0.1", "localhost")
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(*_ADDRESS, ("127.0.0.1", port(server)))])
        S3Objects(S3Place(bucket="abc", endpoint=endpoint, path_style=False, prefix="p"), keys=lambda: KEYS).put(
            "a", data=b"x"
        )
        assert server.asked[0].headers["Host"].startswith("abc.localhost:")
        assert server.asked[0].path == "/p/a"


def test_expired_keys_are_read_anew() -> None:
    new = S3Keys(access_key="AKIANEW", secret_key="s", session_token="t")
    given = iter([KEYS, new, new])
    with scripted(failure(400, "ExpiredToken"), Answer(body=b"x")) as server:
        objects = S3Objects(S3Place(bucket="abc", endpoint=server.endpoint), keys=lambda: next(given))
        with pytest.raises(StoreUnreachableError):
            objects.get("a")
        assert objects.get("a").data == b"x"
        assert "AKIANEW" in server.asked[1].headers["Authorization"]


def test_keys_that_are_still_the_same_are_wrong() -> None:
    with scripted(failure(400, "ExpiredToken")) as server, pytest.raises(PreconditionError, match="expired"):
        store(server).get("a")


def test_without_keys_anywhere_it_is_said_where_they_belong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with scripted(Answer()) as server, pytest.raises(PreconditionError, match="there are no keys for") as caught:
        store(server, keys=None).get("a")
    assert "credential" in (caught.value.remedy or "")


def test_no_secret_reaches_a_log_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("boto3", "botocore", "urllib3"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    with caplog.at_level(logging.DEBUG), scripted(failure(403, "SignatureDoesNotMatch")) as server:
        objects = store(server)
        with pytest.raises(PreconditionError) as caught:
            objects.put("a", data=b"x")
        told = f"{caplog.text} {caught.value!r} {caught.value.details} {objects!r} {KEYS!r} {caught.value.__cause__!r}"
    assert "very-secret" not in told
    assert "AKIAEXAMPLE" not in told


def test_a_locked_object_is_held_and_any_other_refusal_is_one_of_rights() -> None:
    until = f"{datetime.now(UTC) + timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}"
    versions = Answer(
        body=b"<ListVersionsResult><IsTruncated>false</IsTruncated><Version><Key>a</Key><VersionId>v</VersionId>"
        b"<LastModified>2026-01-01T00:00:00Z</LastModified></Version></ListVersionsResult>"
    )
    locked = Answer(headers={"x-amz-object-lock-retain-until-date": until})
    denied = failure(403, "AccessDenied")
    for head, kind in ((locked, HeldError), (Answer(), PreconditionError)):
        with scripted(versions, denied, head) as server, pytest.raises(PreconditionError) as caught:
            store(server, object_lock=ObjectLock.COMPLIANCE).delete("a")
        assert type(caught.value) is kind


def test_what_somebody_replaced_or_removed_is_a_conflict() -> None:
    for answer in (failure(412, "PreconditionFailed"), failure(404, "NoSuchKey")):
        with scripted(answer) as server, pytest.raises(ObjectConflictError):
            store(server).replace("a", data=b"y", version="v")


def test_the_remains_of_a_cut_write_are_nothing() -> None:
    empty = Answer(headers={"Content-Range": "bytes */0"})
    with scripted(empty) as server:
        objects = store(server)
        for call in (objects.get, objects.info):
            with pytest.raises(ObjectNotFoundError, match="the object a is not there"):
                call("a")
        server.answers = [failure(416, "InvalidRange"), empty]
        with pytest.raises(ObjectNotFoundError):
            objects.get_range("a", offset=0, length=1)
        server.answers = [failure(412, "PreconditionFailed"), empty, Answer()]
        objects.put_new("a", data=b"x")
        assert server.asked[-1].headers["If-Match"] == '"e"'
        server.answers = [failure(412, "PreconditionFailed"), Answer(body=b"theirs")]
        with pytest.raises(ObjectConflictError):
            objects.put_new("a", data=b"x")


# What doctor says


def test_a_server_that_writes_in_spite_of_conditions_is_refused() -> None:
    with scripted(Answer(body=b"<ListBucketResult/>")) as server:
        found = store(server).findings()
    refused = [one for one in found if one.severity is Severity.REFUSAL]
    assert [one.check for one in refused] == ["replica writes"]
    assert "writes in spite of If-None-Match and If-Match" in refused[0].message
    assert "update the server" in (refused[0].remedy or "")


def test_a_server_that_does_not_know_conditions_is_refused() -> None:
    with scripted(LISTED, failure(501, "NotImplemented"), LISTED) as server:
        found = store(server).findings()
    assert [(one.check, one.severity) for one in found][1] == ("replica writes", Severity.REFUSAL)
    assert "cannot do what was asked" in found[1].message


def test_a_server_that_is_not_there_is_one_finding() -> None:
    found = S3Objects(S3Place(bucket="abc", endpoint="http://127.0.0.1:9"), keys=lambda: KEYS).findings()
    assert [one.severity for one in found] == [Severity.REFUSAL]
    assert "127.0.0.1:9 did not answer" in found[0].message


def test_names_on_the_way_that_others_can_read_are_warned_of() -> None:
    with scripted(LISTED) as server:
        place = S3Place(bucket="abc", endpoint=server.endpoint.replace("127.0.0.1", "localhost"))
        assert not any("on the way" in one.message for one in S3Objects(place, keys=lambda: KEYS).findings())


def test_boto3_is_loaded_by_the_first_call_only() -> None:
    code = (
        "import sys; from vmsnap.stores.objects.s3 import S3Objects; from vmsnap.model.objects import S3Place; "
        "S3Objects(S3Place(bucket='abc')); sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
