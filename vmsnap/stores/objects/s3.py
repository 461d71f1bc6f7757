"""``ObjectStore`` in a bucket of an S3 server, through boto3. API: Amazon S3 API Reference, version 2006-03-01.

Needs conditional writes, which ``findings`` tries. With Object Lock the bucket keeps versions, so an object is removed by
removing every version of it. Calls are made once: ``RetryingObjects`` makes them again. boto3 is loaded at the first call.

Some servers (SeaweedFS 4) keep an empty object where a write was cut before its first byte, so an empty object counts as none.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vmsnap.errors import (
    DriverError,
    HeldError,
    ObjectConflictError,
    ObjectNotFoundError,
    PreconditionError,
    StoreUnreachableError,
    VmsnapError,
)
from vmsnap.model.guest import Finding
from vmsnap.model.objects import ObjectLock, S3Keys, S3Place
from vmsnap.ports.objects import ObjectInfo, StoredObject
from vmsnap.stores.objects import s3_errors, s3_findings
from vmsnap.stores.objects.ordering import in_order
from vmsnap.stores.objects.s3_client import new_client, sends_checksums

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_LARGE_BYTES = 128 << 10
"""The cheaper storage classes bill smaller objects as if they had this size, so those stay in the standard one."""
_BUCKET_SEEN_SECONDS = 60.0


def _no_keys() -> S3Keys | None:
    return None


class S3Objects:
    """Keeps objects in a bucket.

    ``keys`` is asked for the keys when the first call is made, and again when the server says that they have expired; None:
    boto3 looks for them itself. ``page`` is how many objects a listing asks for at a time.
    """

    def __init__(self, place: S3Place, *, keys: Callable[[], S3Keys | None] = _no_keys, page: int = 1000) -> None:
        self._place = place
        self._keys = keys
        self._page = page
        self._guard = threading.Lock()
        self._made: tuple[S3Client, S3Keys | None] | None = None
        self._bucket_seen = float("-inf")
        server = urlsplit(place.endpoint).netloc if place.endpoint else "AWS"
        self._where = s3_errors.Where(server=server, bucket=place.bucket)

    def findings(self) -> tuple[Finding, ...]:
        """Look whether the bucket can be used. Puts an object there for a moment, to try conditional writes."""
        return s3_findings.look(self, place=self._place, call=self._call)

    def put(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object, over one of that name where there is one."""
        return self._put(name, data=data, retain_until=retain_until, condition={})

    def put_new(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object that must not be there yet."""
        try:
            return self._put(name, data=data, retain_until=retain_until, condition={"IfNoneMatch": "*"})
        except ObjectConflictError:
            remains = self._look(name)
            if remains.size_bytes:
                raise
            condition = {"IfMatch": f'"{remains.version}"'}
            return self._put(name, data=data, retain_until=retain_until, condition=condition)

    def replace(self, name: str, *, data: bytes, version: str) -> ObjectInfo:
        """Write an object over the one of that version."""
        try:
            return self._put(name, data=data, retain_until=None, condition={"IfMatch": f'"{version}"'})
        except ObjectNotFoundError as error:  # AWS says so of one that is gone, others that the condition failed
            raise ObjectConflictError(error.brief, details=error.details, remedy="read it again") from error

    def get(self, name: str) -> StoredObject:
        """Read a whole object."""
        with self._call(f"read {name}") as client:
            answer = client.get_object(Bucket=self._place.bucket, Key=self._key(name))
            data = answer["Body"].read()
        info = self._info(name, answer)
        if info.size_bytes != len(data):
            raise self._disorderly(f"{len(data)} bytes came of {info.size_bytes}")
        if not data:
            raise _nothing_there(name)
        return StoredObject(info=info, data=data)

    def get_range(self, name: str, *, offset: int, length: int) -> bytes:
        """Read a part of an object."""
        if length == 0:
            return b""
        try:
            return self._get_range(name, offset=offset, length=length)
        except DriverError as error:
            if s3_errors.code_of(error) == "InvalidRange":
                self.info(name)  # raises where it is empty
            raise

    def _get_range(self, name: str, *, offset: int, length: int) -> bytes:
        with self._call(f"read {name}") as client:
            part = f"bytes={offset}-{offset + length - 1}"
            answer = client.get_object(Bucket=self._place.bucket, Key=self._key(name), Range=part)
            if answer["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.PARTIAL_CONTENT:
                raise DriverError(f"{self._where.server} knows no ranges", remedy="use a server that does")
            data = answer["Body"].read()
        if len(data) == length:
            return data
        total = answer.get("ContentRange", "").rpartition("/")[2]
        if not total.isdecimal() or int(total) >= offset + length:
            raise self._disorderly(f"{len(data)} bytes came of {length}")
        raise DriverError(
            f"the object {name} ends at byte {total}, before byte {offset + length}",
            remedy="run 'vmsnap verify' for the snapshots that use it",
        )

    def info(self, name: str) -> ObjectInfo:
        """Describe an object without reading it."""
        found = self._look(name)
        if not found.size_bytes:
            raise _nothing_there(name)
        return found

    def _look(self, name: str) -> ObjectInfo:
        try:
            with self._call(f"look at {name}") as client:
                answer = client.head_object(Bucket=self._place.bucket, Key=self._key(name))
        except ObjectNotFoundError:
            self._require_bucket()  # the answer to HEAD has no words: it may as well be the bucket that is gone
            raise
        return self._info(name, answer)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose names begin so, in the order of their names."""
        return in_order(self._listed(prefix), prefix=prefix)

    def delete(self, name: str) -> None:
        """Remove an object. Content where it is gone. Raises HeldError where it is locked."""
        doing = f"remove {name}"
        if self._place.object_lock is ObjectLock.OFF:
            with self._call(doing) as client:
                client.delete_object(Bucket=self._place.bucket, Key=self._key(name))
            return
        # The newest version goes last: as long as any is locked, the object is there.
        for version in reversed(list(self._versions(name))):
            try:
                with self._call(doing) as client:
                    client.delete_object(Bucket=self._place.bucket, Key=self._key(name), VersionId=version)
            except PreconditionError as error:
                until = self._locked_until(name, version=version)
                if until is None:
                    raise
                raise HeldError(
                    f"the object {name} is locked until {until:%Y-%m-%d %H:%M:%S} UTC",
                    details=error.details,
                    remedy="wait; nobody may remove it before",
                ) from error

    def retain(self, name: str, *, until: datetime) -> None:
        """Lock an object for at least so long, never shorter than before."""
        if self._place.object_lock is ObjectLock.OFF:
            return
        now = self.info(name).retained_until
        if now is not None and now >= until.replace(microsecond=0):
            return
        with self._call(f"lock {name}") as client:
            client.put_object_retention(
                Bucket=self._place.bucket,
                Key=self._key(name),
                Retention={"Mode": self._lock_mode, "RetainUntilDate": until},
            )

    def _listed(self, prefix: str) -> Iterator[ObjectInfo]:
        own = f"{self._place.prefix}/" if self._place.prefix else ""
        after: dict[str, Any] = {}
        while True:
            with self._call(f"list {prefix or 'all objects'}") as client:
                answer = client.list_objects_v2(
                    Bucket=self._place.bucket, Prefix=own + prefix, MaxKeys=self._page, **after
                )
            self._require_listing(answer)
            for one in answer.get("Contents", ()):
                name = one["Key"].removeprefix(own)
                if one["Size"]:
                    yield ObjectInfo(name=name, size_bytes=one["Size"], version=self._version(one))
            token = answer.get("NextContinuationToken")
            if not answer.get("IsTruncated") or not token:
                return
            after = {"ContinuationToken": token}

    def _put(self, name: str, *, data: bytes, retain_until: datetime | None, condition: dict[str, Any]) -> ObjectInfo:
        place = self._place
        headers = dict(condition)
        if place.storage_class is not None and len(data) >= _LARGE_BYTES:
            headers["StorageClass"] = place.storage_class
        if place.kms_key is not None:
            headers |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": place.kms_key}
        until = retain_until if place.object_lock is not ObjectLock.OFF else None
        if until is not None and until <= datetime.now(UTC):
            until = None
        if until is not None:
            headers |= {"ObjectLockMode": self._lock_mode, "ObjectLockRetainUntilDate": until}
        if place.object_lock is not ObjectLock.OFF and not self._checksums:
            # Servers want it for whatever they lock, be it only by a rule of the bucket.
            headers["ContentMD5"] = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        with self._call(f"write {name}") as client:
            answer = client.put_object(Bucket=place.bucket, Key=self._key(name), Body=data, **headers)
        return ObjectInfo(name=name, size_bytes=len(data), version=self._version(answer), retained_until=until)

    def _info(self, name: str, answer: Any) -> ObjectInfo:
        if "ContentLength" not in answer:
            raise self._disorderly("no length")
        return ObjectInfo(
            name=name,
            size_bytes=answer["ContentLength"],
            version=self._version(answer),
            retained_until=_retained_until(answer),
        )

    def _version(self, answer: Any) -> str:
        tag: str = answer.get("ETag", "")
        if not tag:
            raise self._disorderly("no ETag")
        return tag.strip('"')

    def _require_listing(self, answer: Any) -> None:
        """Raise StoreUnreachableError for a listing that does not say whether it is whole: it is no empty bucket."""
        if "IsTruncated" not in answer:
            raise self._disorderly("no listing")

    def _disorderly(self, what: str) -> StoreUnreachableError:
        """Return the error for an answer that was cut: what had come of its head counts as a head."""
        return StoreUnreachableError(
            f"{self._where.server} did not answer in order: {what}", remedy="look whether the server is up"
        )

    @property
    def _lock_mode(self) -> Any:
        return self._place.object_lock.upper()

    @property
    def _checksums(self) -> bool:
        return sends_checksums(self._place)

    def _key(self, name: str) -> str:
        return f"{self._place.prefix}/{name}" if self._place.prefix else name

    def _versions(self, name: str) -> Iterator[str]:
        """Yield the versions of an object and the marks of its removals, newest first."""
        key = self._key(name)
        after: dict[str, Any] = {}
        while True:
            with self._call(f"list the versions of {name}") as client:
                answer = client.list_object_versions(Bucket=self._place.bucket, Prefix=key, **after)
            self._require_listing(answer)
            found: list[Any] = [*answer.get("Versions", ()), *answer.get("DeleteMarkers", ())]
            own = [one for one in found if one["Key"] == key]
            yield from (one["VersionId"] for one in sorted(own, key=lambda one: one["LastModified"], reverse=True))
            if not answer.get("IsTruncated") or any(one["Key"] > key for one in found):
                return
            after = {"KeyMarker": answer["NextKeyMarker"], "VersionIdMarker": answer["NextVersionIdMarker"]}

    def _locked_until(self, name: str, *, version: str) -> datetime | None:
        """Return until when a version is locked; None where it is not, or not any more."""
        with self._call(f"look at {name}") as client:
            answer = client.head_object(Bucket=self._place.bucket, Key=self._key(name), VersionId=version)
        until = _retained_until(answer)
        return until if until is not None and until > datetime.now(UTC) else None

    def _require_bucket(self) -> None:
        if time.monotonic() - self._bucket_seen > _BUCKET_SEEN_SECONDS:
            with self._call("look into the bucket") as client:
                client.list_objects_v2(Bucket=self._place.bucket, MaxKeys=1)

    @contextmanager
    def _call(self, doing: str) -> Iterator[S3Client]:
        """Make one call: its errors are vmsnap's, and expired keys are asked for anew."""
        client, keys = self._client()
        try:
            with s3_errors.translated(doing, where=self._where):
                yield client
        except VmsnapError as error:
            if isinstance(error, PreconditionError):
                self._renew_keys(keys, error)
            raise
        self._bucket_seen = time.monotonic()

    def _renew_keys(self, used: S3Keys | None, error: PreconditionError) -> None:
        """Raise StoreUnreachableError, so that the call is made again, where other keys are there than were used."""
        code = s3_errors.code_of(error)
        if used is None or code not in s3_errors.EXPIRED | s3_errors.DENIED | {"InvalidAccessKeyId"}:
            return
        if self._keys() == used:
            return
        with self._guard:
            if self._made is not None and self._made[1] == used:
                self._made = None
        raise StoreUnreachableError(
            f"the keys for {self._where.server} were changed", details=error.details, remedy="try again"
        ) from error

    def _client(self) -> tuple[S3Client, S3Keys | None]:
        with self._guard:
            if self._made is None:
                keys = self._keys()
                with s3_errors.translated("begin", where=self._where):
                    self._made = (new_client(self._place, keys=keys), keys)
            return self._made


def _nothing_there(name: str) -> ObjectNotFoundError:
    return ObjectNotFoundError(
        f"the object {name} is not there",
        details="it is empty: what a server keeps of a write that was cut",
        remedy="run 'vmsnap verify'",
    )


def _retained_until(answer: Any) -> datetime | None:
    until = answer.get("ObjectLockRetainUntilDate")
    return None if until is None else until.astimezone(UTC)
