"""What pypsrp and the libraries below it raise, as vmsnap's errors.

What matters is whether a request was acted upon. Before a pipeline was asked for, nothing was; once it was, a lost answer
leaves it open (UnknownOutcomeError). Codes of WS-Management are those of ``wsmerror.h``.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from enum import Enum

import requests
import spnego.exceptions
import urllib3.exceptions
from pypsrp.exceptions import AuthenticationError, WinRMError, WinRMTransportError, WSManFaultError

from vmsnap.errors import DriverError, HostUnreachableError, PreconditionError, UnknownOutcomeError, VmsnapError
from vmsnap.hypervisors.hyperv.connection import Authentication, HostConnection

try:
    from requests_credssp.exceptions import AuthenticationException, NTStatusException
except ImportError:  # it comes with the extra "credssp"
    _REFUSALS: tuple[type[Exception], ...] = (AuthenticationError, spnego.exceptions.SpnegoError)
else:
    _REFUSALS = (AuthenticationError, spnego.exceptions.SpnegoError, AuthenticationException, NTStatusException)

LIBRARY_ERRORS: tuple[type[Exception], ...] = (
    WinRMError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    OSError,
    *_REFUSALS,
    ImportError,
    ValueError,
)
"""Everything that a call of pypsrp may raise."""

OPERATION_TIMED_OUT = 2150858793
SHELL_GONE = 2150858843
_ACCESS_DENIED = 5
_NO_SUCH_RESOURCE = frozenset({2150858752, 2150859002, 2150858811})
_QUOTAS = frozenset(
    {
        2150858815,  # QUOTA_LIMIT
        *range(2150859173, 2150859177),  # shells, operations, user, system
        2150859179,  # users of shells
        *range(2150859236, 2150859243),  # the same of one plug-in
    }
)
_NOT_FOUND = 404
_UNAVAILABLE = 503
_CERTIFICATE_PROBLEMS = {
    9: "is not valid yet",
    10: "has expired",
    18: "is signed by itself",
    19: "comes from an authority that is not trusted here",
    20: "comes from an authority that is not trusted here",
    21: "comes from an authority that is not trusted here",
    62: "is for another name",
    64: "is for another address",
}
"""Codes of X509_verify_cert (openssl/x509_vfy.h)."""


class Stage(Enum):
    """How far a call had come."""

    OPENING = "before anything was asked for"
    ASKING = "while a script was sent"
    LISTENING = "while the script ran"


def translate(error: Exception, *, stage: Stage, connection: HostConnection) -> VmsnapError:
    """Return the error for what a call of pypsrp raised."""
    if isinstance(error, WSManFaultError):
        return _fault(error, stage=stage, connection=connection)
    certain = None if stage is Stage.LISTENING else _before_anything(error, connection=connection)
    if certain is not None:
        return certain
    if stage is Stage.OPENING:
        if isinstance(error, _REFUSALS):
            return _login_refused(error, connection=connection)
        if isinstance(error, requests.RequestException | urllib3.exceptions.HTTPError | OSError):
            return _unreachable(connection, error)
        return DriverError(f"{connection.where} does not speak PowerShell remoting as expected", details=_words(error))
    return UnknownOutcomeError(
        f"the line to {connection.where} broke {stage.value}; nobody knows what it did",
        details=_words(error),
        remedy="'vmsnap reconcile' looks for what bears the run's id, and removes it",
    )


def _fault(error: WSManFaultError, *, stage: Stage, connection: HostConnection) -> VmsnapError:
    where = connection.where
    if stage is Stage.LISTENING:
        return UnknownOutcomeError(
            f"{where} lost a script while it ran; was its WinRM service restarted?", details=_words(error)
        )
    if stage is Stage.ASKING and error.code == OPERATION_TIMED_OUT:
        return UnknownOutcomeError(f"{where} took too long to begin a script; it may yet", details=_words(error))
    refusal: VmsnapError = DriverError(f"{where} refused a request of PowerShell remoting")
    if error.code == SHELL_GONE:
        refusal = HostUnreachableError(f"{where} has dropped the session")
    elif error.code in _QUOTAS:
        refusal = HostUnreachableError(
            f"{where} has no room for another session",
            remedy="close sessions that nobody uses, or raise its quotas: winrm get winrm/config/winrs",
        )
    elif error.code == _ACCESS_DENIED:
        refusal = PreconditionError(
            f"{where} refuses a session of '{connection.configuration}' to this account",
            remedy="put the account into 'Remote Management Users', or let it use the session configuration: "
            "Set-PSSessionConfiguration -ShowSecurityDescriptorUI",
        )
    elif error.code in _NO_SUCH_RESOURCE:
        refusal = PreconditionError(
            f"{where} has no session configuration '{connection.configuration}'",
            remedy="correct hyperv.configuration, or register it on the host (docs/hyper-v.md)",
        )
    elif error.code == OPERATION_TIMED_OUT:
        refusal = HostUnreachableError(f"{where} is too slow", remedy="raise hyperv.operation_timeout")
    refusal.details = _words(error)
    return refusal


def _before_anything(error: Exception, *, connection: HostConnection) -> VmsnapError | None:
    """Return the error where it is certain that the host acted upon nothing, else None."""
    refusal = _login(error, connection=connection) or _certificate(error, connection=connection)
    if refusal is not None:
        return refusal
    if isinstance(error, WinRMTransportError):
        return _status(error, connection=connection)
    # Not any error of TLS: a connection that is cut while an answer is awaited ends with one as well.
    never_sent = urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError
    return _unreachable(connection, error) if any(isinstance(cause, never_sent) for cause in _chain(error)) else None


def _login(error: Exception, *, connection: HostConnection) -> VmsnapError | None:
    if isinstance(error, ImportError):
        extra = "credssp" if connection.authentication is Authentication.CREDSSP else "kerberos"
        return PreconditionError(
            f"hyperv.authentication '{connection.authentication}' needs a package that is not installed",
            details=_words(error),
            remedy=f"pip install 'vmsnap[{extra}]'",
        )
    # Not any error of a login's library: an answer that cannot be unsealed is one as well.
    return _login_refused(error, connection=connection) if isinstance(error, AuthenticationError) else None


def _login_refused(error: Exception, *, connection: HostConnection) -> PreconditionError:
    return PreconditionError(
        f"{connection.where} refuses the login by {connection.authentication}",
        details=_words(error),
        remedy="check account, password and realm in hyperv.credential, whether the account is locked, and which "
        "kinds of login the host allows: winrm get winrm/config/service/auth",
    )


def _certificate(error: Exception, *, connection: HostConnection) -> VmsnapError | None:
    problem = _certificate_problem(error)
    if problem is None:
        return None
    return PreconditionError(
        f"the certificate of {connection.where} {problem}: no password was sent",
        details=_words(error),
        remedy="give the host's HTTPS listener a valid certificate for this name, and name its authority in "
        "hyperv.authority",
    )


def _status(error: WinRMTransportError, *, connection: HostConnection) -> VmsnapError | None:
    if error.code == _NOT_FOUND:
        return PreconditionError(
            f"what answers at {connection.where} is not WinRM", remedy="correct hyperv.host and hyperv.port"
        )
    if error.code == _UNAVAILABLE or error.code // 100 == 4:
        return _unreachable(connection, error)
    return None


def _unreachable(connection: HostConnection, error: Exception) -> HostUnreachableError:
    return HostUnreachableError(
        f"no WinRM answers at {connection.where}",
        details=_words(error),
        remedy="is the host up, its service WinRM started (Enable-PSRemoting), its HTTPS listener there "
        "(winrm enumerate winrm/config/listener) and its firewall open?",
    )


def _certificate_problem(error: Exception) -> str | None:
    for cause in _chain(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _CERTIFICATE_PROBLEMS.get(cause.verify_code, "cannot be trusted")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it came from, and what it carries: urllib3 hides causes in ``reason`` and ``args``.

    Not its context: that may be an error of an earlier attempt, which says nothing of this one.
    """
    seen: set[int] = set()
    pending: list[object] = [error]
    while pending:
        found = pending.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        pending += [found.__cause__, getattr(found, "reason", None), *found.args]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
