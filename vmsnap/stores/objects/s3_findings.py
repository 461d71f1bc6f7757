"""Whether a bucket can be used: what ``vmsnap doctor`` says of it."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vmsnap.errors import (
    HeldError,
    ObjectConflictError,
    PreconditionError,
    VmsnapError,
)
from vmsnap.model.guest import Finding, Severity
from vmsnap.model.objects import ObjectLock, S3Place
from vmsnap.ports.objects import ObjectStore

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Call = Callable[[str], "AbstractContextManager[S3Client]"]

_PROBES = "probes/"
_SERVERS = "update the server: AWS, SeaweedFS, MinIO and Ceph (from Tentacle on) know conditional writes"


def look(objects: ObjectStore, *, place: S3Place, call: Call) -> tuple[Finding, ...]:
    """Look whether the bucket is reached, keeps conditions, and locks where that is wanted."""
    return tuple(_findings(objects, place=place, call=call))


def _findings(objects: ObjectStore, *, place: S3Place, call: Call) -> Iterator[Finding]:
    server = urlsplit(place.endpoint).netloc if place.endpoint else "AWS"
    try:
        with call("look into the bucket") as client:
            client.list_objects_v2(Bucket=place.bucket, Prefix=place.prefix, MaxKeys=1)
    except VmsnapError as error:
        yield _finding("replica", Severity.REFUSAL, _text(error), remedy=error.remedy)
        return
    yield _finding("replica", Severity.OK, f"the bucket '{place.bucket}' at {server} can be read")
    yield from _openness(place)
    yield from _conditions(objects, server=server)
    yield from _locks(place, call=call)


def _openness(place: S3Place) -> Iterator[Finding]:
    if place.endpoint is None or not place.endpoint.startswith("http:"):
        return
    host = urlsplit(place.endpoint).hostname or ""
    if host == "localhost" or _is_loopback(host):
        return
    message = f"what goes to {place.endpoint} and comes from there can be read on the way"
    yield _finding("replica", Severity.WARNING, message, remedy="use https, or encryption_credential, or both")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _conditions(objects: ObjectStore, *, server: str) -> Iterator[Finding]:
    """Try If-None-Match and If-Match with an object that is removed again."""
    name = f"{_PROBES}{secrets.token_hex(8)}"
    check = "replica writes"
    try:
        objects.put_new(name, data=b"first")
    except PreconditionError as error:
        yield _finding(check, Severity.WARNING, f"{_text(error)}: this is enough to restore", remedy=error.remedy)
        return
    except VmsnapError as error:
        yield _finding(check, Severity.REFUSAL, _text(error), remedy=error.remedy)
        return
    yield _conditions_of(objects, name=name, server=server)
    try:
        objects.delete(name)
    except HeldError as error:
        message = f"the bucket locks every object by a rule of its own: {error.brief}"
        remedy = "take the default retention off the bucket: vmsnap locks what has to be locked, and for how long"
        yield _finding(check, Severity.WARNING, message, remedy=remedy)
    except VmsnapError as error:
        yield _finding(check, Severity.WARNING, f"nothing can be removed: {_text(error)}", remedy=error.remedy)


def _conditions_of(objects: ObjectStore, *, name: str, server: str) -> Finding:
    check = "replica writes"
    lacking = []
    try:
        if not _refuses(lambda: objects.put_new(name, data=b"second")):
            lacking.append("If-None-Match")
        version = objects.info(name).version
        if not _refuses(lambda: objects.replace(name, data=b"third", version=_other(version))):
            lacking.append("If-Match")
        else:
            objects.replace(name, data=b"fourth", version=version)
    except VmsnapError as error:
        return _finding(check, Severity.REFUSAL, _text(error), remedy=error.remedy)
    if lacking:
        message = f"{server} writes in spite of {' and '.join(lacking)}: hosts could remove each other's data"
        return _finding(check, Severity.REFUSAL, message, remedy=_SERVERS)
    return _finding(check, Severity.OK, f"{server} keeps to If-None-Match and If-Match")


def _other(version: str) -> str:
    """Return a version of the same form that the object does not have."""
    return version[::-1] if version[::-1] != version else "0" * len(version)


def _refuses(write: Callable[[], object]) -> bool:
    """Tell whether a write was refused for its condition. Raises what else went wrong, such as 501 Not Implemented."""
    try:
        write()
    except ObjectConflictError:
        return True
    return False


def _locks(place: S3Place, *, call: Call) -> Iterator[Finding]:
    check = "replica locks"
    try:
        with call("read the bucket's versioning") as client:
            versioned = client.get_bucket_versioning(Bucket=place.bucket).get("Status") == "Enabled"
        if place.object_lock is ObjectLock.OFF:
            if versioned:
                message = "the bucket keeps old versions: what vmsnap removes there takes room until a rule removes it"
                remedy = "let a lifecycle rule of the bucket remove noncurrent versions after some days"
                yield _finding(check, Severity.WARNING, message, remedy=remedy)
            return
        with call("read the bucket's Object Lock") as client:
            found = client.get_object_lock_configuration(Bucket=place.bucket)
    except VmsnapError as error:
        severity = Severity.WARNING if place.object_lock is ObjectLock.OFF else Severity.REFUSAL
        yield _finding(check, severity, _text(error), remedy=error.remedy)
        return
    enabled = found.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") == "Enabled"
    if enabled and versioned:
        yield _finding(check, Severity.OK, f"the bucket '{place.bucket}' has Object Lock")
    else:
        lacking = "Object Lock" if versioned else "versions, which Object Lock needs"
        remedy = 'make a bucket with Object Lock, or set object_lock to "off"'
        yield _finding(check, Severity.REFUSAL, f"the bucket '{place.bucket}' has no {lacking}", remedy=remedy)


def _finding(check: str, severity: Severity, message: str, *, remedy: str | None = None) -> Finding:
    return Finding(check=check, severity=severity, message=message, remedy=remedy)


def _text(error: VmsnapError) -> str:
    last = (error.details or "").splitlines()[-1:]
    return f"{error.brief} ({last[0]})" if last else error.brief
