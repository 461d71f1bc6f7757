"""Who talks to the endpoint, and the encryption of messages that Negotiate and CredSSP bring with them.

One object a connection: with Negotiate a connection, not a request, is authenticated (MS-NTHT). Encrypted messages are
[MS-WSMV] 2.2.9.1; long ones of CredSSP come in several parts.
"""

from __future__ import annotations

import atexit
import base64
import binascii
import os
import re
import struct
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import spnego

from vmsnap.testing.hyperv.service import User

_MUTUAL = "http://schemas.dmtf.org/wbem/wsman/1/wsman/secprofile/https/mutual"
_BOUNDARY = b"--Encrypted Boundary\r\n"
_END = b"--Encrypted Boundary--\r\n"
_OCTETS = b"\tContent-Type: application/octet-stream\r\n"
_NTLM = b"NTLMSSP"
_PART_BYTES = 16384
_PROTOCOLS = {
    "Negotiate": "application/HTTP-SPNEGO-session-encrypted",
    "CredSSP": "application/HTTP-CredSSP-session-encrypted",
}
# pyspnego's acceptor reads its accounts from one file, so one endpoint at a time.
_publishing = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do with a request: ``user`` where it is known whose it is, else a 401 with ``challenges``.

    ``token`` goes back with the answer where the exchange of tokens ends with it.
    """

    user: str | None = None
    challenges: tuple[str, ...] = ()
    token: str | None = None
    is_final: bool = False
    """A login was refused, and the connection ends."""


class Accounts:
    """The accounts of an endpoint, in the form that pyspnego wants."""

    def __init__(self, users: Mapping[str, User]) -> None:
        self.users = users

    @contextmanager
    def published(self) -> Iterator[None]:
        """Let pyspnego see the accounts inside the block."""
        with _publishing:
            file = _accounts_file()
            file.write_text("".join(f":{name}:{user.password}\n" for name, user in self.users.items()))
            try:
                yield
            finally:
                file.write_text("")


@lru_cache(maxsize=1)
def _accounts_file() -> Path:
    """Return the file that pyspnego reads accounts from.

    It is named by a variable of the process. That is set once and stays: a variable that goes breaks whoever walks
    through ``os.environ`` in another thread, and requests does at every request.
    """
    folder = tempfile.TemporaryDirectory(prefix="vmsnap-endpoint-")
    atexit.register(folder.cleanup)
    file = Path(folder.name) / "accounts"
    os.environ["NTLM_USER_FILE"] = str(file)
    return file


class Authentication:
    """One connection. ``mechanisms`` are of ``Basic``, ``Negotiate``, ``CredSSP``, ``Certificate``."""

    def __init__(self, accounts: Accounts, *, mechanisms: frozenset[str], certificate_user: str | None) -> None:
        self._accounts = accounts
        self._mechanisms = mechanisms
        self._certificate_user = certificate_user
        self._context: spnego.ContextProxy | None = None
        self._scheme = ""
        self._user: str | None = None

    @property
    def is_encrypting(self) -> bool:
        """Tell whether messages of this connection can be encrypted."""
        return self._context is not None and self._context.complete

    def judge(self, header: str) -> Verdict:
        """Judge a request's Authorization header."""
        scheme, _, value = header.partition(" ")
        if header == _MUTUAL and "Certificate" in self._mechanisms and self._certificate_user:
            return Verdict(user=self._certificate_user)
        if scheme == "Basic" and "Basic" in self._mechanisms:
            return self._basic(value)
        if scheme in {"Negotiate", "CredSSP"} and scheme in self._mechanisms:
            return self._tokens(scheme, value)
        if not header and self._user is not None:
            return Verdict(user=self._user)
        return self._challenge()

    def _challenge(self, *, is_final: bool = False) -> Verdict:
        offered = {"Basic": 'Basic realm="WSMAN"', "Negotiate": "Negotiate", "CredSSP": "CredSSP"}
        challenges = tuple(text for name, text in offered.items() if name in self._mechanisms)
        return Verdict(challenges=challenges, is_final=is_final)

    def _basic(self, value: str) -> Verdict:
        name, _, password = base64.b64decode(value).decode().partition(":")
        known = self._accounts.users.get(name)
        return Verdict(user=name) if known is not None and known.password == password else self._challenge()

    def _tokens(self, scheme: str, value: str) -> Verdict:
        try:
            token = base64.b64decode(value, validate=True)
        except binascii.Error:
            return self._challenge()
        with self._accounts.published():
            if self._context is None or self._context.complete or scheme != self._scheme:
                self._user, self._scheme = None, scheme
                self._context = spnego.server(protocol=_protocol(scheme, token), options=_options(scheme, token))
            try:
                reply = self._context.step(token)
            except spnego.exceptions.SpnegoError:
                self._context = None
                return self._challenge(is_final=True)
        answer = f"{scheme} {base64.b64encode(reply).decode('ascii')}" if reply else None
        if not self._context.complete:
            return Verdict(challenges=(answer or scheme,))
        principal = self._context.client_principal or ""
        self._user = next((name for name in self._accounts.users if name.lower() == principal.lower()), None)
        return Verdict(user=self._user, token=answer) if self._user else self._challenge()

    def decrypt(self, content: bytes) -> bytes:
        """Return the message in an encrypted request. Raises ValueError for one that is not for this connection."""
        if self._context is None:
            raise ValueError("nobody logged in on this connection")
        parts = content.removesuffix(_END).split(_BOUNDARY)[1:]
        message = b""
        for part in parts[1::2]:
            sealed = part.removeprefix(_OCTETS)
            length = struct.unpack("<i", sealed[:4])[0]
            try:
                message += self._context.unwrap_winrm(sealed[4 : 4 + length], sealed[4 + length :])
            except spnego.exceptions.SpnegoError as error:
                raise ValueError("the message was sealed with another key") from error
        return message

    def encrypt(self, message: bytes) -> tuple[str, bytes]:
        """Return the content type and the content of an encrypted answer."""
        if self._context is None:
            raise ValueError("nobody logged in on this connection")
        protocol = _PROTOCOLS[self._scheme]
        size = _PART_BYTES if self._scheme == "CredSSP" else max(1, len(message))
        pieces = [message[start : start + size] for start in range(0, len(message), size)] or [b""]
        content = b""
        for piece in pieces:
            sealed = self._context.wrap_winrm(piece)
            length = len(piece) + sealed.padding_length
            content += (
                _BOUNDARY
                + f"\tContent-Type: {protocol}\r\n".encode()
                + f"\tOriginalContent: type=application/soap+xml;charset=UTF-8;Length={length}\r\n".encode()
                + _BOUNDARY
                + _OCTETS
                + struct.pack("<i", len(sealed.header))
                + sealed.header
                + sealed.data
            )
        kind = "multipart/x-multi-encrypted" if len(pieces) > 1 else "multipart/encrypted"
        return f'{kind};protocol="{protocol}";boundary="Encrypted Boundary"', content + _END


def _protocol(scheme: str, token: bytes) -> str:
    if scheme == "CredSSP":
        return "credssp"
    return "ntlm" if token.startswith(_NTLM) else "negotiate"


def _options(scheme: str, token: bytes) -> spnego.NegotiateOptions:
    if scheme == "CredSSP":
        return spnego.NegotiateOptions.none
    return spnego.NegotiateOptions.use_ntlm if token.startswith(_NTLM) else spnego.NegotiateOptions.use_negotiate


def is_encrypted(content_type: str) -> bool:
    """Tell whether a request's content is encrypted."""
    return re.match(r"multipart/(x-multi-)?encrypted;", content_type) is not None
