"""Authentication of FORCERENEW: option 90 (RFC 3118 section 2) with a nonce of the client's own (RFC 6704).

A server gives the nonce to a client in the ACK of its first exchange and signs each later FORCERENEW with it.
"""

from __future__ import annotations

import hmac
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum

from vmsnap.dhcp.message import (
    DhcpMessage,
    MalformedMessageError,
    MessageType,
    Option,
    OptionCode,
    encode,
    option_parts,
)
from vmsnap.errors import PreconditionError

NONCE_BYTES = 16
HMAC_MD5 = 1

_PROTOCOL_RECONFIGURE_KEY = 3
_REPLAY_COUNTER = 0
_LAYOUT = struct.Struct("!BBBQB16s")
_HOPS = slice(3, 4)
_GIADDR = slice(24, 28)
_NTP_EPOCH_SECONDS = 2_208_988_800  # from 1900 to 1970 (RFC 5905)


class Proof(IntEnum):
    """What the last 16 bytes of the option are (RFC 6704 section 3.1)."""

    NONCE = 1
    DIGEST = 2


@dataclass(frozen=True, kw_only=True)
class Authentication:
    """Option 90 of the protocol 'reconfigure key'. ``value`` is a secret or a digest of 16 bytes."""

    proof: Proof
    replay: int
    value: bytes = field(repr=False)

    def encode(self) -> bytes:
        """Return the option's data. Raises ValueError for a value of another length or a replay beyond 64 bits."""
        if len(self.value) != NONCE_BYTES or not 0 <= self.replay < 1 << 64:
            raise ValueError("an authentication option holds 16 bytes and a 64 bit replay value")
        return _LAYOUT.pack(_PROTOCOL_RECONFIGURE_KEY, HMAC_MD5, _REPLAY_COUNTER, self.replay, self.proof, self.value)

    @staticmethod
    def decode(data: bytes) -> Authentication:
        """Read the option's data. Raises MalformedMessageError, also for protocols other than this one."""
        if len(data) != _LAYOUT.size:
            raise MalformedMessageError(f"DHCP option 90 holds {len(data)} bytes instead of {_LAYOUT.size}")
        protocol, algorithm, detection, replay, proof, value = _LAYOUT.unpack(data)
        if (protocol, algorithm, detection) != (_PROTOCOL_RECONFIGURE_KEY, HMAC_MD5, _REPLAY_COUNTER):
            raise MalformedMessageError(f"DHCP option 90 of protocol {protocol}, algorithm {algorithm}")
        if proof not in set(Proof):
            raise MalformedMessageError(f"DHCP option 90 with the type {proof}")
        return Authentication(proof=Proof(proof), replay=replay, value=value)


def authentication_of(message: DhcpMessage) -> Authentication | None:
    """Return option 90, or None where the message has none. Raises MalformedMessageError."""
    data = message.option(OptionCode.AUTHENTICATION)
    return None if data is None else Authentication.decode(data)


def nonce_of(message: DhcpMessage) -> bytes | None:
    """Return the nonce that an ACK hands out, or None where it hands out none that RFC 6704 knows."""
    try:
        found = authentication_of(message)
    except MalformedMessageError:
        return None
    if found is None or found.proof is not Proof.NONCE or message.message_type is not MessageType.ACK:
        return None
    return found.value


def takes_nonce(message: DhcpMessage) -> bool:
    """Tell whether the client that sent this can verify HMAC-MD5 with a nonce (option 145)."""
    return HMAC_MD5 in (message.option(OptionCode.FORCERENEW_NONCE_CAPABLE) or b"")


def sign(message: DhcpMessage, *, nonce: bytes, replay: int) -> DhcpMessage:
    """Return the message with option 90 that proves knowledge of the nonce; it holds for what ``encode`` returns.

    ``replay`` has to be greater than in every message before. Raises ValueError, PreconditionError without MD5.
    """
    blank = _with(message, authentication=Authentication(proof=Proof.DIGEST, replay=replay, value=bytes(NONCE_BYTES)))
    digest = _digest(bytearray(encode(blank)), nonce=nonce)
    return _with(message, authentication=Authentication(proof=Proof.DIGEST, replay=replay, value=digest))


def is_signed(data: bytes, *, message: DhcpMessage, nonce: bytes, after: int) -> bool:
    """Tell whether ``data``, which was decoded to ``message``, was signed with the nonce and is no repetition.

    ``after`` is the replay value of the last message that was signed rightly. Never raises for what a sender wrote.
    """
    try:
        found = authentication_of(message)
    except MalformedMessageError:
        return False
    if found is None or found.proof is not Proof.DIGEST or found.replay <= after:
        return False
    parts = [part for part in option_parts(data) if part.code == OptionCode.AUTHENTICATION]
    if len(parts) != 1:
        return False
    copy = bytearray(data)
    copy[parts[0].end - NONCE_BYTES : parts[0].end] = bytes(NONCE_BYTES)
    return hmac.compare_digest(_digest(copy, nonce=nonce), found.value)


class ReplayCounter:
    """Values that strictly rise: NTP timestamps, as RFC 3118 section 2 proposes, so that they rise over restarts."""

    def __init__(self, *, wall_seconds: Callable[[], float] = time.time) -> None:
        self._wall_seconds = wall_seconds
        self._last = 0

    def next(self) -> int:
        """Return a value greater than all before, also where the clock was set back."""
        seconds = self._wall_seconds() + _NTP_EPOCH_SECONDS
        self._last = max(self._last + 1, int(seconds * (1 << 32)) % (1 << 64))
        return self._last


def _with(message: DhcpMessage, *, authentication: Authentication) -> DhcpMessage:
    others = tuple(option for option in message.options if option.code != OptionCode.AUTHENTICATION)
    return replace(message, options=(*others, Option(OptionCode.AUTHENTICATION, authentication.encode())))


def _digest(data: bytearray, *, nonce: bytes) -> bytes:
    """Return HMAC-MD5 over a message whose digest is blank; hops and giaddr count as zero (RFC 3118 section 5.2)."""
    data[_HOPS] = bytes(1)
    data[_GIADDR] = bytes(4)
    try:
        return hmac.digest(nonce, data, "md5")
    except ValueError as exc:
        raise PreconditionError(
            "this host's OpenSSL does not offer MD5, which RFC 6704 demands",
            remedy="leave the rung 'forcerenew' out of the policy's ladder",
        ) from exc
