"""boto3's client for one place. boto3 is loaded when the first is made."""

from __future__ import annotations

import functools
import logging
import threading
from typing import TYPE_CHECKING, Any

from vmsnap.model.objects import S3Keys, S3Place

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

_NOISY = ("boto3", "botocore", "s3transfer", "urllib3")
_SESSIONS = threading.Lock()


def sends_checksums(place: S3Place) -> bool:
    """Tell whether the checksums that AWS has since 2025 are sent."""
    return place.endpoint is None if place.checksums is None else place.checksums


def new_client(place: S3Place, *, keys: S3Keys | None) -> S3Client:
    """Return a client of its own; ``keys`` None: boto3 looks for them. It makes each call once."""
    from botocore.config import Config  # noqa: PLC0415 - boto3 takes long to load
    from botocore.handlers import add_expect_header  # noqa: PLC0415

    for name in _NOISY:
        # Their debugging messages have headers in them, and those have session tokens.
        logging.getLogger(name).setLevel(logging.ERROR)
    path_style = place.endpoint is not None if place.path_style is None else place.path_style
    style: Any = "path" if path_style else "auto" if place.path_style is None else "virtual"
    checksums: Any = "when_supported" if sends_checksums(place) else "when_required"
    seconds = place.timeout.total_seconds()
    config = Config(
        connect_timeout=seconds,
        read_timeout=seconds,
        max_pool_connections=place.connections,
        retries={"mode": "standard", "total_max_attempts": 1},
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
        s3={"addressing_style": style},
        user_agent_extra="vmsnap",
        tcp_keepalive=True,
    )
    with _SESSIONS:
        session = _session()
        region = place.region or session.region_name or ("us-east-1" if place.endpoint is not None else None)
        client = session.client(
            "s3",
            endpoint_url=place.endpoint,
            region_name=region,
            verify=str(place.ca_file) if place.ca_file is not None else None,
            config=config,
            aws_access_key_id=keys.access_key if keys else None,
            aws_secret_access_key=keys.secret_key if keys else None,
            aws_session_token=keys.session_token if keys else None,
        )
    # Asking first whether a body may be sent costs a round trip for each object.
    client.meta.events.unregister("before-call.s3", add_expect_header)
    return client


@functools.cache
def _session() -> Session:
    """Return what knows the API of S3: reading its description takes half a second. Not for two threads at a time."""
    from boto3.session import Session  # noqa: PLC0415 - boto3 takes long to load

    return Session()
