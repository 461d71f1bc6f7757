"""Where an object store is, and the keys to it: values that ``vmsnap.toml`` and its credentials give."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from pathlib import Path

ARCHIVE_CLASSES = frozenset({"GLACIER", "DEEP_ARCHIVE"})
"""Storage classes of S3 whose objects cannot be read at once."""


class ObjectLock(StrEnum):
    """Who may shorten the lock of an object (S3 Object Lock): with ``COMPLIANCE`` nobody, with ``GOVERNANCE`` a few."""

    OFF = "off"
    COMPLIANCE = "compliance"
    GOVERNANCE = "governance"


@dataclass(frozen=True, kw_only=True)
class S3Keys:
    """Keys of an S3 server. All are secrets, and shown by no ``repr``."""

    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class S3Place:
    """A part of a bucket of an S3 server, and how to talk to the server.

    ``prefix`` is what all names begin with, without a slash at its end. ``endpoint`` None: AWS. ``path_style`` None: only with
    an endpoint; ``checksums`` None: only without. ``timeout``: how long the server may say nothing.
    """

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    ca_file: Path | None = None
    path_style: bool | None = None
    checksums: bool | None = None
    storage_class: str | None = None
    kms_key: str | None = None
    object_lock: ObjectLock = ObjectLock.OFF
    connections: int = 16
    timeout: timedelta = timedelta(minutes=1)
