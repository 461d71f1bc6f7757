"""Errors of S3 servers and of boto3 as vmsnap's own. Codes: Amazon S3 API Reference, Error Responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from vmsnap.errors import (
    BugError,
    DriverError,
    NoSpaceError,
    ObjectConflictError,
    ObjectNotFoundError,
    PreconditionError,
    StoreUnreachableError,
    VmsnapError,
)

EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"})
NOT_FOUND = frozenset({"NoSuchKey", "404", "NotFound", "NoSuchVersion"})
DENIED = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden"})
_CONFLICT = frozenset({"PreconditionFailed", "412"})
_TRANSIENT = frozenset(
    {
        "InternalError",
        "InternalServerError",
        "ServiceUnavailable",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "RequestTimeout",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",
        "OperationAborted",
        "IncompleteBody",
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "Busy",
    }
)
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class _Meaning:
    """What an error is: its class, what happened (``{bucket}``, ``{server}`` stand for them), and what to do."""

    kind: type[VmsnapError]
    brief: str
    remedy: str


def _precondition(brief: str, remedy: str) -> _Meaning:
    return _Meaning(kind=PreconditionError, brief=brief, remedy=remedy)


_CREDENTIAL = "correct the file that [replica] credential in vmsnap.toml names (or the environment's AWS_* variables)"
_REGION = "set [replica] region in vmsnap.toml to the bucket's region"
_KMS = "look whether [replica] kms_key in vmsnap.toml names a key that is enabled, and that these keys may use"
_MEANINGS: dict[str, _Meaning] = {
    "NoSuchBucket": _precondition(
        "there is no bucket '{bucket}' at {server}",
        "create it, or correct [replica] bucket in vmsnap.toml; where it was there before, ask who removed it",
    ),
    "InvalidAccessKeyId": _precondition("{server} does not know the access key", _CREDENTIAL),
    "SignatureDoesNotMatch": _precondition("{server} does not accept the secret key", _CREDENTIAL),
    "AuthFailure": _precondition("{server} does not accept the keys", _CREDENTIAL),
    "RequestTimeTooSkewed": _precondition(
        "this host's clock differs too much from that of {server}",
        "set the clock, and keep it right with chrony or systemd-timesyncd ('timedatectl' shows it)",
    ),
    "RequestExpired": _precondition(
        "{server} says that a request came too late", "look at the clocks of this host and of the server"
    ),
    "PermanentRedirect": _precondition("the bucket '{bucket}' is in another region", _REGION),
    "AuthorizationHeaderMalformed": _precondition("the bucket '{bucket}' is in another region", _REGION),
    "IllegalLocationConstraintException": _precondition("the bucket '{bucket}' is in another region", _REGION),
    "InvalidObjectState": _precondition(
        "an object in the bucket '{bucket}' is in an archive, and cannot be read",
        "restore it from the archive with the server's own tools, and end the lifecycle rule that put it there",
    ),
    "InvalidStorageClass": _precondition(
        "{server} does not know the storage class", "correct [replica] storage_class in vmsnap.toml, or take it out"
    ),
    "QuotaExceeded": _Meaning(
        kind=NoSpaceError, brief="the quota of the bucket '{bucket}' is used up", remedy="raise it, or prune snapshots"
    ),
    "InsufficientStorage": _Meaning(
        kind=NoSpaceError, brief="{server} has no room left", remedy="give it more, or prune snapshots"
    ),
    "NotImplemented": _Meaning(
        kind=DriverError,
        brief="{server} cannot do what was asked",
        remedy="run 'vmsnap doctor': it says what the server lacks; checksums = false may help where it is old",
    ),
    "ObjectLockConfigurationNotFoundError": _precondition(
        "the bucket '{bucket}' has no Object Lock",
        'make a bucket with Object Lock (it is given when a bucket is made), or set object_lock to "off"',
    ),
    "EntityTooLarge": _Meaning(
        kind=DriverError, brief="{server} does not take objects of this size", remedy="raise its limit to 64 MiB"
    ),
    "InvalidRange": _Meaning(kind=DriverError, brief="an object ends before what was to be read", remedy="verify it"),
}


@dataclass(frozen=True, kw_only=True)
class Where:
    """What messages say about the place."""

    server: str
    bucket: str


@contextmanager
def translated(doing: str, *, where: Where) -> Iterator[None]:
    """Let only errors of vmsnap leave. ``doing`` completes 'could not ...'."""
    from boto3.exceptions import Boto3Error  # noqa: PLC0415 - boto3 takes long to load
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415
    from urllib3.exceptions import HTTPError  # noqa: PLC0415

    try:
        yield
    except ClientError as error:
        raise _of_server(error.response, doing=doing, where=where) from error
    except BotoCoreError as error:
        raise _of_client(error, doing=doing, where=where) from error
    except RecursionError as error:  # boto3 follows a server that sends it from region to region until it falls
        raise PreconditionError(
            f"{where.server} names no region for '{where.bucket}'", details="PermanentRedirect", remedy=_REGION
        ) from error
    except (HTTPError, OSError, Boto3Error) as error:
        raise _unreachable(str(error), doing=doing, where=where) from error


def code_of(error: BaseException) -> str:
    """Return the code that a server answered, of which an error was made; nothing where there was no such answer."""
    return _code(getattr(error.__cause__, "response", None))


def _code(response: object) -> str:
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, Mapping) else ""


def _of_server(response: Mapping[str, Any], *, doing: str, where: Where) -> VmsnapError:
    code = _code(response)
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = f"{status} {code}: {response.get('Error', {}).get('Message', '')}".strip()
    details = "\n".join([f"could not {doing}", said, *_clocks(response, code=code)])
    if code in NOT_FOUND:
        return ObjectNotFoundError(f"could not {doing}: it is not there", details=details, remedy="run 'vmsnap verify'")
    if code in _CONFLICT:
        return ObjectConflictError(f"could not {doing}: it is another by now", details=details, remedy="try again")
    meaning = _MEANINGS.get(code)
    if meaning is None and code in EXPIRED:
        meaning = _precondition(f"{where.server} says that the session token has expired", _CREDENTIAL)
    if meaning is None and code.startswith("KMS."):
        meaning = _precondition(f"{where.server} cannot encrypt or decrypt with the key of its KMS", _KMS)
    if meaning is None and code in DENIED:
        meaning = _precondition(f"{where.server} does not allow these keys to {doing}", _RIGHTS)
    if meaning is None and status == 507:
        meaning = _MEANINGS["InsufficientStorage"]
    if meaning is not None:
        brief = meaning.brief.replace("{server}", where.server).replace("{bucket}", where.bucket)
        return meaning.kind(brief, details=details, remedy=meaning.remedy)
    if code in _TRANSIENT or status in _TRANSIENT_STATUS:
        return _unreachable(said, doing=doing, where=where)
    return DriverError(f"{where.server} could not {doing}: {said}", remedy="look at the server's own log")


_RIGHTS = (
    "give them s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject (with Object Lock also "
    "s3:PutObjectRetention, s3:GetObjectRetention, s3:ListBucketVersions and s3:DeleteObjectVersion)"
)


def _clocks(response: Mapping[str, Any], *, code: str) -> Iterator[str]:
    """Yield what the two clocks said, where that matters."""
    if code not in {"RequestTimeTooSkewed", "RequestExpired"}:
        return
    error = response.get("Error", {})
    here, there = error.get("RequestTime"), error.get("ServerTime")
    date = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    if there is None and date:
        there = parsedate_to_datetime(date).isoformat()
    if here or there:
        yield f"the clock of this host: {here or 'not told'}; of the server: {there or 'not told'}"


def _of_client(error: Exception, *, doing: str, where: Where) -> VmsnapError:
    from botocore import exceptions  # noqa: PLC0415 - boto3 takes long to load

    said = str(error)
    if isinstance(error, exceptions.SSLError) and "CERTIFICATE_VERIFY" in said.upper().replace(" ", "_"):
        return PreconditionError(
            f"the certificate of {where.server} is not trusted",
            details=said,
            remedy="name the file with the certificate of who signed it as [replica] ca_file in vmsnap.toml",
        )
    if isinstance(
        error,
        exceptions.NoCredentialsError
        | exceptions.PartialCredentialsError
        | exceptions.CredentialRetrievalError
        | exceptions.UnauthorizedSSOTokenError,
    ):
        return PreconditionError(f"there are no keys for {where.server}", details=said, remedy=_CREDENTIAL)
    if isinstance(error, exceptions.NoRegionError):
        return PreconditionError("it is not known which region the bucket is in", details=said, remedy=_REGION)
    if isinstance(error, exceptions.ParamValidationError):
        return BugError(f"could not {doing}: boto3 refuses the call", details=said)
    passing = (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
    )
    if isinstance(error, passing):
        return _unreachable(said, doing=doing, where=where)
    return DriverError(f"could not {doing}: {said}", remedy="look at [replica] in vmsnap.toml")


def _unreachable(said: str, *, doing: str, where: Where) -> StoreUnreachableError:
    return StoreUnreachableError(
        f"{where.server} did not answer, or not in order, when asked to {doing}",
        details=said,
        remedy="look whether the server is up and can be reached from this host ('vmsnap doctor' tries it)",
    )
