"""How to reach a Hyper-V host, and what may be sent to a script there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

from vmsnap.errors import ConfigError

DEFAULT_CONFIGURATION = "Microsoft.PowerShell"
"""The session configuration of every Windows. Another name is a constrained one (JEA)."""


class Authentication(StrEnum):
    """How to log in. ``NEGOTIATE`` takes Kerberos where it can, and NTLM otherwise."""

    NEGOTIATE = "negotiate"
    KERBEROS = "kerberos"
    NTLM = "ntlm"
    CERTIFICATE = "certificate"
    CREDSSP = "credssp"
    BASIC = "basic"


@dataclass(frozen=True, kw_only=True)
class Login:
    """An account and its password, which no ``repr`` shows. Sent to a script as a PSCredential, sealed."""

    user: str
    password: str = field(repr=False)


Parameter = str | int | bool | Sequence[str] | Login
"""What a script may be given."""

Row = Mapping[str, object]
"""One object that a script emits: texts, numbers, truths, nothing, and lists of these, by name."""


@dataclass(frozen=True, kw_only=True)
class HostConnection:
    """Where a host is and how to log in there. ``login`` None: a certificate, or the ticket of this process.

    ``authority``: a file with the certificates to trust instead of the system's. ``certificate`` and ``key``: files to
    log in with. ``operation_timeout``: what the host has for one request; the answer is waited for a little longer.
    Raises ConfigError for what would send a password in clear text.
    """

    host: str
    port: int = 5986
    tls: bool = True
    authentication: Authentication = Authentication.NEGOTIATE
    login: Login | None = None
    authority: str | None = None
    certificate: str | None = None
    key: str | None = None
    configuration: str = DEFAULT_CONFIGURATION
    connect_timeout: timedelta = timedelta(seconds=10)
    operation_timeout: timedelta = timedelta(seconds=60)

    def __post_init__(self) -> None:
        if not self.tls and self.authentication in {Authentication.BASIC, Authentication.CERTIFICATE}:
            raise ConfigError(
                f"hyperv.authentication '{self.authentication}' needs HTTPS: without it nothing keeps the session secret",
                remedy="leave tls = true and give the host an HTTPS listener, or use negotiate",
            )
        if self.login is None and self.authentication in {Authentication.BASIC, Authentication.CREDSSP}:
            raise ConfigError(
                f"hyperv.authentication '{self.authentication}' needs an account and its password",
                remedy="name them in the file of hyperv.credential",
            )

    @property
    def where(self) -> str:
        """Return the host for messages."""
        return f"{self.host}:{self.port}"
